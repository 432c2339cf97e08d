"""Reading vLLM's metrics."""

import itertools
import time

import pytest

from tangram.serving.scrape import CacheMetrics, PeakSampler, parse, totals

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
