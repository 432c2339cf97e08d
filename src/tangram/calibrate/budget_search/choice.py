"""Which of several budgets is taken, by divergences on the samples that have the last word."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

NOISE_DEVIATIONS = 2.0
"""Paired standard errors that budgets must be apart by to be told apart."""


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


def _within_noise(differences: np.ndarray) -> bool:
    count = differences.size
    if count == 1:
        return True
    error = differences.std(ddof=1) / np.sqrt(count)
    return bool(differences.mean() <= NOISE_DEVIATIONS * error)
