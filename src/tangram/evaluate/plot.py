"""Accuracy over ratio, drawn from cells: one panel a task, context and scorer.

Cells of several models, dtypes or seeds, as a file that was added to has them, have panels apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tangram.errors import ConfigurationError
from tangram.evaluate.results import Cell, scorer_of

COLUMNS = 4
FULL = "full KV"
PANEL_INCHES = (3.4, 2.8)
LEGEND_INCHES = 2.0
STYLES = ("-", ":", "-.", "--")
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Okabe and Ito (2008): told apart by those who see no red or no green; in grey by `MARKERS`."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_ORIGIN = ("model", "dtype", "seed")
_GEOMETRY = {"chunk_size": "C", "window_size": "W", "sink_tokens": "S", "page_group_size": "H_p"}


class _Panel(NamedTuple):
    """What a panel is about; `origin` are the model, dtype and seed, as far as cells differ."""

    task: str
    context_tokens: int
    origin: tuple[str, ...]
    scorer: str


def require_plots(path: Path) -> None:
    """Return only if a plot can be written to such a file.

    Raises:
        ConfigurationError: matplotlib is missing, or does not write files of that ending.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ConfigurationError(
            "--plot needs matplotlib, which is not installed: pip install 'tangram-kv[plots]', or "
            "leave --plot out and draw later with --plot-only"
        ) from error
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ConfigurationError(
            f"--plot {path} cannot be written: its ending decides the format; give one of "
            f"{', '.join(f'.{name}' for name in sorted(known))}"
        )


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Write a plot of cells; the same cells give the same file.

    Several scorers stand beside each other, with a row for each task and context. Every panel has
    a line for each level with its 95 % intervals (a colour and a marker for each level, a style of
    line for each size, where several were tried), and the accuracy of full KV as a black one.
    Ratios are on a logarithmic axis: halving one costs the same width everywhere.

    Args:
        cells: with those of full KV.
        path: its ending decides the format.

    Raises:
        ConfigurationError: no cells, no matplotlib, or a file that cannot be written.
    """
    require_plots(path)
    if not cells:
        raise ConfigurationError("there is nothing to draw: the file has no cells")
    import matplotlib
    from matplotlib.figure import Figure

    varied = [name for name in _ORIGIN if len({cell.get(name) for cell in cells}) > 1]
    full: dict[_Panel, float] = {}
    panels: dict[_Panel, list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell["scorer"] is None:
            full[_panel(cell, varied)] = cell["accuracy"]
        else:
            panels[_panel(cell, varied)].append(cell)
    panels = panels or {panel: [] for panel in full}
    rows, columns, places = _layout(panels)
    size = (PANEL_INCHES[0] * columns + LEGEND_INCHES, PANEL_INCHES[1] * rows)
    compressed = [cell for cell in cells if cell["scorer"] is not None]
    levels = sorted({str(cell["level"]) for cell in compressed})
    least = min((cell["ratio"] for cell in compressed), default=0.5)
    sizes = sorted({_size(cell, compressed) for cell in compressed})
    with matplotlib.rc_context({"svg.hashsalt": "tangram", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        shown: dict[str, Any] = {}
        for panel, place in places.items():
            axis, baseline = axes[place], full.get(panel._replace(scorer=""))
            if baseline is not None:
                shown[FULL] = axis.axhline(baseline, color="black", linewidth=0.8)
            for cell_line, points in _lines(panels[panel], compressed).items():
                level, of_size = cell_line
                label = f"{level}, {of_size}" if of_size else level
                style = STYLES[sizes.index(of_size) % len(STYLES)]
                shown[label] = _draw_line(axis, points, levels.index(level), style)
            _name(axis, panel, least)
        for place in set(range(len(axes))) - set(places.values()):
            axes[place].axis("off")
        shown = {label: shown[label] for label in sorted(shown, key=lambda s: (s != FULL, s))}
        figure.legend(shown.values(), shown, loc="outside right upper", fontsize=8)
        try:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(path, metadata=metadata)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"--plot {path} cannot be written: {error}") from error


def _panel(cell: Cell, varied: Sequence[str]) -> _Panel:
    """The cell's panel; that of full KV has no scorer."""
    origin = tuple(
        f"seed {cell.get(name)}" if name == "seed" else str(cell.get(name)) for name in varied
    )
    return _Panel(cell["task"], cell["context_tokens"], origin, scorer_of(cell))


def _layout(panels: Iterable[_Panel]) -> tuple[int, int, dict[_Panel, int]]:
    """(rows, columns, place of every panel by rows).

    A column for each scorer where there are several, else as many as fit a page.
    """
    ordered = sorted(panels)
    scorers = sorted({panel.scorer for panel in ordered})
    if len(scorers) == 1:
        columns = min(COLUMNS, len(ordered))
        return -(-len(ordered) // columns), columns, {p: i for i, p in enumerate(ordered)}
    lines = list(dict.fromkeys(panel[:-1] for panel in ordered))
    return (
        len(lines),
        len(scorers),
        {
            panel: lines.index(panel[:-1]) * len(scorers) + scorers.index(panel.scorer)
            for panel in ordered
        },
    )


def _lines(cells: Sequence[Cell], all_cells: Sequence[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """(level, size) -> its cells by ratio."""
    lines: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in sorted(cells, key=lambda cell: cell["ratio"]):
        lines[str(cell["level"]), _size(cell, all_cells)].append(cell)
    return dict(sorted(lines.items()))


def _draw_line(axis: Any, points: Sequence[Cell], level: int, style: str) -> Any:
    accuracy = [cell["accuracy"] for cell in points]
    below = [max(0.0, cell["accuracy"] - cell["interval_95"][0]) for cell in points]
    above = [max(0.0, cell["interval_95"][1] - cell["accuracy"]) for cell in points]
    return axis.errorbar(
        [cell["ratio"] for cell in points],
        accuracy,
        yerr=[below, above],
        marker=MARKERS[level % len(MARKERS)],
        markersize=4,
        capsize=2,
        color=COLOURS[level % len(COLOURS)],
        linestyle=style,
    )


def _name(axis: Any, panel: _Panel, least_ratio: float) -> None:
    title = f"{Path(panel.task).name}, {panel.context_tokens:,} tokens"
    heading = [panel.scorer, ", ".join(panel.origin), title]
    axis.set_title("\n".join(part for part in heading if part), fontsize=9)
    axis.set_xlabel("share of the rows that is kept")
    axis.set_ylabel("accuracy")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}")
    axis.set_xlim(least_ratio / 1.1, 1.1)
    axis.set_ylim(-0.02, 1.02)
    axis.grid(alpha=0.3)


def _size(cell: Cell, cells: Sequence[Cell]) -> str:
    """The cell's sizes that differ among all cells, in words."""
    return ", ".join(
        f"{symbol} = {cell.get(name)}"
        for name, symbol in _GEOMETRY.items()
        if len({other.get(name) for other in cells}) > 1
    )
