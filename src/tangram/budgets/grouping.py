"""Which heads of a layer share a budget."""

from __future__ import annotations

import numpy as np

from tangram.budgets.problem import BudgetProblem
from tangram.geometry.heads import HeadGroups


def consecutive_heads(problem: BudgetProblem) -> np.ndarray:
    """[layers, groups, H_p] int64: heads 0 .. H_p - 1, then the next, in every layer."""
    one = np.arange(problem.num_kv_heads).reshape(problem.groups_per_layer, -1)
    return np.repeat(one[None], problem.num_layers, axis=0)


def cluster_heads(group_size: int, *demands: np.ndarray) -> np.ndarray:
    """Groups of heads that need about the same, so that little is lost to the largest of them.

    Args:
        group_size: H_p.
        demands: [layers, kv_heads] each; heads are sorted by the first, largest first, ties by
            the next, in the end by the head's index.

    Returns:
        [layers, groups, H_p] int64, the neediest group of a layer first, a group's heads in the
        order of their indices.
    """
    layers, heads = demands[0].shape
    indices = np.broadcast_to(np.arange(heads), (layers, heads))
    keys = [indices, *(-demand for demand in reversed(demands))]  # lexsort: the last key leads
    order = np.lexsort(keys, axis=-1)
    return np.sort(order.reshape(layers, heads // group_size, group_size), axis=-1)


def of_groups(values: np.ndarray, heads: np.ndarray) -> np.ndarray:
    """[layers, groups, H_p, ...]: `values` [layers, kv_heads, ...] in the order of the groups."""
    return values[np.arange(values.shape[0])[:, None, None], heads]


def head_groups(heads: np.ndarray, pages: np.ndarray) -> HeadGroups:
    """The result type from `heads` [layers, groups, H_p] and `pages` [layers, groups]."""
    return HeadGroups.from_lists(heads.tolist(), pages.tolist())
