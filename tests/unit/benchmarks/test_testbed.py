"""The test bed with engines that look answers up: engines shared, cells resumed, the report."""

import json

import pytest
import torch

from benchmarks.accuracy import testbed, testbed_report
from tangram.errors import ConfigurationError
from tangram.evaluate.results import append_cell
from tests.unit.cli.test_evaluate import Lookup

NEEDLES = (
    "--tasks", "multikey", "variable_tracking", "--context-tokens", "1500", "--seeds", "2",
    "--questions", "8", "--questions-per-conversation", "1", "--text-kinds",
)  # fmt: skip
TEXTS = ("--tasks", "--text-kinds", "code", "repeated", "--texts-a-kind", "2",
         "--text-tokens", "400")  # fmt: skip


class Reader:
    """States are the sample's own tokens; with compression they are off by the engine's number."""

    def __init__(self, off):
        self.closed, self.off, self.budgets = False, off, []

    def states(self, samples, positions):
        return [
            torch.tensor([[float(sample[p]) + self.off] for p in where])
            for sample, where in zip(samples, positions, strict=True)
        ]

    def divergence(self, full, other):
        assert full.shape == other.shape
        return float((other - full).mean())

    def agreement(self, full, other):
        return float((other == full).double().mean())

    def swap_budgets(self, head_groups):
        self.budgets.append(head_groups)

    def close(self):
        self.closed = True


@pytest.fixture
def started(monkeypatch):
    """(setting, engine) of every engine that was started."""
    engines = []

    def greedy(bed, setting):
        engines.append((setting, Lookup(bed.scripts, setting.options is not None)))
        return engines[-1][1]

    def reading(bed, setting):
        engines.append((setting, Reader(0.0 if setting.options is None else 0.5)))
        return engines[-1][1]

    monkeypatch.setattr(testbed, "start_greedy", greedy)
    monkeypatch.setattr(testbed, "start_reading", reading)
    return engines


@pytest.fixture
def out(tmp_path):
    return tmp_path / "cells.jsonl"


def play(model, out, *more):
    return testbed.main(["--model", str(model), "--out", str(out), "--dtype", "float32", *more])


def lines(out):
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_cells_are_written_and_not_played_again(tiny_model, out, started, capsys):
    argv = [*NEEDLES, "--ratios", "0.5", "0.25"]
    assert play(tiny_model, out, *argv) == 0
    cells = lines(out)
    # Full KV and two ratios, of two tasks with two seeds each.
    assert len(cells) == 3 * 2 * 2 and len(started) == 3
    assert all(engine.closed for _, engine in started)
    for cell in cells:
        assert (cell["model"], cell["sha256_of"], cell["dtype"]) == ("tiny", "weights", "float32")
        assert cell["versions"]["vllm"] and cell["machine"]["cpus"] and "commit" in cell
        assert cell["command"][-2:] == ["0.5", "0.25"] and cell["device"] == "a shelf"
        assert [len(scores) for scores in cell["scores"]] == [1] * 4 and len(cell["kinds"]) == 4
        full = cell["scorer"] is None
        assert cell["right"] == (4 if full else 2)
        assert [lost[0] for lost in cell["lost"]] == ([] if full else [1, 3])
    printed = capsys.readouterr().out
    assert "| multikey | 1,500 | 8 | 100.0 |" in printed
    assert "| multikey | 1,500 | key_diff | 256 | 0.25 | 50.0 (" in printed

    started.clear()
    whole = out.read_text()
    out.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    assert play(tiny_model, out, *argv) == 0
    assert [setting.options.compression_ratio for setting, _ in started] == [0.25]
    assert len(lines(out)) == len(cells) and capsys.readouterr().out == printed
    started.clear()
    assert play(tiny_model, out, *argv) == 0
    assert not started and capsys.readouterr().out == printed


def test_profiles_are_named_and_share_the_engine_of_a_ratio(
    tiny_model, out, started, save_profile, capsys
):
    one, two = (save_profile(seed) for seed in (1, 2))
    argv = [*NEEDLES, "--ratios", "0.5", "0.25", "--levels", "uniform", "error",
            "--profile", f"all={one}", f"no-tables={two}"]  # fmt: skip
    assert play(tiny_model, out, *argv) == 0
    assert [s.options and s.options.compression_ratio for s, _ in started] == [None, 0.5, 0.25]
    # Uniform budgets are the same with any profile; those of the two profiles are swapped in.
    assert [len(engine.budgets) for _, engine in started] == [0, 2, 2]
    assert all(len(set(engine.budgets)) == len(engine.budgets) for _, engine in started)
    labels = {cell["label"] for cell in lines(out)}
    assert labels == {"", "uniform", "all error", "no-tables error"}
    assert {cell["profile"] for cell in lines(out)} == {None, one.name, two.name}
    head = "| task | context | scorer | C | ratio | all error | no-tables error | uniform |"
    assert head in capsys.readouterr().out


