"""Bars: what fell is red and named, what is not there is left, what is done is not run again."""

import json
import os
import shutil
import sys

import pytest

from benchmarks.bars import __main__ as command
from benchmarks.bars import suite as suites
from benchmarks.bars.__main__ import COMMITTED, LEFT, RED, main
from benchmarks.bars.figures import READERS, read_figures
from benchmarks.bars.judge import Judged, Verdict, judge, table
from benchmarks.bars.suite import Suite
from benchmarks.bars.table import BARS, LESS, MORE, RUNS, Bar, Run
from benchmarks.serving.report import read_lines

WITH_LINES = ",".join(name for name, run in RUNS.items() if (COMMITTED / run.file).exists())


@pytest.fixture
def measured(tmp_path):
    """A folder of results, as good as the committed ones."""
    folder = tmp_path / "measured"
    shutil.copytree(COMMITTED, folder)
    return folder


def change(file, chosen, **fields):
    """Put other values into the lines that `chosen` picks."""
    lines = read_lines(file)
    picked = [line for line in lines if chosen(line)]
    assert picked
    for line in picked:
        for name, value in fields.items():
            line[name] = value(line) if callable(value) else value
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def red(folder):
    return [each.bar.name for each in judge(BARS, COMMITTED, folder) if each.verdict.is_red]


def test_every_bar_is_found_in_the_committed_lines():
    for bar in BARS:
        found = read_figures(COMMITTED, RUNS[bar.run].file)
        if (COMMITTED / RUNS[bar.run].file).exists():
            assert bar.name in found, f"{bar.name}: one of {', '.join(found)}"
        else:
            assert bar.promised is not None, bar.name


def test_the_table_is_sound():
    assert len({(bar.run, bar.name) for bar in BARS}) == len(BARS)
    assert {bar.run for bar in BARS} == set(RUNS)
    assert {run.file for run in RUNS.values()} == set(READERS)
    for bar in BARS:
        assert bar.better in (MORE, LESS) and 0 <= bar.spread <= 1, bar


def test_the_committed_lines_hold(capsys):
    assert main(["--judge", str(COMMITTED), "--only", WITH_LINES]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(" holds")


@pytest.mark.parametrize(
    ("file", "chosen", "fields", "names"),
    [
        (
            "decode.jsonl",
            {"load": "1x128K-31x2K"},
            {"over_fa3_equal_heads": 0.85},
            ["1x128K-31x2K, over FA3"],
        ),
        (
            "prefill.jsonl",
            {"chunk_size_tokens": 2048, "start": 0, "stop": 32768},
            {"with_fa3_over_full_fa3": 0.45},
            ["C = 2048, with FA3, over full KV"],
        ),
        (
            "seal.jsonl",
            {"what": "mean step", "scorer": "tova"},
            {"us": 21.0},
            ["tova, mean step, us"],
        ),
        ("launch.jsonl", {"call": "store"}, {"host_us": 40.0}, ["store, host, us"]),
        (
            "engine.jsonl",
            {"side": "absent", "compare": "decode 4 x 32768"},
            {"step_ms_over_stock": 1.02},
            ["decode 4 x 32768, without the flags"],
        ),
        (
            "engine.jsonl",
            {"side": "tangram", "compare": "throughput"},
            {"output_over_stock_turn_0": 2.0},
            ["throughput, over stock"],
        ),
        (
            "serving.jsonl",
            {"side": "tangram", "model": "qwen3-32b"},
            {"requests_per_s": 0.3},
            ["qwen3-32b, mid, closed 12, requests/s"],
        ),
        (
            "serving.jsonl",
            {"side": "tangram", "level": "open 0.178"},
            {"ttft_s": {"p50": 0.07, "p95": 2.5}},
            ["qwen3-4b, mid, open stock, first token, p95"],
        ),
    ],
)
def test_a_figure_that_fell_is_red_and_named(measured, capsys, file, chosen, fields, names):
    change(measured / file, lambda line: chosen.items() <= line.items(), **fields)
    assert red(measured) == names
    assert main(["--judge", str(measured), "--only", WITH_LINES]) == RED
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "FELL" in line]
    assert line.split("  ")[1].startswith(names[0])


