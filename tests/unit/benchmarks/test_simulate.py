"""Simulated loops: what vLLM's own prefix cache finds of conversations that were played."""

import pytest

from benchmarks.serving import simulate
from benchmarks.serving.load import Level
from benchmarks.serving.sides import find_model
from benchmarks.serving.workloads import WORKLOADS
from tangram.errors import ConfigurationError

WORKLOAD = WORKLOADS["short"].scaled(0.25)
TINY = ("--model", "tiny", "--page-group-size", "1", "--max-model-len", "8192")


def figures(tmp_path, side, memory_gib, level, *options):
    """Of a window of ten simulated seconds; the pool has to be whole at its end."""
    argv = [*TINY, "--memory-gib", str(memory_gib), "--max-num-batched-tokens", "2048", *options]
    args = simulate.parser().parse_args(argv)
    engine = simulate.Engine(side, find_model("tiny", tmp_path), args, simulate.StepTime())
    assert engine.is_whole
    found = simulate.simulate(engine, WORKLOAD, level, window_s=10, warmup_s=5)
    assert engine.is_whole
    return found


@pytest.mark.parametrize("side, scorer", [("stock", ""), ("tangram", ""), ("tangram", "snap_kv")])
def test_a_cache_that_holds_all_finds_all_but_what_is_new(tmp_path, side, scorer):
    options = ("--scorer", scorer) if scorer else ()
    found = figures(tmp_path, side, 1.0, Level("closed", 4), *options)
    assert found == figures(tmp_path, side, 1.0, Level("closed", 4), *options)
    assert found["requests"] > 10 and found["window_s"] >= 10
    assert 0.5 < found["cached_share"] < 0.9


def test_compression_holds_more_and_few_boundaries_leave_room_for_more(tmp_path):
    """32 users of some 2,000 tokens and 4 MiB each share 40 MiB."""
    found = {
        name: figures(tmp_path, side, 40 / 1024, Level("closed", 32), *options)["cached_share"]
        for name, side, *options in (
            ("stock", "stock"),
            ("dense", "tangram", "--retention-interval", "dense"),
            ("default", "tangram"),
        )
    }
    assert found["stock"] + 0.05 < found["dense"] < found["default"] - 0.05, found


def test_an_open_loop_brings_the_same_requests_whatever_the_cache(tmp_path):
    """Some 70 conversations at a time share a cache for ten of them, or for all."""
    small, large = (
        figures(tmp_path, "stock", memory_gib, Level("open", 3)) for memory_gib in (40 / 1024, 1.0)
    )
    assert small["warmup_s"] == pytest.approx(5, abs=0.5)
    assert large["cached_share"] > 0.6 > 0.3 > small["cached_share"]
    assert large["ttft_s"]["p95"] < small["ttft_s"]["p95"]
    assert large["requests"] == pytest.approx(large["came"], rel=0.1)


def test_slower_steps_take_longer():
    step = simulate.StepTime().slower(2)
    once = simulate.StepTime().of([(100, 50)], 1e9, 0.25)
    assert step.of([(100, 50)], 1e9, 0.25) == pytest.approx(2 * once)


def test_conversations_that_no_longer_arrive_are_told(tmp_path):
    with pytest.raises(ConfigurationError, match="give a higher rate, or a longer --window-s"):
        figures(tmp_path, "stock", 1.0, Level("open", 1e-6))


def test_a_rate_is_not_searched_for(capsys):
    with pytest.raises(SystemExit):
        simulate.main(["--cells", "short/search:1"])
    assert "search 1: closed and open loops" in capsys.readouterr().err
