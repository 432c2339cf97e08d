"""Which of several budgets, or scorers, is taken, by the samples that have the last word."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tangram.scorers import SEALING_ORDER

NOISE_DEVIATIONS = 2.0
"""Paired standard errors that budgets must be apart by to be told apart."""

ALIKE = 0.05
"""Share of a divergence by which two scorers must differ for the better one to be taken."""

NO_LOSS = 1e-4
"""Divergence, in nats, below which no answer changes: how far below is not compared."""


def choose(each: Mapping[str, np.ndarray]) -> tuple[str, tuple[str, ...]]:
    """The budgets that are taken, and those that these samples cannot tell from them.

    The least mean goes first. Another is within noise of it where its mean is not larger by more
    than `NOISE_DEVIATIONS` standard errors of the samples' own differences. Of all these the least
    geometric mean is taken: no single sample that diverges much decides it. One sample has no
    standard error, so that nothing can be told apart by it.

    Args:
        each: name -> [samples], divergences above 0 on the same samples; of equal ones the last
            name goes first.

    Returns:
        The name, and the names within noise of the least mean beside it.
    """
    names = list(each)[::-1]
    least = min(names, key=lambda name: each[name].mean())
    alike = [name for name in names if _within_noise(each[name] - each[least])]
    taken = min(alike, key=lambda name: np.log(each[name]).mean())
    return taken, tuple(name for name in each if name in alike and name != taken)


def choose_scorer(each: Mapping[str, np.ndarray]) -> str:
    """The scorer that is taken: the one with the least divergence, for sealing is a small cost.

    Of each sample the logarithm of the divergence is taken, the mean over ratios, so that every
    ratio has the same say, and the mean over samples. Of those that are less than `ALIKE` above
    the least the one that comes first in `SEALING_ORDER` is taken; that noise may have decided
    between two is no reason to take the one that came out worse.

    Args:
        each: name -> [ratios, samples], divergences (or errors) on the same samples. What is below
            `NO_LOSS` counts as that.
    """
    logs = {name: float(np.log(np.maximum(e, NO_LOSS)).mean()) for name, e in each.items()}
    least = min(logs.values())
    alike = [name for name, found in logs.items() if found < least + np.log1p(ALIKE)]
    return min(alike, key=sealing_rank)


def sealing_rank(name: str) -> int:
    """Place of a scorer in `SEALING_ORDER`, after all of them for another package's."""
    return SEALING_ORDER.index(name) if name in SEALING_ORDER else len(SEALING_ORDER)


def _within_noise(differences: np.ndarray) -> bool:
    count = differences.size
    if count == 1:
        return True
    error = differences.std(ddof=1) / np.sqrt(count)
    return bool(differences.mean() <= NOISE_DEVIATIONS * error)
