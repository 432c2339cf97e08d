"""Tables of the ceiling's lines: percent of full KV's answers, and to what the rest is lost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from benchmarks.accuracy.paired import Share, paired_share, shown
from tangram.evaluate.results import Cell

ORACLE = "oracle"
Row = tuple[Any, ...]
Found = dict[tuple[str, str], Share | None]
"""By ranking and budgets."""


def line(cell: Cell) -> str:
    """A cell in a few words."""
    scores = [score for talk in cell["scores"] for score in talk]
    setting = "full KV"
    if cell["ranking"] is not None:
        setting = f"{cell['ranking']}, {cell['budgets']}, {cell['ratio']:g}, C {cell['chunk_size']}"
    return (
        f"{cell['task']}, {cell['context_tokens']:,} tokens, seed {cell['seed']}: {setting}: "
        f"{sum(scores):.4g} of {len(scores)}, {cell['seconds']:.0f} s"
    )


def shares(cells: Sequence[Cell]) -> dict[Row, Found]:
    """By (model, task, tokens, judge, how the context is computed, ratio, C); seeds pooled."""
    full = {_pair(cell): cell["scores"] for cell in cells if cell["ranking"] is None}
    sums: dict[Row, dict[tuple[str, str], list]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        if cell["ranking"] is not None and _pair(cell) in full:
            row = (
                cell["model"], cell["task"], cell["context_tokens"], cell["judge"],
                cell["context"], -cell["ratio"], cell["chunk_size"],
            )  # fmt: skip
            sums[row][cell["ranking"], cell["budgets"]] += zip(
                map(sum, cell["scores"]), map(sum, full[_pair(cell)]), strict=True
            )
    return {
        row: {side: paired_share(*zip(*pairs, strict=True)) for side, pairs in found.items()}
        for row, found in sorted(sums.items())
    }


def report(cells: Sequence[Cell]) -> str:
    """Both tables, and what full KV answers, for every model and judge."""
    rows = shares(cells)
    parts = [_full(cells)]
    for about in dict.fromkeys(row[:5] for row in rows):
        model, task, context, judge, computed = about
        found = {row[5:]: sides for row, sides in rows.items() if row[:5] == about}
        title = f"{model}: {task}, {context:,} tokens, {judge}, context {computed}"
        parts += [title, _percents(found), "Points of full KV's answers lost:", _lost(found)]
    return "\n\n".join(part for part in parts if part)


def _full(cells: Sequence[Cell]) -> str:
    """What full KV answers."""
    pooled: dict[Row, list[float]] = defaultdict(list)
    for cell in cells:
        if cell["ranking"] is None:
            row = (cell["model"], cell["task"], cell["context_tokens"], cell["judge"])
            pooled[row] += [score for talk in cell["scores"] for score in talk]
    return "\n".join(
        f"{model}: {task}, {context:,} tokens, {judge}: full KV {sum(scores):.4g} of {len(scores)}"
        for (model, task, context, judge), scores in sorted(pooled.items())
    )


def _percents(found: dict[Row, Found]) -> str:
    sides = sorted({side for each in found.values() for side in each}, key=_order)
    lines = [
        f"| ratio | C | {' | '.join(f'{ranking}, {budgets}' for ranking, budgets in sides)} |",
        "| --- " * (2 + len(sides)) + "|",
    ]
    for (ratio, chunk), each in found.items():
        cells = [shown(each[side]) if side in each else "" for side in sides]
        lines.append(f"| {-ratio:g} | {chunk} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _lost(found: dict[Row, Found]) -> str:
    """Differences of two cells that differ in one thing."""
    pairs: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {
        "quota per chunk: oracle, free - own": ((ORACLE, "free"), (ORACLE, "own")),
        "budgets: oracle, own - static": ((ORACLE, "own"), (ORACLE, "static")),
        "budgets: oracle, own - uniform": ((ORACLE, "own"), (ORACLE, "uniform")),
    }
    sides = {side for each in found.values() for side in each}
    for ranking, budgets in sorted(sides, key=_order):
        if ranking != ORACLE:
            name = f"scorer: oracle - {ranking}, {budgets}"
            pairs[name] = ((ORACLE, budgets), (ranking, budgets))
    pairs = {name: pair for name, pair in pairs.items() if sides.issuperset(pair)}
    rows = []
    for (ratio, chunk), each in found.items():
        cells = [_points(each.get(more), each.get(less)) for more, less in pairs.values()]
        rows.append(f"| {-ratio:g} | {chunk} | {' | '.join(cells)} |")
    head = [f"| ratio | C | {' | '.join(pairs)} |", "| --- " * (2 + len(pairs)) + "|"]
    return "\n".join([*head, *rows])


def _points(more: Share | None, less: Share | None) -> str:
    return "" if more is None or less is None else f"{100 * (more.share - less.share):+.1f}"


def _order(side: tuple[str, str]) -> Row:
    return side[0] != ORACLE, side


def _pair(cell: Cell) -> Row:
    """What a cell and full KV's have in common."""
    return cell["sha256"], cell["dtype"], cell["judge"], cell["script"]
