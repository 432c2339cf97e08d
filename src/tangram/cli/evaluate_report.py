"""The tables of an evaluation."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from tangram.evaluate.results import Cell, scorer_of

_GEOMETRY = {"chunk_size": "C", "window_size": "W", "sink_tokens": "S", "page_group_size": "H_p"}
_FIGURES = ("right", "% right", "95 %", "% of full", "B/token", "% hits", "s")


_WIDTH_ELSEWHERE = 1000


def report_console() -> Console:
    """Where tables go: as wide as a terminal or `COLUMNS` says, else as wide as they need to be."""
    console = Console()
    told = console.is_terminal or "COLUMNS" in os.environ
    return console if told else Console(width=_WIDTH_ELSEWHERE)


def print_tables(cells: Sequence[Cell], console: Console) -> None:
    """One table a task and context, one row a cell, full KV first.

    Of C, W, S and H_p those that differ between cells have a column each, and the others stand
    below the last table.
    """
    values = {
        name: {cell[name] for cell in cells if cell["scorer"] is not None} for name in _GEOMETRY
    }
    varied = [name for name, found in values.items() if len(found) > 1]
    fixed = [f"{_GEOMETRY[n]} = {found.pop()}" for n, found in values.items() if len(found) == 1]
    for panel in dict.fromkeys(map(_panel, cells)):
        table = Table(title=panel, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
        for column in ("scorer", "level"):
            table.add_column(column, overflow="fold")
        for column in ("ratio", *(_GEOMETRY[name] for name in varied), *_FIGURES):
            table.add_column(column, justify="right", no_wrap=True)
        for cell in cells:
            if _panel(cell) == panel:
                table.add_row(*_row(cell, varied))
        console.print(table)
    console.print(", ".join(fixed), highlight=False)


def _panel(cell: Cell) -> str:
    return f"{cell['task']}, {cell['context_tokens']:,} tokens"


def _row(cell: Cell, varied: Sequence[str]) -> list[str]:
    full = cell["full_accuracy"]
    low, high = cell["interval_95"]
    return [
        scorer_of(cell) or "full KV",
        cell["level"] or "",
        f"{cell['ratio']:g}",
        *("" if cell[name] is None else str(cell[name]) for name in varied),
        f"{cell['right']:.4g}/{cell['questions']}",
        f"{100 * cell['accuracy']:.1f}",
        f"{100 * low:.0f}-{100 * high:.0f}",
        f"{100 * cell['accuracy'] / full:.1f}" if full else "",
        f"{cell['kv_bytes_per_token']:,.0f}",
        f"{100 * cell['prefix_cache_hit_share']:.1f}",
        f"{cell['seconds']:.1f}",
    ]