def test_within_its_spread_a_figure_holds_and_beyond_it_is_better(measured):
    def over(factor):
        return lambda line: line["over_fa3_equal_heads"] * factor

    change(measured / "decode.jsonl", lambda line: True, over_fa3_equal_heads=over(0.98))
    found = judge(BARS, COMMITTED, measured)
    assert {each.verdict for each in found if each.bar.run == "decode"} == {Verdict.HOLDS}
    change(measured / "decode.jsonl", lambda line: True, over_fa3_equal_heads=over(1.1))
    rose = [each.bar.name for each in judge(BARS, COMMITTED, measured)
            if each.verdict is Verdict.ROSE]  # fmt: skip
    assert len(rose) == 9 and all(name.endswith("over FA3") for name in rose)


@pytest.mark.parametrize(
    ("better", "measured", "verdict"),
    [
        (MORE, 0.96, Verdict.HOLDS),
        (MORE, 0.94, Verdict.FELL),
        (MORE, 1.06, Verdict.ROSE),
        (MORE, float("nan"), Verdict.FELL),
        (LESS, 1.04, Verdict.HOLDS),
        (LESS, 1.06, Verdict.FELL),
        (LESS, 0.94, Verdict.ROSE),
        (LESS, float("nan"), Verdict.FELL),
        (MORE, None, Verdict.LEFT),
    ],
)
def test_verdicts(better, measured, verdict):
    assert Judged(Bar("decode", "x", better, 0.05), 1.0, measured, 0.05).verdict is verdict


def test_a_promise_is_kept_though_the_past_slid():
    bar = Bar("engine", "x", LESS, 0.01, promised=1.0)
    assert Judged(bar, 1.008, 1.012, 0.01).verdict is Verdict.BROKEN
    assert Judged(bar, 1.008, 1.009, 0.01).verdict is Verdict.HOLDS
    assert Judged(bar, None, 1.02, 0.01).verdict is Verdict.BROKEN
    assert Judged(bar, None, 1.0, 0.01).verdict is Verdict.HOLDS
    assert Judged(Bar("engine", "x", LESS, 0.01), None, 1.0, 0.01).verdict is Verdict.LEFT
    exact = Bar("check", "x", MORE, 0.0, promised=1.0)
    assert Judged(exact, 1.0, 1.0, 0.0).verdict is Verdict.HOLDS


def test_replays_that_differ_by_more_than_the_declared_spread_widen_it(measured, tmp_path):
    past = tmp_path / "past"
    shutil.copytree(COMMITTED, past)
    mid = {"load": "mid-48"}.items()
    change(
        past / "decode.jsonl",
        lambda line: mid <= line.items(),
        min_ms=lambda line: line["median_ms"] * 0.95,
        max_ms=lambda line: line["median_ms"] * 1.05,
    )
    change(measured / "decode.jsonl", lambda line: mid <= line.items(), over_ceiling=0.88)
    bars = [bar for bar in BARS if bar.name == "mid-48, over a plain read"]
    assert [each.verdict for each in judge(bars, COMMITTED, measured)] == [Verdict.FELL]
    (wider,) = judge(bars, past, measured)
    assert wider.verdict is Verdict.HOLDS and wider.spread == pytest.approx(0.1)
    step = "decode 4 x 32768"
    change(
        past / "engine.jsonl",
        lambda line: line.get("key") == step and line["side"] != "absent",
        steps_ms=lambda line: [line["step_ms"] * share for share in (0.98, 1, 1.01)],
    )
    found = read_figures(past, "engine.jsonl")
    assert found[f"{step}, over stock"].spread == pytest.approx(0.06)
    assert 0.03 < found[f"{step}, without the flags"].spread < 0.04  # stock's share


