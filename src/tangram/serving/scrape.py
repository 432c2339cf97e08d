"""What a server's `/metrics` says of the KV cache, and its peak while somebody else is busy."""

from __future__ import annotations

import re
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self
from urllib.error import HTTPError

# Quantifiers that never give back what they took: a line is read once, whatever it holds.
_NAME = re.compile(r"[a-zA-Z_:][\w:]*+")
_LABEL = re.compile(r'\s*+([a-zA-Z_]\w*+)="((?:[^"\\]|\\.)*+)"\s*+,?+')
_VALUE = re.compile(r"\s++(\S++)(?:\s++-?\d++)?+\s*+")
_INTERVAL_S = 0.1
_MOST_BYTES = 4 << 20  # many times what a server has to say
_LIMIT_S = 10.0


@dataclass(frozen=True)
class CacheMetrics:
    """The KV cache at one moment.

    Attributes:
        usage: share of the pool's blocks that requests hold, in [0, 1].
        num_blocks: blocks of the pool, vLLM's null block among them.
        block_tokens: `block_size` of the cache's configuration.
        query_tokens: prompt tokens looked up in the prefix cache so far.
        hit_tokens: those of them that were there.
        preemptions: requests that lost their blocks so far.
    """

    usage: float
    num_blocks: int
    block_tokens: int
    query_tokens: int
    hit_tokens: int
    preemptions: int

    @property
    def held_blocks(self) -> int:
        """Blocks that requests hold; the null block is no part of the usage."""
        return round(self.usage * (self.num_blocks - 1))


@dataclass(frozen=True)
class Sample:
    """One line of Prometheus' text format."""

    name: str
    labels: dict[str, str]
    value: float


def fetch(address: str, *, most_bytes: int = _MOST_BYTES, limit_s: float = _LIMIT_S) -> str:
    """What a URL gives, read within a limit of bytes and one of time for all of it.

    The reading is left to itself when its time is over: a server that sends a byte now and then, or
    a pipe that nobody writes to, never lets it return.

    Args:
        address: the URL.
        most_bytes: of its contents.
        limit_s: until its end.

    Raises:
        OSError, ValueError, HTTPException: it cannot be read, or is more than that.
    """
    found: list[bytes | Exception] = []

    def read() -> None:
        try:
            with urllib.request.urlopen(address, timeout=limit_s) as response:
                found.append(response.read(most_bytes + 1))
        except Exception as error:  # raised where somebody waits for it
            if isinstance(error, HTTPError):
                error.close()
            found.append(error)

    thread = threading.Thread(target=read, name="fetch", daemon=True)
    thread.start()
    thread.join(limit_s)
    if not found:
        raise TimeoutError(f"it did not end within {limit_s:g} s")
    if isinstance(found[0], Exception):
        raise found[0]
    if len(found[0]) > most_bytes:
        raise OSError(f"it has more than {most_bytes:,} bytes")
    return found[0].decode(errors="replace")


def read_samples(text: str) -> tuple[list[Sample], list[str]]:
    """The samples of a scrape in order, and the lines that are neither one nor a comment.

    Takes time in proportion to the text, whatever it is.
    """
    found, others = [], []
    for line in text.split("\n"):
        if not line.strip() or line.startswith("#"):
            continue
        sample = _sample(line)
        if sample is None:
            others.append(line)
        else:
            found.append(sample)
    return found, others


def _sample(line: str) -> Sample | None:
    name = _NAME.match(line)
    if name is None:
        return None
    at, labels = name.end(), dict[str, str]()
    if line.startswith("{", at):
        at += 1
        while label := _LABEL.match(line, at):
            labels[label[1]] = label[2]
            at = label.end()
        if not line.startswith("}", at):
            return None
        at += 1
    value = _VALUE.fullmatch(line, at)
    try:
        return Sample(name[0], labels, float(value[1])) if value else None
    except ValueError:
        return None


def samples(text: str) -> list[Sample]:
    """The samples of a scrape, in order."""
    return read_samples(text)[0]


def totals(text: str) -> dict[str, float]:
    """Every metric of a scrape by name, summed over its labels."""
    values: dict[str, float] = {}
    for sample in samples(text):
        values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values


def parse(text: str) -> CacheMetrics:
    """The cache's metrics in Prometheus' text format.

    Raises:
        ValueError: one of them is missing.
    """
    values, labels = totals(text), dict[str, str]()
    for sample in samples(text):
        if sample.name == "vllm:cache_config_info":
            labels = sample.labels
    try:
        return CacheMetrics(
            usage=values["vllm:kv_cache_usage_perc"],
            num_blocks=int(labels["num_gpu_blocks"]),
            block_tokens=int(labels["block_size"]),
            query_tokens=int(values["vllm:prefix_cache_queries_total"]),
            hit_tokens=int(values["vllm:prefix_cache_hits_total"]),
            preemptions=int(values.get("vllm:num_preemptions_total", 0)),
        )
    except KeyError as error:
        raise ValueError(f"the server's metrics lack {error}") from error


class PeakSampler:
    """Reads the metrics several times a second in a thread, and keeps the most blocks held.

    Args:
        read: gives the text of `/metrics`; an OSError of it is a sample less.
    """

    def __init__(self, read: Callable[[], str]) -> None:
        self.peak_blocks = 0
        self.num_samples = 0
        self._read = read
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            try:
                held = parse(self._read()).held_blocks
            except OSError:
                continue
            self.peak_blocks = max(self.peak_blocks, held)
            self.num_samples += 1
