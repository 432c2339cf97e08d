"""Shares of full KV's answers, paired: both sides answered the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000


class Share(NamedTuple):
    """A share, and where it lies with 95 % confidence."""

    share: float
    low: float
    high: float


def paired_share(
    right: Sequence[float], full: Sequence[float], resamples: int = RESAMPLES, seed: int = 0
) -> Share | None:
    """Answers right over answers right with full KV, with a bootstrap interval.

    Conversations are drawn, with all their questions and with both sides' answers to them:
    questions of one conversation are not independent, and what both sides get wrong is no loss.

    Args:
        right: for each conversation the sum of its scores with compression.
        full: the same with full KV.
        resamples: draws of the bootstrap.
        seed: of the draws.

    Returns:
        None where full KV answers nothing.
    """
    ours, theirs = np.asarray(right, dtype=float), np.asarray(full, dtype=float)
    assert ours.shape == theirs.shape and ours.ndim == 1, (ours.shape, theirs.shape)
    if theirs.sum() <= 0:
        return None
    drawn = np.random.default_rng(seed).integers(len(ours), size=(resamples, len(ours)))
    tops, bottoms = ours[drawn].sum(axis=1), theirs[drawn].sum(axis=1)
    shares = tops[bottoms > 0] / bottoms[bottoms > 0]
    low, high = np.quantile(shares, [0.025, 0.975])
    return Share(float(ours.sum() / theirs.sum()), float(low), float(high))


def mean_interval(values: Sequence[float], resamples: int = RESAMPLES, seed: int = 0) -> Share:
    """Mean of values, of one text each, with a bootstrap interval over the texts."""
    each = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(seed).integers(len(each), size=(resamples, len(each)))
    low, high = np.quantile(each[drawn].mean(axis=1), [0.025, 0.975])
    return Share(float(each.mean()), float(low), float(high))


def shown(share: Share | None, digits: int = 1, scale: float = 100) -> str:
    """`87.1 (84.2 to 90.0)`; a dash for none."""
    if share is None:
        return "-"
    value, low, high = (f"{part * scale:.{digits}f}" for part in share)
    return f"{value} ({low} to {high})"