def test_a_line_that_is_missing_leaves_its_bars(measured, capsys):
    file = measured / "decode.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    assert main(["--judge", str(measured), "--only", "decode,prefill"]) == LEFT
    left = [line for line in capsys.readouterr().out.splitlines() if line.endswith("  left")]
    assert [line.split(",")[0].strip() for line in left] == ["4x32K", "4x32K"]
    file.unlink()
    assert main(["--judge", str(measured), "--only", "decode"]) == LEFT


def test_what_fell_counts_before_what_is_left(measured):
    change(measured / "seal.jsonl", lambda line: line["what"] == "mean step", us=99.0)
    (measured / "decode.jsonl").unlink()
    assert main(["--judge", str(measured), "--only", "decode,seal"]) == RED


def test_answers_are_judged_by_what_the_docs_promise(tmp_path):
    bars = [bar for bar in BARS if bar.run == "check"]
    lines = []
    for bar in bars:
        name, _, field = bar.name.rpartition(", ")
        lines.append({"check": name, "ok": True, field: bar.promised})
    file = tmp_path / "check.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--judge", str(tmp_path), "--only", "check"]
    assert main(arguments) == 0
    change(file, lambda line: line["check"] == "key_diff ratio 0.5", right=0.95)
    assert main(arguments) == RED


