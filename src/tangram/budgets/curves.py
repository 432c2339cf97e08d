"""Pages go where a head's own curve gains most: attention mass held, or output error avoided."""

from __future__ import annotations

import numpy as np

from tangram.budgets.grouping import cluster_heads, head_groups, of_groups
from tangram.budgets.problem import BudgetProblem
from tangram.geometry.heads import HeadGroups
from tangram.profile import ERROR_CURVE, MASS_CURVE


def mass_budgets(problem: BudgetProblem) -> HeadGroups:
    """Most attention mass of later queries held, summed over all heads."""
    return _curve_budgets(problem, MASS_CURVE, sign=1.0)


def error_budgets(problem: BudgetProblem) -> HeadGroups:
    """Least error of the heads' contributions to the residual stream, summed over all heads."""
    return _curve_budgets(problem, ERROR_CURVE, sign=-1.0)


def _curve_budgets(problem: BudgetProblem, name: str, sign: float) -> HeadGroups:
    profile = problem.needed_profile()
    curve = profile.require(name, problem.level).astype(np.float64).mean(axis=0)
    gain = page_gain(sign * curve, np.asarray(profile.shares), problem.max_pages)
    heads = cluster_by_gain(problem, gain)
    of_group = of_groups(gain, heads).sum(axis=2)
    return head_groups(
        heads, greedy_pages(of_group, problem.total_pages, floor_pages=problem.floor_pages)
    )


def page_gain(curve: np.ndarray, shares: np.ndarray, max_pages: int) -> np.ndarray:
    """What a head gains over keeping nothing, for every number of pages.

    Args:
        curve: [layers, kv_heads, shares], higher is better; noise that falls is ironed out.
        shares: [shares], shares of a chunk at which the curve is known, 0 to 1.
        max_pages: pages of a whole chunk.

    Returns:
        [layers, kv_heads, max_pages + 1] float64, non-decreasing, 0 at 0 pages.
    """
    asked = np.linspace(0.0, 1.0, max_pages + 1)
    right = np.clip(np.searchsorted(shares, asked), 1, len(shares) - 1)
    weight = (asked - shares[right - 1]) / (shares[right] - shares[right - 1])
    resampled = (1 - weight) * curve[..., right - 1] + weight * curve[..., right]
    return np.maximum.accumulate(resampled - resampled[..., :1], axis=-1)


def cluster_by_gain(problem: BudgetProblem, gain: np.ndarray) -> np.ndarray:
    """Groups of heads that would get about the same pages if each had its own budget.

    Heads with the same pages are sorted by what those pages leave unfulfilled.

    Args:
        problem: sizes and ratio.
        gain: [layers, kv_heads, max_pages + 1].

    Returns:
        [layers, groups, H_p] int64.
    """
    total = round(problem.ratio * (problem.max_pages * gain[..., 0].size))
    total = max(total, problem.floor_pages * gain[..., 0].size)
    alone = greedy_pages(gain, total, floor_pages=problem.floor_pages)
    missing = gain[..., -1] - np.take_along_axis(gain, alone[..., None], axis=-1)[..., 0]
    return cluster_heads(problem.page_group_size, alone, missing)


def greedy_pages(gain: np.ndarray, total_pages: int, *, floor_pages: int) -> np.ndarray:
    """Pages for every curve, spending `total_pages` where the curves' concave hulls gain most.

    Among equal gains the curve with fewer pages comes first, then the first curve. For a given
    set of curves a larger total never takes a page away.

    Args:
        gain: [layers, groups, max_pages + 1], non-decreasing along the last axis.
        total_pages: between floor_pages and max_pages for each curve.
        floor_pages: pages that every curve gets beforehand.

    Returns:
        [layers, groups] int64, sum = total_pages.

    Source: docs/design.md section 5; greedy is optimal because concave hulls are taken first.
    """
    curves = gain.reshape(-1, gain.shape[-1])[:, floor_pages:]
    slopes = np.stack([hull_slopes(curve) for curve in curves])
    count, steps = slopes.shape
    page = np.broadcast_to(np.arange(steps), slopes.shape).reshape(-1)
    curve = np.repeat(np.arange(count), steps)
    order = np.lexsort([curve, page, -slopes.reshape(-1)])
    chosen = order[: total_pages - floor_pages * count]
    pages = floor_pages + np.bincount(curve[chosen], minlength=count)
    return pages.reshape(gain.shape[:-1])


def hull_slopes(curve: np.ndarray) -> np.ndarray:
    """Gain of each step along the least concave curve above `curve`.

    Args:
        curve: [steps + 1].

    Returns:
        [steps], non-increasing, with the sum of the curve's own steps.
    """
    lengths: list[int] = []
    rises: list[float] = []
    for rise in np.diff(curve).tolist():
        length = 1
        while lengths and rises[-1] * length <= rise * lengths[-1]:
            length += lengths.pop()
            rise += rises.pop()
        lengths.append(length)
        rises.append(rise)
    return np.repeat(np.divide(rises, lengths), lengths)
