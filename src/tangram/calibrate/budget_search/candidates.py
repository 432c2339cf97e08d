"""Budgets worth trying: every rule that a profile allows, blends of rules, and what was found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from tangram.budgets import MEASURED, RULES, BudgetProblem, measured_entries
from tangram.budgets.grouping import group_by_demand, head_pages
from tangram.errors import ProfileError
from tangram.geometry import HeadGroups

SINGLE_RULES = {
    "error": ("error", 0.0),
    "uniform": ("uniform", 0.0),
    "crosslayer": ("crosslayer", 2.0),
    "crosslayer alpha 0": ("crosslayer", 0.0),
    "perlayer": ("perlayer", 2.0),
    "perlayer alpha 0": ("perlayer", 0.0),
    "mass": ("mass", 0.0),
}
"""Name -> (level, alpha), in the order tried: on real models `error` is far ahead."""

BLENDED_RULES = 4
"""Rules of which blends are made: the best ones, and uniform, which keeps others from starving."""


def single_rules(problem: BudgetProblem) -> dict[str, HeadGroups]:
    """The budgets of every rule for which the profile has the statistics, in the order tried."""
    found = {}
    for name, (level, alpha) in SINGLE_RULES.items():
        try:
            found[name] = RULES[level](replace(problem, level=level, alpha=alpha))
        except ProfileError:
            continue
    return found


def nearby(problem: BudgetProblem) -> Iterator[tuple[str, HeadGroups]]:
    """What the profile's measured budgets of other ratios and sizes suggest, if it has any.

    First what serving would take from them, then each of them alone, rescaled: at a lower ratio the
    nearest may be mostly floors, from which nothing is to be learned about larger chunks.
    """
    entries = measured_entries(problem.needed_profile())
    if entries:
        yield "measured nearby", RULES[MEASURED](replace(problem, level=MEASURED))
    for entry in entries:
        name = f"measured at {entry.ratio:g} in chunks of {entry.chunk_size_tokens}"
        yield name, group_by_demand(problem, entry.shares)


def blends(problem: BudgetProblem, best_first: Sequence[str]) -> Iterator[tuple[str, HeadGroups]]:
    """Blends of the best rules, by head and rescaled to the exact total; heads are grouped anew.

    Of two rules: the geometric and the arithmetic mean of a head's pages, and the pages that one
    gives each layer, dealt within it as the other does. Of one: its pages to a power, which makes
    it milder or sharper.

    Args:
        problem: sizes, ratio and profile.
        best_first: names of `SINGLE_RULES` that the profile allows, the best first.
    """
    # More groups round to another total, which may fall below the floor.
    lowest = problem.floor_pages / problem.max_pages
    alone = replace(problem, page_group_size=1, ratio=max(problem.ratio, lowest))
    rules = single_rules(alone)
    distinct: dict[HeadGroups, str] = {}
    for name in (*best_first, "uniform"):
        distinct.setdefault(rules[name], name)
    names = list(distinct.values())[:BLENDED_RULES]
    if distinct[rules["uniform"]] not in names:
        names[-1] = "uniform"
    pages = {name: head_pages(rules[name]) for name in names}
    for later, second in enumerate(names):
        for first in names[:later]:
            a, b = pages[first], pages[second]
            of = f"{first}, {second}"
            yield f"geometric mean of {of}", group_by_demand(problem, np.sqrt(a * b))
            yield f"arithmetic mean of {of}", group_by_demand(problem, a + b)
            yield f"layers of {first}, heads of {second}", group_by_demand(problem, _dealt(a, b))
            yield f"layers of {second}, heads of {first}", group_by_demand(problem, _dealt(b, a))
    for name in names[:2]:
        for power in (0.5, 1.5):
            yield f"{name} to the power {power}", group_by_demand(problem, pages[name] ** power)


def _dealt(layers: np.ndarray, heads: np.ndarray) -> np.ndarray:
    return heads * (layers.sum(axis=1) / heads.sum(axis=1))[:, None]
