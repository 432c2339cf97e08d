"""Draws what benchmarks measured, from their JSON lines.

    python -m benchmarks.plot FILE.jsonl ... --out plot.svg

Lines that compare with stock (`bench_engine.py`) become bars over 1.00; lines of `bench_decode.py`
become bars of its bytes a second over FlashAttention 3's. Needs the extra `plots`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.engine.bench_engine import compare

ENGINE_FIELDS = {
    "tokens_over_stock": "KV capacity (higher is better)",
    "median_s_over_stock": "time to first token (lower is better)",
    "step_ms_over_stock": "decode step (lower is better)",
    "output_over_stock_turn_0": "output tokens/s (higher is better)",
}
KERNEL_FIELDS = {
    "over_fa3_uniform": "decode kernel over FA3, uniform lengths",
    "over_fa3_ragged": "decode kernel over FA3, ragged lengths",
}


def bars(lines: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Title of a panel -> label -> ratio; of several lines about the same the last counts."""
    sides: dict[str, list[dict[str, Any]]] = {"stock": [], "tangram": []}
    for line in lines:
        if line.get("side") in sides and "key" in line:
            sides[line["side"]].append(line)
    found = [(line["compare"], line) for line in compare(sides)]
    found += [
        (f"{line['model']}, {line['budgets']}, {line['batch']} x {line['context']}", line)
        for line in lines
        if "over_fa3_uniform" in line
    ]
    panels: dict[str, dict[str, float]] = {}
    for label, line in found:
        for field, title in (ENGINE_FIELDS | KERNEL_FIELDS).items():
            if field in line:
                panels.setdefault(title, {})[label] = line[field]
    return panels


def draw(
    panels: dict[str, dict[str, float]],
    path: Path,
    pale: Callable[[str], bool] = lambda label: False,
) -> None:
    """One panel below the other; a line marks stock.

    Args:
        panels: title -> label -> ratio to stock.
        path: of the picture.
        pale: tells of a label whether its bar is one of those to compare with.
    """
    # Text stays text, and the same lines give the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "tangram"})
    rows = sum(map(len, panels.values())) + 2 * len(panels)
    figure = Figure(figsize=(8, 0.32 * rows + 0.4), layout="constrained")
    heights = [len(values) + 1 for values in panels.values()]
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axis, (title, values) in zip(axes[:, 0], panels.items(), strict=True):
        colours = ["#bbbbbb" if pale(label) else "#4477aa" for label in values]
        drawn = axis.barh(list(values), list(values.values()), color=colours)
        axis.bar_label(drawn, fmt="%.2f", padding=3)
        axis.axvline(1, color="black", linewidth=0.8, linestyle="--")
        axis.set_xlim(0, 1.15 * max(1, *values.values()))
        axis.invert_yaxis()
        axis.set_title(title, loc="left", fontsize="medium")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    lines = [json.loads(line) for file in args.files for line in file.read_text().splitlines()]
    panels = bars(lines)
    if not panels:
        parser.error("no line of these files holds a comparison")
    draw(panels, args.out)


if __name__ == "__main__":
    main()
