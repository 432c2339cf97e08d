"""Simulated closed loops: what vLLM's own prefix cache finds of conversations that were played."""

import pytest

from benchmarks.serving import simulate
from benchmarks.serving.sides import find_model
from benchmarks.serving.workloads import WORKLOADS

WORKLOAD = WORKLOADS["short"].scaled(0.25)
TINY = ("--model", "tiny", "--page-group-size", "1", "--max-model-len", "8192")


def figures(tmp_path, side, memory_gib, users, *options):
    """Of a window of ten simulated seconds; the pool has to be whole at its end."""
    argv = [*TINY, "--memory-gib", str(memory_gib), "--max-num-batched-tokens", "2048", *options]
    args = simulate.parser().parse_args(argv)
    engine = simulate.Engine(side, find_model("tiny", tmp_path), args, simulate.StepTime())
    assert engine.is_whole
    found = simulate.simulate(engine, WORKLOAD, users, window_s=10)
    assert engine.is_whole
    return found


@pytest.mark.parametrize("side, scorer", [("stock", ""), ("tangram", ""), ("tangram", "snap_kv")])
def test_a_cache_that_holds_all_finds_all_but_what_is_new(tmp_path, side, scorer):
    options = ("--scorer", scorer) if scorer else ()
    found = figures(tmp_path, side, 1.0, 4, *options)
    assert found == figures(tmp_path, side, 1.0, 4, *options)
    assert found["requests"] > 10 and found["window_s"] >= 10
    assert 0.5 < found["cached_share"] < 0.9


def test_compression_holds_more_and_few_boundaries_leave_room_for_more(tmp_path):
    """32 users of some 2,000 tokens and 4 MiB each share 40 MiB."""
    found = {
        name: figures(tmp_path, side, 40 / 1024, 32, *options)["cached_share"]
        for name, side, *options in (
            ("stock", "stock"),
            ("dense", "tangram", "--retention-interval", "dense"),
            ("default", "tangram"),
        )
    }
    assert found["stock"] + 0.05 < found["dense"] < found["default"] - 0.05, found


def test_open_loops_are_not_simulated(capsys):
    with pytest.raises(SystemExit):
        simulate.main(["--cells", "short/open:1"])
    assert "closed loops alone" in capsys.readouterr().err
