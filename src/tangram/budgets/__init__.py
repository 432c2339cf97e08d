"""Budgets: how many pages every head group keeps of a chunk, from a profile or from nothing."""

from __future__ import annotations

from collections.abc import Callable

from tangram.budgets.curves import error_budgets, mass_budgets
from tangram.budgets.measured import (
    MEASURED,
    MeasuredEntry,
    default_level,
    interpolation,
    measured_budgets,
    measured_entries,
    with_entry,
)
from tangram.budgets.problem import BudgetProblem, floor_pages
from tangram.budgets.threshold import crosslayer_budgets, perlayer_budgets
from tangram.budgets.uniform import uniform_budgets
from tangram.errors import BudgetError
from tangram.geometry.heads import HeadGroups
from tangram.profile import Profile

RULES: dict[str, Callable[[BudgetProblem], HeadGroups]] = {
    "uniform": uniform_budgets,
    "crosslayer": crosslayer_budgets,
    "perlayer": perlayer_budgets,
    "mass": mass_budgets,
    "error": error_budgets,
    MEASURED: measured_budgets,
}
LEVELS = tuple(RULES)

__all__ = [
    "LEVELS",
    "MEASURED",
    "RULES",
    "BudgetProblem",
    "MeasuredEntry",
    "allocate",
    "default_level",
    "floor_pages",
    "interpolation",
    "measured_entries",
    "with_entry",
]


def allocate(
    level: str,
    *,
    num_layers: int,
    num_kv_heads: int,
    ratio: float,
    chunk_size_tokens: int,
    page_size_rows: int,
    page_group_size: int,
    n_sink_tokens: int,
    profile: Profile | None = None,
    alpha: float = 2.0,
) -> HeadGroups:
    """Head groups and their pages, spending exactly what `ratio` allows.

    The sum over all groups is ratio * C * layers * KV heads / (P * H_p) pages, rounded half to
    even; every group has at least the pages that hold max(S, 1) rows and at most C / P.

    Args:
        level: the rule, one of `LEVELS`.
        num_layers: attention layers.
        num_kv_heads: KV heads of a layer.
        ratio: share of the rows that is kept, in (0, 1].
        chunk_size_tokens: C, a multiple of P.
        page_size_rows: P, rows of each head that a page holds.
        page_group_size: H_p, heads that share a budget; divides `num_kv_heads`.
        n_sink_tokens: S, first tokens that every head keeps.
        profile: statistics; every level but `uniform` needs one.
        alpha: deviations above the mean that the threshold rules ask for.

    Raises:
        BudgetError: an unknown level, no profile where one is needed, or a size or ratio that
            cannot be had; names the option.
        ProfileError: the profile lacks what the level needs.
        ProfileMismatchError: the profile has other layers or heads.

    Source: docs/design.md section 5, docs/budgets.md.
    """
    if level not in RULES:
        raise BudgetError(
            f"unknown --compression-level {level!r}: choose one of {', '.join(LEVELS)}"
        )
    problem = BudgetProblem(
        level=level,
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        ratio=ratio,
        chunk_size_tokens=chunk_size_tokens,
        page_size_rows=page_size_rows,
        page_group_size=page_group_size,
        n_sink_tokens=n_sink_tokens,
        profile=profile,
        alpha=alpha,
    )
    found = RULES[level](problem)
    assert found.group_size == page_group_size
    assert sum(map(sum, found.pages)) == problem.total_pages
    return found
