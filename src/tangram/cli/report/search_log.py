"""The log of measured budgets, read from a profile that may have none, or one of another shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tangram.profile import Profile

_FIGURES = ("moved_pages", "divergence", "evaluations", "n_samples", "check_samples")


def measured_log(profile: Profile) -> list[dict[str, Any]]:
    """What was tried at every ratio, and how far it diverged from full KV.

    Returns:
        One object a ratio, rising: `ratio`, `origin`, `moved_pages`, `divergence`, `evaluations`,
        `n_samples`, `check_samples` (None where not told), `within_noise`, names of what the last
        word could not tell from what was taken, and `candidates`, [name, divergence on the samples
        that chose, divergence on those held back], the last ones best first, None where not looked
        at.
    """
    entries = profile.extra.get("measured")
    found = [_entry(entry) for entry in entries] if isinstance(entries, list) else []
    return sorted((entry for entry in found if entry), key=lambda entry: entry["ratio"])


def _entry(entry: Any) -> dict[str, Any] | None:
    log = entry.get("log") if isinstance(entry, Mapping) else None
    if not isinstance(log, Mapping) or _number(entry.get("ratio")) is None:
        return None
    candidates = log.get("candidates")
    tried = [
        [str(each.get("name")), _number(each.get("divergence")), _number(each.get("checked"))]
        for each in (candidates if isinstance(candidates, list) else ())
        if isinstance(each, Mapping)
    ]
    alike = log.get("within_noise")
    tried.sort(key=lambda each: (each[2] is None, each[2] or 0, each[1] is None, each[1] or 0))
    return {
        "ratio": entry["ratio"],
        "origin": str(log.get("origin", "unknown")),
        **{name: _number(log.get(name)) for name in _FIGURES},
        "within_noise": list(map(str, alike)) if isinstance(alike, list) else [],
        "candidates": tried,
    }


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
