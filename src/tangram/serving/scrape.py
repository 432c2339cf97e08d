"""What a server's `/metrics` says of the KV cache, and its peak while somebody else is busy."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

_SAMPLE = re.compile(r"^(?P<name>[\w:]+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_INTERVAL_S = 0.1


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


def samples(text: str) -> list[Sample]:
    """The samples of a scrape, in order."""
    return [
        Sample(found["name"], dict(_LABEL.findall(found["labels"] or "")), float(found["value"]))
        for found in _SAMPLE.finditer(text)
    ]


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
