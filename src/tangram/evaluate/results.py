"""Figures of a cell, one JSON object a line, and files of them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tangram.errors import ConfigurationError
from tangram.evaluate.play import Reply, Script
from tangram.scorers import scorer_title

Cell = dict[str, Any]
"""A cell's figures: one task and context on one engine."""

SCHEMA = 1
REQUIRED = ("digest", "task", "context_tokens", "scorer", "level", "ratio", "accuracy")


def wilson_interval(right: float, questions: int, z: float = 1.959964) -> tuple[float, float]:
    """Where the true share lies with 95 % confidence.

    Args:
        right: sum of the scores. Scores between 0 and 1 vary less than right and wrong ones of
            the same mean, so for them the interval is at least that sure.
        questions: how many scores.
        z: quantile of the normal distribution.

    Source: E. B. Wilson, 1927; questions count as independent of each other.
    """
    share, square = right / questions, z * z
    centre = share + square / (2 * questions)
    spread = z * math.sqrt(share * (1 - share) / questions + square / (4 * questions**2))
    scale = 1 + square / questions
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def scorer_of(cell: Cell) -> str:
    """The cell's scorer as people read it; empty for full KV."""
    return scorer_title(cell["scorer"] or "", cell.get("scorer_parameters", {}))


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Sixteen hex digits of JSON settings: cells with the same ones are the same cell."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cell_figures(script: Script, replies: Sequence[Reply], seconds: float) -> Cell:
    """What follows from the replies.

    Args:
        script: what was played.
        replies: all of them.
        seconds: that they took, reading the contexts included.
    """
    right = sum(reply.score for reply in replies)
    sent = sum(reply.prompt_tokens for reply in replies)
    low, high = wilson_interval(right, len(replies))
    return {
        "task": script.spec,
        "context_tokens": script.context_tokens,
        "conversations": len(script.dialogues),
        "questions": len(replies),
        "right": right,
        "accuracy": right / len(replies),
        "interval_95": [low, high],
        "prefix_cache_hit_share": sum(reply.cached_tokens for reply in replies) / sent,
        "seconds": seconds,
        "seed": script.sizes.seed,
        "replies": [asdict(reply) for reply in replies],
    }


def append_cell(path: Path, cell: Cell) -> None:
    """Add a line to a file of cells, in place of a last line that was cut off.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    try:
        append_line(path, json.dumps({"schema": SCHEMA, **cell}, ensure_ascii=False))
    except OSError as error:
        raise ConfigurationError(f"--out {path} cannot be written: {error}") from error


def append_line(path: Path, line: str) -> None:
    """Add a line of JSON to a file, in place of a last one that was cut off.

    A last line that is whole and lacks only its end, as some editors leave it, gets it. Several
    processes may do so at once.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        last = content.rfind(b"\n") + 1
        if _is_json(content[last:]):
            line = "\n" + line
        elif last < len(content):
            file.truncate(last)
        file.write(line.encode() + b"\n")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:  # text that is not UTF-8 too
        return False
    return True


def read_cells(path: Path, option: str, required: Collection[str] = REQUIRED) -> list[Cell]:
    """The cells of a file; of those with the same digest the last.

    A last line that was cut off, as by a kill while it was written, is passed over.

    Args:
        path: a file that `append_cell` wrote.
        option: named in errors.
        required: fields that every cell has, `digest` among them.

    Raises:
        ConfigurationError: the file cannot be read or holds something else; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{option} {path} cannot be read: {error}") from error
    cells: dict[str, Cell] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            cell = json.loads(line)
        except ValueError as error:
            if number == len(lines) and line.startswith("{"):
                continue
            raise ConfigurationError(f"{option} {path}, line {number}: not JSON") from error
        if not isinstance(cell, dict) or not set(required) <= set(cell):
            raise ConfigurationError(
                f"{option} {path}, line {number}: not a cell of tangram evaluate; give a file "
                "that --out wrote, or a new one"
            )
        cells.pop(cell["digest"], None)
        cells[cell["digest"]] = cell
    return list(cells.values())
