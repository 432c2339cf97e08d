"""The same budget for every head group."""

from __future__ import annotations

import numpy as np

from tangram.budgets.grouping import consecutive_heads, head_groups
from tangram.budgets.problem import BudgetProblem
from tangram.geometry.heads import HeadGroups


def uniform_budgets(problem: BudgetProblem) -> HeadGroups:
    """The same pages for all groups of consecutive heads.

    Where the total does not divide, some groups have one page more: the layers take turns (in
    `spread_order`), and a layer's groups do, so that neither layers nor groups differ by more
    than one page, and a larger ratio never takes a page from a group.
    """
    groups = problem.groups_per_layer
    totals = problem.layer_totals()
    pages = np.repeat(totals[:, None] // groups, groups, axis=1)
    for layer, rest in enumerate(totals % groups):
        pages[layer, (layer + np.arange(rest)) % groups] += 1
    return head_groups(consecutive_heads(problem), pages)
