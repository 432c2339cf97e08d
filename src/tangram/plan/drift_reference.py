"""What calibration lets expect of the traffic, which drift is measured against."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tangram.budgets.threshold import samples_at
from tangram.errors import ConfigurationError, ProfileError
from tangram.geometry import Geometry
from tangram.plan.options import flag
from tangram.profile import Profile, threshold_share

LEAST_DEVIATION = 0.1
"""Least deviation of a share in those of a token's being kept, sqrt(ratio * (1 - ratio)).

A sample has a threshold for all its chunks, and here every chunk has its own: shares of chunks are
off by about this where the text is calibration's own.
"""


@dataclass(frozen=True)
class DriftReference:
    """What calibration lets expect; all arrays [layers, kv_heads].

    Attributes:
        scope: "crosslayer" or "perlayer".
        ratio: share of all tokens above the threshold.
        mean: mean share of the samples.
        deviation: their deviation, or the least that counts.
        budget: share of a chunk that the head keeps.
    """

    scope: str
    ratio: float
    mean: np.ndarray
    deviation: np.ndarray
    budget: np.ndarray

    @classmethod
    def of(
        cls, profile: Profile | None, level: str, ratio: float, geometry: Geometry
    ) -> DriftReference:
        """The reference of a served layout.

        Raises:
            ConfigurationError: the profile, if there is one, has no threshold shares.
        """
        scope = "crosslayer" if level == "crosslayer" else "perlayer"
        option = flag("compression_drift_sample")
        if profile is None:
            raise ConfigurationError(
                f"{option} compares the traffic with calibration's samples, and there is no "
                "profile: give one with --compression-profile, or leave the option out"
            )
        try:
            share = profile.require(threshold_share(scope), level)
        except ProfileError as error:
            raise ConfigurationError(f"{option} cannot be served: {error}") from error
        samples = samples_at(share, profile.ratios, ratio)
        budget = np.zeros(samples.shape[1:])
        for layer, groups in enumerate(geometry.head_groups.heads):
            for group, heads in enumerate(groups):
                budget[layer, list(heads)] = geometry.budget_share(layer, group)
        least = max(LEAST_DEVIATION * (ratio * (1 - ratio)) ** 0.5, 1 / geometry.chunk_size_tokens)
        deviation = np.maximum(samples.std(axis=0), least)
        return cls(scope, ratio, samples.mean(axis=0), deviation, budget)
