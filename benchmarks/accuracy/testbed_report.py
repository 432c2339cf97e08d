"""Tables of the test bed's lines.

    python -m benchmarks.accuracy.testbed_report FILE.jsonl ... [--by-kind]

Percent of full KV's answers: answers right over those right with full KV, of the same questions,
seeds pooled, with a paired bootstrap interval over conversations. Of a cell that is there twice
the last counts.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.paired import Share, mean_interval, paired_share, shown
from tangram.evaluate.results import Cell, read_cells, scorer_of

Row = tuple[Any, ...]
ALL_KINDS = ""


def newest(cells: Iterable[Cell]) -> list[Cell]:
    """Of cells that show the same under the same name the last, as after a new calibration."""
    found: dict[Row, Cell] = {}
    for cell in cells:
        texts = cell.get("script") or tuple(text["sha256"] for text in cell["texts"])
        key = (
            cell["sha256"], cell["dtype"], cell["part"], texts, scorer_of(cell), cell["chunk_size"],
            cell["window_size"], cell["page_group_size"], cell["ratio"], cell["label"],
        )  # fmt: skip
        found.pop(key, None)
        found[key] = cell
    return list(found.values())


def report(cells: Sequence[Cell], by_kind: bool = False) -> str:
    """Tables in Markdown, of every model that the cells are of.

    Args:
        cells: lines of `benchmarks.accuracy.testbed`.
        by_kind: a row for every kind of question too.
    """
    models: dict[tuple[str, str, str], list[Cell]] = defaultdict(list)
    for cell in newest(cells):
        models[cell["model"], cell["sha256"], cell["dtype"]].append(cell)
    parts = []
    for (model, digest, dtype), of_model in models.items():
        parts.append(f"{model} ({of_model[0]['sha256_of']} {digest[:12]}, {dtype})")
        needles = [cell for cell in of_model if cell["part"] == "needles"]
        parts += [full_table(needles, by_kind), needles_table(needles, by_kind)]
        parts.append(divergence_table([c for c in of_model if c["part"] == "divergence"]))
    return "\n\n".join(part for part in parts if part)


def full_table(cells: Sequence[Cell], by_kind: bool) -> str:
    """What full KV answers: percent of its questions."""
    pooled: dict[Row, list[float]] = defaultdict(list)
    for cell in cells:
        if cell["scorer"] is None:
            for row, scores in _rows(cell, by_kind):
                pooled[row] += scores
    if not pooled:
        return ""
    lines = ["| task | context | questions | full KV, % |", "| --- | --- | --- | --- |"]
    for (task, context, kind), scores in sorted(pooled.items()):
        right = f"{100 * sum(scores) / len(scores):.1f}"
        lines.append(f"| {_task(task, kind)} | {context:,} | {len(scores)} | {right} |")
    return "\n".join(lines)


def needles_table(cells: Sequence[Cell], by_kind: bool) -> str:
    """Percent of full KV's answers; a column a profile and level."""
    full = {cell["script"]: cell for cell in cells if cell["scorer"] is None}
    sums: dict[Row, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        if cell["scorer"] is None or cell["script"] not in full:
            continue
        pairs = zip(_rows(cell, by_kind), _rows(full[cell["script"]], by_kind), strict=True)
        for ((task, context, kind), ours), (_, theirs) in pairs:
            row = (task, kind, context, *_setting(cell))
            sums[row][cell["label"]].append((sum(ours), sum(theirs)))
    shares = {
        row: {label: paired_share(*zip(*pairs, strict=True)) for label, pairs in found.items()}
        for row, found in sums.items()
    }
    return _table(
        {(_task(row[0], row[1]), *row[2:]): cells for row, cells in shares.items()},
        {label: shown for found in shares.values() for label in found},
    )


def divergence_table(cells: Sequence[Cell]) -> str:
    """KL from full KV in nats a token, and top-1 agreement in percent."""
    shares: dict[Row, dict[str, tuple[Share, Share]]] = defaultdict(dict)
    for cell in cells:
        shares[(cell["task"], cell["context_tokens"], *_setting(cell))][cell["label"]] = (
            mean_interval([text["divergence"] for text in cell["texts"]]),
            mean_interval([text["agreement"] for text in cell["texts"]]),
        )

    def both(found: tuple[Share, Share]) -> str:
        return f"{shown(found[0], 4, 1)} nats, {shown(found[1])} % top-1"

    return _table(shares, {label: both for found in shares.values() for label in found})


def _rows(cell: Cell, by_kind: bool) -> list[tuple[Row, list[float]]]:
    """(task, context, kind) and the scores of every conversation."""
    rows = []
    for kind, scores in zip(cell["kinds"], cell["scores"], strict=True):
        for one in (ALL_KINDS, kind) if by_kind else (ALL_KINDS,):
            rows.append(((cell["task"], cell["context_tokens"], one), scores))
    return rows


def _setting(cell: Cell) -> Row:
    return scorer_of(cell), cell["chunk_size"], -cell["ratio"]


def _task(task: str, kind: str) -> str:
    return f"{task}, {kind}" if kind else task


def _table(rows: dict[Row, dict[str, Any]], show: dict[str, Any]) -> str:
    if not rows:
        return ""
    labels = sorted(show)
    lines = [
        f"| task | context | scorer | C | ratio | {' | '.join(labels)} |",
        "| --- " * (5 + len(labels)) + "|",
    ]
    for row in sorted(rows):
        task, context, scorer, chunk, ratio = row
        found = [show[label](rows[row][label]) if label in rows[row] else "" for label in labels]
        lines.append(
            f"| {task} | {context:,} | {scorer} | {chunk} | {-ratio:g} | {' | '.join(found)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the tables of files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--by-kind", action="store_true", help="a row a kind of question too")
    args = parser.parse_args()
    needed = ("digest", "part", "sha256", "dtype", "scorer", "label", "ratio")
    cells = [cell for file in args.files for cell in read_cells(file, "FILE", needed)]
    print(report(cells, args.by_kind))


if __name__ == "__main__":
    main()
