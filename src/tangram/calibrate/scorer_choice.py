"""Which of several profiles, of one scorer each, a calibration keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tangram.budgets import BudgetProblem
from tangram.budgets.curves import error_budgets
from tangram.budgets.grouping import head_pages
from tangram.calibrate.budget_search.choice import choose_scorer
from tangram.plan.compression_plan import PAGE_SIZE_ROWS, group_size
from tangram.plan.options import CompressionOptions
from tangram.profile import ERROR_CURVE, Profile
from tangram.profile.scorer_choice import DIVERGENCE, PREDICTED_ERROR, SCORERS, ScorerChoice

if TYPE_CHECKING:
    from tangram.calibrate.budget_search.measure import Measured


def by_divergence(measured: Sequence[Measured], left_out: Mapping[str, str]) -> Profile:
    """The profile of the scorer whose budgets diverge least from full KV.

    Args:
        measured: profiles of one scorer each, measured at the same ratios on the same samples.
        left_out: name of a scorer -> why it is not among them.

    Returns:
        One of the profiles, with what was compared in its `extra`.
    """
    profiles = [each.profile for each in measured]
    found = {each.profile.scorer_name: each.divergences for each in measured}
    return _chosen(profiles, found, DIVERGENCE, left_out)


def by_predicted_error(
    profiles: Sequence[Profile],
    ratios: Sequence[float],
    options: CompressionOptions,
    left_out: Mapping[str, str],
) -> Profile:
    """The profile of the scorer whose own budgets of level `error` promise the least error.

    Args:
        profiles: of one scorer each, of the same samples.
        ratios: at which they are compared.
        options: sizes that are served.
        left_out: name of a scorer -> why it is not among the profiles.

    Returns:
        One of the profiles, with what was compared in its `extra`.
    """
    found = {
        profile.scorer_name: {ratio: predicted_error(profile, ratio, options) for ratio in ratios}
        for profile in profiles
    }
    return _chosen(profiles, found, PREDICTED_ERROR, left_out)


def predicted_error(profile: Profile, ratio: float, options: CompressionOptions) -> np.ndarray:
    """[samples], relative error of a head's attention output with budgets of level `error`.

    The mean over layers and heads of what the profile's error curves say for the share of a chunk
    that each head keeps.

    Args:
        profile: with error curves.
        ratio: share of the rows that is kept.
        options: sizes that are served.

    Raises:
        BudgetError: a ratio for which there are no budgets.
    """
    problem = BudgetProblem(
        level="error",
        num_layers=profile.model.num_layers,
        num_kv_heads=profile.model.num_kv_heads,
        ratio=ratio,
        chunk_size_tokens=options.compression_chunk_size,
        page_size_rows=PAGE_SIZE_ROWS,
        page_group_size=group_size(options, profile.model.num_kv_heads),
        n_sink_tokens=options.compression_n_sink_tokens,
        profile=profile,
    )
    kept = head_pages(error_budgets(problem)) / problem.max_pages  # [layers, kv_heads]
    curves = profile.require(ERROR_CURVE, "error").astype(np.float64)
    shares = np.asarray(profile.shares)
    right = np.clip(np.searchsorted(shares, kept), 1, len(shares) - 1)
    weight = (kept - shares[right - 1]) / (shares[right] - shares[right - 1])
    before, after = (
        np.take_along_axis(curves, place[None, ..., None], axis=-1)[..., 0]
        for place in (right - 1, right)
    )
    return ((1 - weight) * before + weight * after).mean(axis=(1, 2))


def _chosen(
    profiles: Sequence[Profile],
    found: Mapping[str, Mapping[float, np.ndarray]],
    decided_by: str,
    left_out: Mapping[str, str],
) -> Profile:
    winner = choose_scorer({name: np.stack(list(each.values())) for name, each in found.items()})
    choice = ScorerChoice(
        winner,
        decided_by,
        {
            name: {ratio: float(values.mean()) for ratio, values in each.items()}
            for name, each in found.items()
        },
        left_out,
    )
    (profile,) = (each for each in profiles if each.scorer_name == winner)
    return replace(profile, extra={**profile.extra, SCORERS: choice.to_json()})
