"""Tables of the docs hold the figures of the committed lines, to the digits that they print."""

import re
from itertools import zip_longest

from benchmarks.accuracy.testbed_report import report
from benchmarks.bars.__main__ import COMMITTED
from benchmarks.bars.figures import read_figures
from benchmarks.bars.table import BATCHES
from benchmarks.serving.report import read_lines
from benchmarks.serving.sides import ROOT

SCORERS = {
    "StreamingLLM": "streaming_llm",
    "key norm": "key_norm",
    "KeyDiff": "key_diff",
    "TOVA": "tova",
    "SnapKV": "snap_kv",
    "ExpectedAttention": "expected_attention",
}
WORKLOADS = {
    "long, more than stock's cache holds": "long",
    "agent, more than stock's cache holds": "agent",
    "mid, more than stock's cache holds": "mid",
    "mid, conversations/s that are sustained": "mid, search 0.3",
    "... at stock's rate": "mid, open stock",
    "short, more than stock's cache holds": "short",
    "short, stock's cache holds it easily": "short",
    "short, 0.9 conversations/s": "short, open 0.9",
}
SERVED = {
    "requests/s": ["requests/s"],
    "first token, median and p95, s": ["first token, median", "first token, p95"],
    "time per token, median, ms": ["time per token, median"],
    "": ["sustained rate"],
}


def tables(doc, heading):
    """The tables below a heading, rows of cells each without the head."""
    text = (ROOT / "docs" / doc).read_text().split(f"# {heading}\n", 1)[1]
    text = re.split(r"^#", text, maxsplit=1, flags=re.MULTILINE)[0]
    found = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    return [
        [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]
        for table in found
    ]


def agrees(value, printed):
    """Whether a figure is printed so."""
    printed = printed.strip("* ").replace(",", "")
    digits = len(printed.partition(".")[2])
    return f"{value:.{digits}f}" == printed


def assert_row(row, values):
    for printed, value in zip_longest(row, values):
        assert agrees(value, printed), f"{value} is printed as {printed} in {row}"


def lines(file):
    return read_lines(COMMITTED / file)


def test_digits_are_those_that_are_printed():
    assert agrees(2514.6, "2,515") and agrees(1.0996, "**1.10**") and agrees(0.0022, "0.002")
    assert not agrees(1.0944, "1.10") and not agrees(2514.4, "2,515")


def test_decode():
    (rows,) = tables("performance.md", "Decode attention")
    measured = {line["load"]: line for line in lines("decode.jsonl")}
    fields = ("tb_per_s", "over_fa3_equal_heads", "over_fa3_ragged", "over_ceiling")
    assert len(rows) == len(BATCHES)
    for row, batch in zip(rows, BATCHES, strict=True):
        line = measured[batch]
        assert row[0].split()[0] in (str(line["requests"]), batch.split("x")[0])
        assert_row(row[1:], [line["bytes_per_layer"] / 1e6, *(line[field] for field in fields)])


def test_real_weights():
    (rows,) = tables("accuracy.md", "Real weights")
    text = report(lines("testbed.jsonl"))
    assert len(rows) == 3
    for ratio, percent, interval in rows:
        assert f"| {ratio} | {percent} ({interval}) |" in text


def test_prefill():
    (rows,) = tables("performance.md", "Prefill attention")
    measured = [line for line in lines("prefill.jsonl") if "start" in line]
    by_chunk = [[line for line in measured if line["chunk_size_tokens"] == c] for c in (256, 2048)]
    fields = ("triton_ms", "with_fa3_ms", "full_fa3_ms")
    for row, *of_step in zip(rows[:-1], *by_chunk, strict=True):
        assert_row(row[1:], [line[field] for line in of_step for field in fields])
    ratios = ("triton_over_full_fa3", "with_fa3_over_full_fa3")
    printed = [cell for cell in rows[-1][1:] if cell]
    assert_row(printed, [of_chunk[-1][field] for of_chunk in by_chunk for field in ratios])


def test_sealing():
    (rows,) = tables("performance.md", "Sealing")
    measured = lines("seal.jsonl")
    assert [row[0] for row in rows] == list(SCORERS)
    for title, *row in rows:
        of_scorer = [line for line in measured if line.get("scorer") == SCORERS[title]]
        launches = {
            line["due"]: line["us"]
            for line in of_scorer
            if line["what"] == "seal, one launch for all layers"
        }
        (mean,) = (line["us"] for line in of_scorer if line["what"] == "mean step")
        assert_row(row, [launches[0], launches[1], launches[64], mean])


def test_launches():
    (rows,) = tables("performance.md", "What launches cost")
    fields = ("host_us", "triton_host_us", "in_graph_us")
    for (_, *row), line in zip(rows, lines("launch.jsonl"), strict=True):
        assert_row(row, [line[field] for field in fields])


def test_the_engine():
    (rows,) = tables("performance.md", "The engine")
    sides = {(line["side"], line["key"]): line for line in lines("engine.jsonl") if "key" in line}

    def both(key, field):
        found = [sides[side, key][field] for side in ("stock", "tangram")]
        return [each[0]["output_tokens_per_s"] for each in found] if field == "turns" else found

    found = read_figures(COMMITTED, "engine.jsonl")
    fields = {
        "capacity": "tokens", "first_token": "median_s", "decode 4 x 32768": "step_ms",
        "decode 16 x 32768": "step_ms", "decode 64 x 8192": "step_ms", "throughput": "turns",
    }  # fmt: skip
    requests = both("capacity", "requests")
    assert_row(rows.pop(1)[1:], [*requests, requests[1] / requests[0]])
    for (_, *row), (key, field) in zip(rows, fields.items(), strict=True):
        assert_row(row, [*both(key, field), found[f"{key}, over stock"].value])


def test_next_turns():
    (rows,) = tables("performance.md", "A next turn, and one long conversation among short ones")
    found = [line for line in lines("engine.jsonl") if "median_ms" in line]
    times = {(line["side"], line["cached"], line["decodes"]): line["median_ms"] for line in found}
    ratios, cached = read_figures(COMMITTED, "engine.jsonl"), 0
    for history, stock, ours, ratio in rows:
        length, decodes = history.rsplit(",", 1)
        cached = cached if length == "..." else int(length.removesuffix(" tokens").replace(",", ""))
        sides = [times.get((side, cached, int(decodes))) for side in ("stock", "stock-full")]
        printed = stock.replace("(", "").replace(")", "").split()
        assert_row(printed, [time for time in sides if time is not None])
        of = f"follow-up {cached} beside {int(decodes)}"
        assert_row([ours, ratio], [times["tangram", cached, int(decodes)],
                                   ratios[f"{of}, over stock"].value])  # fmt: skip
    assert len(rows) == 6


def test_serving():
    (results,) = tables("serving-benchmarks.md", "Results")
    found = read_figures(COMMITTED, "serving.jsonl")
    workload = model = users = ""
    checked = 0
    for row in results:
        workload = WORKLOADS[row[0]] if row[0] else workload
        model, users = row[1].lower() or model, row[2] or users
        load = f"{model}, {workload}" + ("" if "," in workload else f", closed {users}")
        names = SERVED[row[3]]
        assert_row(row[6].split(", "), [found[f"{load}, {name}"].value for name in names])
        checked += len(names)
    assert checked == 4 * 8 + 1 + 3 + 3
