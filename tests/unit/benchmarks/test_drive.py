"""Cells of the serving benchmark: done once, taken up again, in time, and told apart."""

import argparse
import json
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from benchmarks.serving import drive, simulate, soak, vllm_bench
from benchmarks.serving.load import Level
from benchmarks.serving.report import main as report
from benchmarks.serving.sides import COMPRESSED, SIDES, check_side, make_side
from tangram.serving.server import ServerError


def figures(ttft_s=1.0, count=40):
    spread = {"count": count, "mean": ttft_s, "p50": ttft_s, "p95": ttft_s, "p99": ttft_s}
    return {
        "window_s": count / 2,
        "requests_per_s": 2.0,
        "output_tokens_per_s": 100.0 / ttft_s,
        "ttft_s": spread,
        "gap_s": spread,
        "token_time_s": spread,
        "ttft_s_at_least": 0,
        "cached_share": 0.5,
        "outcomes": {"done": count},
        "counters": {"preemptions": 4},
        "waiting": None,
    }


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs the driver without servers; `loads` and `starts` tell what it would have run."""
    seen = SimpleNamespace(
        loads=[], starts=[], out=tmp_path / "out.jsonl", fail_at=None, figures={}
    )

    @contextmanager
    def served(side, args):
        seen.starts.append(side.name)
        yield SimpleNamespace(check_alive=lambda: None, name=side.name), {"layout": "x"}

    async def load(server, workload, level, phases, model, args):
        if len(seen.loads) == seen.fail_at:
            raise KeyboardInterrupt
        seen.loads.append((server.name, workload.name, str(level)))
        slow = 4.0 if server.name == "stock" else 2.0
        return figures(slow * level.amount, **seen.figures)

    monkeypatch.setattr(drive, "served", served)
    monkeypatch.setattr(drive, "_load", load)

    def run(*argv):
        common = ["--model", "recall", "--out", str(seen.out), "--commit", "abc"]
        return drive.main([*common, *argv])

    seen.run = run
    seen.lines = lambda: [json.loads(line) for line in seen.out.read_text().splitlines()]
    return seen


CELLS = ("--cells", "short/closed:2,short/open:0.5,mid/closed:2,mid/open:0.5")


def test_every_cell_once_with_provenance(bench):
    assert bench.run(*CELLS) == 0
    assert bench.starts == ["stock", "tangram"]
    assert len(bench.loads) == 8 == len(set(bench.loads))
    for line in bench.lines():
        assert line["commit"] == "abc" and line["versions"]["vllm"] and line["seed"] == 0
        assert "--cells short/closed:2,short/open:0.5" in line["command"] and line["machine"]
    assert {line["ratio"] for line in bench.lines() if line["side"] == "stock"} == {None}


def test_a_run_that_was_stopped_is_taken_up_again(bench):
    bench.fail_at = 5
    with pytest.raises(KeyboardInterrupt):
        bench.run(*CELLS, "--resume")
    bench.fail_at = None
    assert bench.run(*CELLS, "--resume") == 0
    assert len(bench.loads) == 8 == len(set(bench.loads))
    assert bench.starts == ["stock", "tangram", "tangram"]
    assert bench.run(*CELLS, "--resume") == 0  # nothing is left, and no server starts
    assert len(bench.starts) == 3
    assert bench.run(*CELLS, "--resume", "--seed", "1") == 0
    assert len(bench.loads) == 16


def test_another_ratio_is_another_cell_of_compression_only(bench):
    bench.run("--resume")
    bench.run("--resume", "--ratio", "0.5")
    assert bench.starts == ["stock", "tangram", "tangram"]


def test_no_cell_is_begun_that_could_not_end_in_time(bench):
    assert bench.run(*CELLS, "--time-limit-s", "100", "--window-s", "200") == drive.NOT_DONE
    assert bench.starts == [] and not bench.out.exists()


def test_a_search_is_made_of_cells_and_resumes(bench):
    search = ("--cells", "short/search:1", "--ttft-limit-s", "5", "--resume")
    bench.fail_at = 2
    with pytest.raises(KeyboardInterrupt):
        bench.run(*search)
    bench.fail_at = None
    bench.run(*search)
    assert len(bench.loads) == len(set(bench.loads))
    best = {line["side"]: line["rate_per_s"] for line in bench.lines() if "rate_per_s" in line}
    # The time to the first token is 4 and 2 s at one conversation a second, and grows with it.
    assert 5 / 4 / 1.2 <= best["stock"] <= 5 / 4
    assert 5 / 2 / 1.2 <= best["tangram"] <= 5 / 2


def test_options_of_compression_make_no_other_stock(bench):
    bench.run("--resume")
    bench.run("--resume", "--page-group-size", "2", "--scorer", "snap_kv", "--offload-gib", "8")
    assert bench.starts == ["stock", "tangram", "tangram"]


@pytest.mark.parametrize(
    "options",
    [
        ("--scorer", "snap_kv"),
        ("--chunk-size", "512"),
        ("--server-args=--enforce-eager",),
        ("--max-model-len", "4096"),
    ],
)
def test_another_server_has_cells_of_its_own(bench, options):
    cells = ("--sides", "tangram", "--cells", "short/closed:2", "--resume")
    bench.run(*cells)
    bench.run(*cells, *options)
    bench.run(*cells, *options)
    assert len(bench.loads) == 2


def test_shares_of_other_heads_make_another_server(bench, tmp_path):
    first, same, other = (tmp_path / name for name in ("a.npz", "b.npz", "c.npz"))
    for file, content in ((first, "1"), (same, "1"), (other, "2")):
        file.write_text(content)
    for given in ([], ["--retention", str(first)], ["--retention", str(same)]):
        bench.run("--resume", *given)
    assert bench.starts == ["stock", "tangram", "tangram"]
    bench.run("--resume", "--retention", str(other))
    assert bench.starts == ["stock", *["tangram"] * 3]


def test_a_line_cut_off_is_played_again(bench):
    cells = ("--sides", "stock", "--cells", "short/closed:2,short/closed:3", "--resume")
    bench.run(*cells)
    bench.out.write_text(bench.out.read_text()[:-20])
    bench.run(*cells)
    assert [level for _, _, level in bench.loads] == ["closed 2", "closed 3", "closed 3"]
    assert [line["level"] for line in bench.lines()] == ["closed 2", "closed 3"]
    assert report([str(bench.out)]) == 0


def test_a_search_without_enough_requests_ends_and_says_so(bench, monkeypatch, capsys):
    monkeypatch.setitem(bench.figures, "count", 5)
    assert bench.run("--sides", "stock", "--cells", "short/search:1") == 1
    assert "only 5 requests: make --window-s longer" in capsys.readouterr().err
    assert [line["what"] for line in bench.lines()] == ["cell"]


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--ratio", "1.5", "1.5: give a share above 0 and at most 1"),
        ("--ratio", "half", "half: give a share above 0 and at most 1"),
        ("--retention", "/nope", "/nope: there is no such file"),
        ("--out", "/nope/x.jsonl", "the file /nope/x.jsonl cannot be written: there is no folder"),
    ],
)
def test_a_bad_value_names_its_option(bench, capsys, option, value, said):
    with pytest.raises(SystemExit) as stop:
        bench.run(option, value)
    assert stop.value.code == 2 and bench.starts == []
    assert f"error: argument {option}: {said}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", [drive, soak, vllm_bench, simulate])
def test_a_model_that_is_not_there_is_told_in_one_line(command, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/command.py"])
    out = tmp_path / "out.jsonl"
    needed = ["--rate", "1"] if command is soak else []
    assert command.main(["--model", "/nope", "--out", str(out), *needed]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("command.py: error: /nope is neither a folder") and not out.exists()


def test_a_shape_that_there_is_not_is_not_looked_up_on_the_hub(bench, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.serving.sides.read_config", lambda name: pytest.fail(name))
    assert bench.run("--model", "qwen3-4c") == 2
    assert "there is no model qwen3-4c: give a shape (tiny, qwen3-4b, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ('{"what": "cell"', "line 1 of"),
        ("[1]", "is no JSON object"),
        ("7", "is no JSON object"),
    ],
)
def test_what_the_driver_did_not_write_is_told_by_the_report(tmp_path, capsys, text, said):
    file = tmp_path / "out.jsonl"
    if text is not None:
        file.write_text(text + "\n")
    assert report([str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and str(file) in line


def test_the_report_has_ratios_to_stock(bench, tmp_path):
    bench.run("--cells", "short/closed:2")
    table, plot = tmp_path / "table.md", tmp_path / "plot.svg"
    assert report([str(bench.out), "--table", str(table)]) == 0
    rows = [line.strip("| ").split(" | ") for line in table.read_text().splitlines()]
    assert rows[0][:4] == ["model", "workload", "level", "side"]
    stock, ours = rows[2], rows[3]
    assert stock[3] == "stock" and ours[3] == "tangram 0.25"
    first = rows[0].index("TTFT median, s")
    assert stock[first] == "8.00" and ours[first] == "4.00 (0.50x)"
    assert ours[rows[0].index("output tokens/s")] == "25 (2.00x)"
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    assert report([str(bench.out), "--table", str(table), "--plot", str(plot)]) == 0
    assert "tangram 0.25" in plot.read_text()


def test_the_report_tells_servers_of_one_side_by_what_they_were_given(bench, tmp_path):
    cells = ("--cells", "short/closed:2", "--resume", "--server-args")
    bench.run(*cells, "--max-num-seqs 8 --enforce-eager")
    bench.run(*cells, "--max-num-seqs 9 --enforce-eager", "--sides", "tangram")
    bench.run(*cells, "--max-num-seqs 9 --enforce-eager", "--sides", "tangram", "--chunk-size=128")
    table = tmp_path / "table.md"
    assert report([str(bench.out), "--table", str(table)]) == 0
    rows = [line.strip("| ").split(" | ") for line in table.read_text().splitlines()]
    assert [row[3] for row in rows[2:]] == [
        "stock",
        "tangram 0.25 --max-num-seqs 8",
        "tangram 0.25 --max-num-seqs 9",
        "tangram 0.25 --chunk-size 128 --max-num-seqs 9",
    ]


def test_the_report_shows_a_side_that_is_no_longer_offered(bench, tmp_path):
    bench.run("--cells", "short/closed:2")
    former = json.loads(bench.out.read_text().splitlines()[-1]) | {"side": "former"}
    bench.out.write_text(f"{json.dumps(former)}\n{bench.out.read_text()}")
    table = tmp_path / "table.md"
    assert report([str(bench.out), "--table", str(table)]) == 0
    rows = [line.strip("| ").split(" | ") for line in table.read_text().splitlines()]
    assert [row[3] for row in rows[2:]] == ["stock", "tangram 0.25", "former 0.25"]


@pytest.mark.parametrize(
    ("text", "level"),
    [("closed:24", Level("closed", 24)), ("open:0.5", Level("open", 0.5))],
)
def test_levels(text, level):
    assert drive.level_of(text) == level


@pytest.mark.parametrize("text", ["closed:1.5", "open:0", "open:-1", "full:3", "open", "open:nan"])
def test_levels_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="give closed:USERS"):
        drive.level_of(text)


@pytest.mark.parametrize("text", ["closed:2", "huge/closed:2", "/open:1"])
def test_cells_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="the workload one of short, mid"):
        drive.cell_of(text)


def options(*argv):
    return drive.parser().parse_args(["--out", "x", *argv])


@pytest.fixture
def sides(tmp_path):
    args = options("--model", "qwen3-4b")
    model = drive.find_model("qwen3-4b", tmp_path)
    return {name: make_side(name, model, args, tmp_path) for name in SIDES}


def test_what_sides_differ_in(sides):
    common = set(sides["stock"].arguments)
    further = {name: [a for a in s.arguments if a not in common] for name, s in sides.items()}
    assert further["fp8"] == ["--kv-cache-dtype", "fp8"]
    assert further["offload"] == ["--kv-offloading-size", "64"]
    assert further["stock-nocache"] == ["--no-enable-prefix-caching"]
    for name, side in sides.items():
        assert ("--enable-compression" in side.arguments) == (name in COMPRESSED)
        assert (side.plan is not None) == (name in COMPRESSED)


def test_the_ablation_takes_raggedness_away(sides):
    ragged, uniform = sides["tangram"].plan.geometry, sides["uniform"].plan.geometry
    unragged = sides["unragged"].plan.geometry
    assert len(set(map(tuple, ragged.head_groups.pages))) > 1
    assert len({n for layer in uniform.head_groups.pages for n in layer}) == 1
    assert uniform.sealed_block_bytes == ragged.sealed_block_bytes
    pages = {n for layer in unragged.head_groups.pages for n in layer}
    assert pages == {max(map(max, ragged.head_groups.pages))}
    assert unragged.sealed_block_bytes > 1.5 * ragged.sealed_block_bytes


METRICS = """\
vllm:kv_cache_usage_perc{engine="0"} 0.0
vllm:prefix_cache_queries_total{engine="0"} 0.0
vllm:prefix_cache_hits_total{engine="0"} 0.0
vllm:cache_config_info{block_size="BLOCK",num_gpu_blocks="341"} 1.0
"""


def server_that_says(log, block):
    metrics = METRICS.replace("BLOCK", str(block))
    return SimpleNamespace(log_text=lambda: log, get=lambda path: metrics, log="server.log")


def test_a_side_that_is_another_is_refused(sides):
    side = sides["tangram"]
    geometry = side.plan.geometry
    active = f"INFO KV cache compression: ratio 0.25, ... layout {geometry.digest}\n"
    block = geometry.recent_block_tokens
    found = check_side(server_that_says(active, block), side)
    assert found["cache_tokens"] == 340 * 256
    assert (found["scorer"], found["budgets"]) == ("key_diff", "perlayer")
    found = check_side(server_that_says("", 16), sides["stock"])
    assert found["cache_tokens"] == 340 * 16 and found["scorer"] is found["budgets"] is None
    for log, size, which in (
        ("", block, side),
        (active.replace(geometry.digest, "0123abcd"), block, side),
        (active, block + 1, side),
        (active, 16, sides["stock"]),
    ):
        with pytest.raises(ServerError, match="planned"):
            check_side(server_that_says(log, size), which)
