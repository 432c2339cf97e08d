"""Reading vLLM's metrics."""

import itertools
import os
import threading
import time
from contextlib import suppress
from socketserver import BaseRequestHandler, ThreadingTCPServer

import pytest

from tangram.serving.scrape import (
    CacheMetrics,
    PeakSampler,
    fetch,
    parse,
    read_samples,
    totals,
)

TEXT = """\
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="recall"} USAGE
vllm:prefix_cache_queries_total{engine="0",model_name="recall"} 2.5e+03
vllm:prefix_cache_queries_created{engine="0",model_name="recall"} 1.795254387389133e+09
vllm:prefix_cache_hits_total{engine="0",model_name="recall"} 1024.0
vllm:num_preemptions_total{engine="0",model_name="a \\"quoted} name\\""} 3.0
vllm:cache_config_info{block_size="64",engine="0",kv_cache_layout="None",num_gpu_blocks="341"} 1.0
process_open_fds 42.0
"""


def test_what_is_read():
    metrics = parse(TEXT.replace("USAGE", "0.1"))
    assert metrics == CacheMetrics(
        usage=0.1,
        num_blocks=341,
        block_tokens=64,
        query_tokens=2500,
        hit_tokens=1024,
        preemptions=3,
    )
    assert metrics.held_blocks == 34


def test_totals_are_over_labels():
    text = 'a_total{engine="0"} 1.5\na_total{engine="1"} 2.0\nb 3\n# b 4\n'
    assert totals(text) == {"a_total": 3.5, "b": 3.0}


@pytest.mark.parametrize("held", [0, 1, 170, 340])
def test_held_blocks_are_those_that_the_usage_came_from(held):
    usage = 1.0 - (340 - held) / 340
    assert parse(TEXT.replace("USAGE", repr(usage))).held_blocks == held


def test_a_metric_that_is_missing_is_named():
    with pytest.raises(ValueError, match="vllm:prefix_cache_hits_total"):
        parse(TEXT.replace("USAGE", "0").replace("prefix_cache_hits_total", "hits"))


def test_lines_that_are_no_samples_are_told_apart():
    lines = ["b", "c{", 'd{e="f} 1', "g{h} 1", 'i{j="k"} x', "l 1 2 3", "<html>", "9m 1"]
    text = "\n".join(["# HELP a", "a 1", *lines, "", 'n{o="p",} +Inf 1700000000', "q -1"])
    found, others = read_samples(text)
    assert others == lines
    assert [(s.name, s.labels, s.value) for s in found] == [
        ("a", {}, 1.0), ("n", {"o": "p"}, float("inf")), ("q", {}, -1.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("begin", "filling", "end", "is_sample"),
    [
        ('a{b="', "x", '"} 1', True),
        ('a{b="', "x", "", False),
        ('a{b="', "\\\\", '"} 1', True),
        ("a{", 'b="",', "} 1", True),
        ('a{b="",', "c", "} 1", False),
        ("a ", "1 ", "", False),
        ("", "{", "", False),
    ],
)
def test_a_line_of_a_megabyte_is_read_once(begin, filling, end, is_sample):
    """A label of 100 KB took 40 s: a pattern began anew at each of its characters."""
    line = begin + filling * (1_000_000 // len(filling)) + end
    found, others = read_samples(line)
    assert (len(found), len(others)) == (is_sample, not is_sample)


@pytest.fixture
def serve_without_end():
    """A server that repeats a piece, after what begins the answer, until the test's end."""
    stopped, servers = threading.Event(), []

    def serve(begin: bytes, piece: bytes, pause_s: float = 0.0) -> str:
        class Handler(BaseRequestHandler):
            def handle(self):
                with suppress(OSError):
                    self.request.sendall(begin)
                    while not stopped.wait(pause_s):
                        self.request.sendall(piece)

        server = ThreadingTCPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_address[1]}/metrics"

    yield serve
    stopped.set()
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


ANSWER = b"HTTP/1.1 200 OK\r\n\r\n"


def test_a_body_without_end_is_stopped_by_its_bytes(serve_without_end):
    address = serve_without_end(ANSWER, b"x" * 65536)
    with pytest.raises(OSError, match="more than 100,000 bytes"):
        fetch(address, most_bytes=100_000, limit_s=300)


@pytest.mark.parametrize("begin", [ANSWER + b"a 1\n", ANSWER[:-2] + b"X: "])
def test_an_answer_that_drips_is_stopped_as_a_whole(serve_without_end, begin):
    """Every byte in time, and the whole never: of the body, and of the headers before it."""
    address = serve_without_end(begin, b"x", pause_s=0.001)
    with pytest.raises(TimeoutError, match="did not end within 0.2 s"):
        fetch(address, limit_s=0.2)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics")
    with pytest.raises(TimeoutError, match="did not end"):
        fetch((tmp_path / "metrics").as_uri(), limit_s=0.01)
    os.close(os.open(tmp_path / "metrics", os.O_RDWR | os.O_NONBLOCK))  # lets the reader go


def test_the_sampler_keeps_the_peak_and_survives_a_failed_reading():
    usages = itertools.chain(["0.1", None, "0.5", "0.2"], itertools.repeat("0.0"))

    def read() -> str:
        usage = next(usages)
        if usage is None:
            raise ConnectionResetError
        return TEXT.replace("USAGE", usage)

    with PeakSampler(read) as sampler:
        deadline = time.monotonic() + 30
        while sampler.num_samples < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert sampler.peak_blocks == 170
    taken = sampler.num_samples
    time.sleep(0.25)
    assert sampler.num_samples == taken >= 4
