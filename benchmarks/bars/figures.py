"""The figures that benchmarks' lines hold, by the names that bars have.

Of several lines about the same figure the last counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving import report

Lines = list[dict[str, Any]]
MODEL, BUDGETS = "qwen3-4b", "snapkv/perlayer"
RATIO = 0.25
PREFILL_SIDES = {"with_fa3": "with FA3", "triton": "Triton"}
LAUNCH_TIMES = {"host_us": "host, us", "in_graph_us": "device, us"}
ENGINE_SIDES = {"tangram": "over stock", "absent": "without the flags"}
ENGINE_FIELDS = (
    "tokens_over_stock", "median_s_over_stock", "median_ms_over_stock", "step_ms_over_stock",
    "output_over_stock_turn_0",
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A value, and by which share of it replays in the same run differed; 0 where none are told."""

    value: float
    spread: float = 0.0


Named = Iterator[tuple[str, Figure]]


def read_figures(folder: Path, file: str) -> dict[str, Figure]:
    """The figures in a file of a folder of results, by name; none where it is not there.

    Raises:
        ConfigurationError: it cannot be read, or a line is no JSON object.
    """
    path = folder / file
    return dict(READERS[file](report.read_lines(path))) if path.exists() else {}


def _decode(lines: Lines) -> Named:
    for line in lines:
        if (line.get("model"), line.get("budgets")) == (MODEL, BUDGETS) and "over_ceiling" in line:
            spread = (line["max_ms"] - line["min_ms"]) / line["median_ms"]
            yield f"{line['load']}, over a plain read", Figure(line["over_ceiling"], spread)
            if "over_fa3_equal_heads" in line:
                yield f"{line['load']}, over FA3", Figure(line["over_fa3_equal_heads"], spread)


def _prefill(lines: Lines) -> Named:
    for line in lines:
        for side, name in PREFILL_SIDES.items():
            if f"{side}_over_full_fa3" in line:
                figure = Figure(line[f"{side}_over_full_fa3"])
                yield f"C = {line['chunk_size_tokens']}, {name}, over full KV", figure


def _seal(lines: Lines) -> Named:
    for line in lines:
        if line.get("what") == "mean step":
            yield f"{line['scorer']}, mean step, us", Figure(line["us"])


def _launch(lines: Lines) -> Named:
    for line in lines:
        for field, name in LAUNCH_TIMES.items():
            if "call" in line and field in line:
                yield f"{line['call']}, {name}", Figure(line[field])


def _check(lines: Lines) -> Named:
    for line in lines:
        for field in ("right", "equal"):
            if "check" in line and field in line:
                yield f"{line['check']}, {field}", Figure(line[field])


def _engine(lines: Lines) -> Named:
    spreads: dict[tuple[str, str], float] = {}
    for line in lines:
        side = line.get("side", "")
        if "steps_ms" in line:
            steps = line["steps_ms"]
            spreads[side, line["key"]] = (max(steps) - min(steps)) / line["step_ms"]
        if line.get("model") == MODEL and "compare" in line and side in ENGINE_SIDES:
            of = line["compare"]
            spread = sum(spreads.get((each, of), 0.0) for each in (side, "stock"))
            for field in ENGINE_FIELDS:
                if field in line:
                    yield f"{of}, {ENGINE_SIDES[side]}", Figure(line[field], spread)


def _serving(lines: Lines) -> Named:
    """Ratios to stock. Stock's sustained rate is `open stock`, whatever it is."""
    kept = report.newest(lines)
    rates = {
        f"{line['model']}, {line['workload']}": f"open {line['rate_per_s']:g}"
        for line in kept
        if line["what"] == "sustainable" and line["side"] == report.STOCK and line["rate_per_s"]
    }
    side = f": tangram {RATIO:g}"
    for panel, found in report.ratios(kept).items():
        title = panel.partition(" (")[0].replace("time to first", "first")
        for label, ratio in found.items():
            place, is_ours, more = label.partition(side)
            if not is_ours or more:
                continue  # another side, or a server of other arguments
            yield f"{place}, {title}", Figure(ratio)
            load, _, level = place.rpartition(", ")
            if level == rates.get(load):
                yield f"{load}, open stock, {title}", Figure(ratio)


READERS: dict[str, Callable[[Lines], Named]] = {
    "decode.jsonl": _decode,
    "prefill.jsonl": _prefill,
    "seal.jsonl": _seal,
    "launch.jsonl": _launch,
    "check.jsonl": _check,
    "engine.jsonl": _engine,
    "serving.jsonl": _serving,
}