def test_a_scorer_that_reads_the_profile_has_an_engine_for_each(
    tiny_model, out, started, save_profile
):
    files = [save_profile(seed, "expected_attention") for seed in (1, 2)]
    argv = [*NEEDLES, "--ratios", "0.5", "--scorers", "expected_attention", "--levels", "uniform",
            "error", "--profile", f"a={files[0]}", f"b={files[1]}"]  # fmt: skip
    assert play(tiny_model, out, *argv) == 0
    assert len(started) == 3 and [len(e.budgets) for _, e in started] == [0, 1, 1]
    assert {c["label"] for c in lines(out)} == {"", "a uniform", "b uniform", "a error", "b error"}


def test_divergence_of_named_texts(tiny_model, out, started, capsys):
    assert play(tiny_model, out, *TEXTS, "--ratios", "0.5", "0.25") == 0
    cells = lines(out)
    assert [(c["task"], c["ratio"]) for c in cells] == [
        ("code", 0.5), ("repeated", 0.5), ("code", 0.25), ("repeated", 0.25)
    ]  # fmt: skip
    for cell in cells:
        assert (cell["part"], cell["divergence"], cell["agreement"]) == ("divergence", 0.5, 0.0)
        assert len(cell["texts"]) == 2 and all(t["text"] and t["sha256"] for t in cell["texts"])
    assert "0.5000 (0.5000 to 0.5000) nats, 0.0 (0.0 to 0.0) % top-1" in capsys.readouterr().out
    assert all(engine.closed for _, engine in started)
    started.clear()
    assert play(tiny_model, out, *TEXTS, "--ratios", "0.5", "0.25") == 0
    assert not started
    assert play(tiny_model, out, *TEXTS, "--ratios", "0.5", "--texts", "code=python-manual") == 0
    assert len(lines(out)) == 5  # another text is another cell


def test_an_unknown_kind_of_text_is_named(tiny_model, out):
    with pytest.raises(ConfigurationError, match="poems is no kind"):
        play(tiny_model, out, *TEXTS, "--texts", "poems=stdlib")


def needles(scorer, scores, script="one", **changes):
    return {
        "digest": f"{scorer}{script}{changes}", "part": "needles", "task": "multikey",
        "context_tokens": 4096, "kinds": ["row", "code"], "scores": scores, "script": script,
        "scorer": scorer, "label": "" if scorer is None else "a measured", "chunk_size": 256,
        "window_size": 32, "page_group_size": 1, "ratio": 0.25, "model": "m", "sha256": "s" * 64,
        "sha256_of": "weights", "dtype": "bfloat16", **changes,
    }  # fmt: skip


def test_the_report_is_paired_and_pools_seeds():
    cells = [
        needles(None, [[1, 0], [1, 1]]),
        needles("key_diff", [[1, 0], [1, 0]]),
        needles(None, [[1, 1], [0, 0]], "two"),
        needles("key_diff", [[1, 1], [0, 0]], "two"),
        needles("key_diff", [[1, 1], [1, 1]], "of another full KV"),
    ]
    text = testbed_report.report(cells)
    assert "| multikey | 4,096 | 8 | 62.5 |" in text
    assert "| multikey | 4,096 | key_diff | 256 | 0.25 | 80.0 (" in text
    by_kind = testbed_report.report(cells, by_kind=True)
    assert "| multikey, row | 4,096 | key_diff | 256 | 0.25 | 100.0 (100.0 to 100.0) |" in by_kind
    assert "| multikey, code | 4,096 | key_diff | 256 | 0.25 | 50.0 (" in by_kind


def test_after_a_new_calibration_the_last_cell_counts():
    cells = [
        needles(None, [[1, 1], [1, 1]]),
        needles("key_diff", [[0, 0], [0, 0]], digest="old"),
        needles("key_diff", [[1, 1], [1, 1]], digest="new"),
    ]
    assert "| 0.25 | 100.0 (100.0 to 100.0) |" in testbed_report.report(cells)
    assert "| 0.25 | 0.0 (0.0 to 0.0) |" in testbed_report.report([*cells[::2], cells[1]])


def test_the_reports_command_reads_files(tmp_path, capsys, monkeypatch):
    file = tmp_path / "cells.jsonl"
    for each in (needles(None, [[1], [1]]), needles("key_diff", [[1], [0]])):
        append_cell(file, each)
    monkeypatch.setattr("sys.argv", ["testbed_report", str(file)])
    testbed_report.main()
    assert "50.0 (0.0 to 100.0)" in capsys.readouterr().out