def test_lines_of_other_models_and_without_flash_attention_are_no_figures(tmp_path):
    lines = read_lines(COMMITTED / "decode.jsonl")[:2]
    lines[0]["model"] = "llama-3.1-8b"
    del lines[1]["over_fa3_equal_heads"]
    (tmp_path / "decode.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(read_figures(tmp_path, "decode.jsonl")) == ["short-48, over a plain read"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "decode,nope"], "--only: unknown nope: choose of decode, prefill, "),
        (["--judge", "/nope"], "--judge: /nope: there is no such folder"),
        (["--retention", "/nope"], "--retention: /nope: there is no such file"),
        (["--time-limit-s", "-1"], "--time-limit-s: -1: expected a number above 0"),
    ],
)
def test_mistakes_are_told_before_anything_runs(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(Suite, "run", lambda *given: pytest.fail("ran"))
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_file_is_no_folder_and_no_json_is_no_line(tmp_path, capsys):
    file = tmp_path / "seal.jsonl"
    file.write_text("{\n")
    assert main(["--out", str(file), "--only", "seal"]) == 2
    assert f"--out {file} cannot be made" in capsys.readouterr().err
    assert main(["--judge", str(tmp_path), "--only", "seal"]) == 2
    assert f"line 1 of {file} is no JSON object" in capsys.readouterr().err


# The runner, with children that stand in for benchmarks.

WRITES = """
import json, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open(options["--out"], "a") as file:
    for scorer in ("tova", "snap_kv"):
        line = {"what": "mean step", "scorer": scorer, "us": 20.0, "options": options}
        file.write(json.dumps(line) + "\\n")
print("measured")
"""


def stand_in(code, name="seal", **fields):
    """A command that writes two figures, and then what `code` says."""
    return Run(name, "seal.jsonl", ("-c", WRITES + code), 2, **fields)


@pytest.fixture
def small(monkeypatch):
    """Bars of the stand-in alone."""
    few = [Bar("seal", f"{scorer}, mean step, us", LESS, 0.05) for scorer in ("tova", "snap_kv")]
    few.append(Bar("decode", "4x32K, over FA3", MORE, 0.05))
    monkeypatch.setattr(suites, "BARS", few)
    monkeypatch.setattr(command, "BARS", few)


def test_a_command_is_run_once_and_judged(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RUNS, "seal", stand_in(""))
    heads = tmp_path / "heads.npz"
    heads.touch()
    arguments = ["--only", "seal", "--out", str(tmp_path / "out"), "--retention", str(heads)]
    assert main([*arguments, "--list"]) == 0
    assert " left  -c " in capsys.readouterr().out
    assert main(arguments) == 0
    lines = read_lines(tmp_path / "out/seal.jsonl")
    assert [line["scorer"] for line in lines] == ["tova", "snap_kv"]
    assert lines[0]["options"]["--retention"] == str(heads)
    assert (tmp_path / "out/logs/seal.log").read_text() == "measured\n"
    assert "seal: exit 0 after" in capsys.readouterr().out
    monkeypatch.setitem(RUNS, "seal", stand_in("sys.exit('ran again')"))
    assert main(arguments) == 0
    assert "seal: done before" in capsys.readouterr().out
    assert main([*arguments, "--list"]) == 0
    assert " done  -c " in capsys.readouterr().out


def test_a_command_that_fails_is_red_and_leaves_no_figures(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RUNS, "seal", stand_in("sys.exit('the rows are not those')"))
    arguments = ["--only", "seal", "--out", str(tmp_path)]
    assert main(arguments) == RED
    assert not (tmp_path / "seal.jsonl").exists()
    told = capsys.readouterr().out
    assert "seal: exit 1 after " in told and f", see {tmp_path}/logs/seal.log\n" in told
    assert "the rows are not those" in (tmp_path / "logs/seal.log").read_text()
    monkeypatch.setitem(RUNS, "seal", stand_in(""))
    assert main(arguments) == 0
    assert len(read_lines(tmp_path / "seal.jsonl")) == 2


def test_the_next_command_runs_though_one_failed(small, tmp_path):
    failing = Run("decode", "decode.jsonl", ("-c", "raise SystemExit(1)"), 1)
    assert not Suite(tmp_path).run([failing, stand_in("")])
    assert (tmp_path / "seal.jsonl").exists()


def test_nothing_is_begun_that_could_end_later(small, tmp_path, capsys):
    ticks = iter([0.0, 1.0])
    assert Suite(tmp_path, time_limit_s=100, clock=lambda: next(ticks)).run([stand_in("")])
    assert not (tmp_path / "seal.jsonl").exists()
    assert "seal: no time for its 2 min" in capsys.readouterr().out


def test_one_that_resumes_writes_to_the_folder_itself_and_keeps_the_time(small, tmp_path):
    ticks = iter([0.0, 60.0, 60.0, 70.0])
    resuming = stand_in("sys.exit(3)", resumes=True)
    assert Suite(tmp_path, time_limit_s=100, clock=lambda: next(ticks)).run([resuming])
    options = read_lines(tmp_path / "seal.jsonl")[0]["options"]
    assert options["--time-limit-s"] == "40" and options["--out"] == str(tmp_path / "seal.jsonl")
    assert options["--logs"] == str(tmp_path / "logs" / "seal")


def test_a_command_that_takes_no_shares_is_given_none(small, tmp_path):
    retention = tmp_path / "heads.npz"
    assert Suite(tmp_path, retention).run([stand_in("", takes_retention=False)])
    assert "--retention" not in read_lines(tmp_path / "seal.jsonl")[0]["options"]


def test_children_find_the_sources_and_keep_the_given_path(small, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/given")
    code = "import os, benchmarks.bars.table; print(os.environ['PYTHONPATH'])"
    assert Suite(tmp_path).run([stand_in(code)])
    paths = (tmp_path / "logs/seal.log").read_text().splitlines()[-1].split(os.pathsep)
    assert paths[-1] == "/given" and str(suites.ROOT / "src") in paths


def test_the_commands_are_modules_with_the_options_that_they_are_given():
    for run in RUNS.values():
        flag, module, *options = run.command
        file = suites.ROOT.joinpath(*module.split(".")).with_suffix(".py")
        source = file.read_text()
        given = [word for word in options if word.startswith("--")] + ["--out"]
        given += ["--retention"] * run.takes_retention
        given += ["--time-limit-s", "--logs"] * run.resumes
        assert flag == "-m" and not [o for o in given if f'"{o}"' not in source], run.name


def test_the_report_is_narrow_and_says_what_was_judged(measured):
    text = table(judge(BARS, COMMITTED, measured))
    assert max(map(len, text.splitlines())) <= 100
    assert "  capacity, over stock " in text and sys.executable not in text
