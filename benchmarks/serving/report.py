"""Serving benchmarks as a table, and a plot of ratios to stock vLLM, from their JSON lines.

    python -m benchmarks.serving.report serving.jsonl ... --table serving.md --plot serving.svg

Of several lines about the same cell the last counts. The plot needs the extra `plots`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving.mistakes import tells_mistakes
from benchmarks.serving.sides import SIDES, server_options
from tangram.errors import ConfigurationError
from tangram.plan.options import flag

STOCK = "stock"
SERVER = "server_told"


@dataclass(frozen=True)
class Column:
    """A figure of a cell.

    Attributes:
        title: of the column.
        path: keys that lead to the figure in a line.
        digits: after the point.
        compared: whether the ratio to stock stands beside it.
        plotted: how the plot calls that ratio; empty for none.
    """

    title: str
    path: tuple[str, ...]
    digits: int = 2
    compared: bool = False
    plotted: str = ""

    def of(self, line: dict[str, Any]) -> float | None:
        """The figure; None where the line has none."""
        value: Any = line
        for key in self.path:
            value = value.get(key) if isinstance(value, dict) else None
        return value


COLUMNS = (
    Column("requests/s", ("requests_per_s",), 3, True, "requests/s (higher is better)"),
    Column("output tokens/s", ("output_tokens_per_s",), 0, True),
    Column(
        "TTFT median, s", ("ttft_s", "p50"), 2, True,
        "time to first token, median (lower is better)",
    ),
    Column("p95", ("ttft_s", "p95"), 2, True, "time to first token, p95 (lower is better)"),
    Column("p99", ("ttft_s", "p99"), 2),
    Column(
        "time per token median, s", ("token_time_s", "p50"), 4, True,
        "time per token, median (lower is better)",
    ),
    Column("gap p99, s", ("gap_s", "p99"), 3),
    Column("cached share", ("cached_share",), 2),
    Column("preemptions", ("counters", "preemptions"), 0),
    Column("KV peak", ("usage_peak",), 2),
)  # fmt: skip
RATE = Column(
    "sustained conversations/s", ("rate_per_s",), 3, True, "sustained rate (higher is better)"
)


def newest(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cells and sustained rates in order, the last line of each.

    Where one side had several servers, `SERVER` tells by which arguments they differ.
    """
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for line in lines:
        if line.get("what") in ("cell", "sustainable"):
            servers = found.setdefault((*_place(line), line["side"], line["ratio"]), {})
            servers[" ".join(_arguments(line))] = line
    for servers in found.values():
        shared = set.intersection(*(set(_arguments(line)) for line in servers.values()))
        for line in servers.values():
            line[SERVER] = " ".join(word for word in _arguments(line) if word not in shared)
    return [line for servers in found.values() for line in servers.values()]


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown; behind each figure its ratio to the same cell of stock."""
    stock = {_place(line): line for line in lines if line["side"] == STOCK}
    parts = []
    for what, columns in (("cell", COLUMNS), ("sustainable", (RATE,))):
        chosen = sorted((line for line in lines if line["what"] == what), key=_order)
        if not chosen:
            continue
        head = ["model", "workload", "level", "side", *(c.title for c in columns), "not answered"]
        rows = [head, ["---"] * len(head)]
        for line in chosen:
            base = stock.get(_place(line))
            figures = [_figure(column, line, base) for column in columns]
            rows.append([*_names(line), *figures, _unanswered(line)])
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join(parts) + "\n"


def ratios(lines: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Title of a panel -> label -> ratio to stock, for `benchmarks.plot.draw`."""
    stock = {_place(line): line for line in lines if line["side"] == STOCK}
    panels: dict[str, dict[str, float]] = {}
    for line in sorted(lines, key=_order):
        base = stock.get(_place(line))
        if base is None or base is line:
            continue
        for column in (*COLUMNS, RATE):
            ours, theirs = column.of(line), column.of(base)
            if column.plotted and ours is not None and theirs:
                model, workload, level, side = _names(line)
                label = f"{model}, {workload}, {level}: {side}".replace(" --", "\n--")
                panels.setdefault(column.plotted, {})[label] = ours / theirs
    return panels


def _place(line: dict[str, Any]) -> tuple[str, ...]:
    """What a cell has in common with stock's."""
    names = ("what", "model", "workload", "factor", "api", "level", "phases", "seed")
    return tuple(json.dumps(line.get(name)) for name in names)


def _order(line: dict[str, Any]) -> tuple[Any, ...]:
    """Sides as `SIDES` has them; those that are no longer offered come last."""
    sides = list(SIDES)
    side = sides.index(line["side"]) if line["side"] in sides else len(sides)
    return (*_place(line), side, line["ratio"] or 0)


def _names(line: dict[str, Any]) -> list[str]:
    ratio = "" if line["ratio"] is None else f"{line['ratio']:g}"
    side = " ".join(filter(None, (line["side"], ratio, line.get(SERVER))))
    workload = line["workload"] if line["factor"] == 1 else f"{line['workload']} x {line['factor']}"
    return [line["model"], workload, line["level"], side]


def _arguments(line: dict[str, Any]) -> list[str]:
    """Options of the line's server as they are given, a flag with its value each."""
    found = []
    for name, value in server_options(line["side"], line.get("options") or {}).items():
        if name == "server_args":
            found += [f"--{text.strip()}" for text in f" {value}".split(" --")[1:]]
        elif value is not None:
            found.append(f"{flag(name)} {value}")
    return found


def _figure(column: Column, line: dict[str, Any], base: dict[str, Any] | None) -> str:
    value = column.of(line)
    if value is None:
        return "-"
    text = f"{value:,.{column.digits}f}"
    theirs = column.of(base) if base is not None and base is not line else None
    return f"{text} ({value / theirs:.2f}x)" if column.compared and theirs else text


def _unanswered(line: dict[str, Any]) -> str:
    outcomes = line.get("outcomes", {})
    bad = {name: n for name, n in outcomes.items() if name != "done"}
    if late := line.get("ttft_s_at_least", 0):
        bad["without a first token"] = late
    return ", ".join(f"{n} {name}" for name, n in bad.items()) or "-"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that a benchmark wrote.

    Raises:
        ConfigurationError: it cannot be read, or a line is no JSON object.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{path} cannot be read ({error}): give files that a benchmark wrote with --out"
        ) from error
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            found.append(dict(json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"line {number} of {path} is no JSON object ({error}): take it out, or give files "
                "that a benchmark wrote with --out"
            ) from error
    return found


@tells_mistakes
def main(argv: list[str] | None = None) -> int:
    """Write the table and the plot."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("files", type=Path, nargs="+")
    made.add_argument("--table", type=Path, help="printed without")
    made.add_argument("--plot", type=Path)
    args = made.parse_args(argv)
    lines = newest(line for file in args.files for line in read_lines(file))
    if not lines:
        made.error("no line of these files holds a cell")
    text = table(lines)
    if args.table:
        args.table.write_text(text)
    else:
        print(text)
    if args.plot:
        from benchmarks.plot import draw

        panels = ratios(lines)
        if not panels:
            made.error(f"--plot: no cell stands beside one of {STOCK}")
        draw(panels, args.plot, pale=lambda label: ": tangram " not in label)
    return 0


if __name__ == "__main__":
    sys.exit(main())
