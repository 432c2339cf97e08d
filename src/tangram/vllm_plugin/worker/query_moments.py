"""The statistics of a profile as the sealing kernel reads them."""

from __future__ import annotations

import torch

from tangram.geometry import Geometry
from tangram.kernels.seal_decode import QueryStatistics
from tangram.profile import Profile
from tangram.scorers.base import Scorer
from tangram.scorers.expected_attention import ExpectedAttention, average_rotation


def query_statistics(
    scorer: Scorer,
    profile: Profile | None,
    geometry: Geometry,
    max_model_len: int,
    device: torch.device,
) -> QueryStatistics | None:
    """What the kernel must know of queries for a scorer, on the device; None if nothing.

    Args:
        scorer: one that has a kernel.
        profile: the plan's; has what the scorer needs.
        geometry: the layout.
        max_model_len: tokens that a request has at most.
        device: where the kernel runs.

    Raises:
        ScorerError: statistics of another model.
    """
    if not isinstance(scorer, ExpectedAttention):
        return None
    assert profile is not None, "a plan without the scorer's statistics"
    mean, covariance, frequencies = (
        torch.from_numpy(profile.arrays[name].copy()) for name in scorer.needs_statistics
    )
    scorer.check_statistics(mean[0], covariance[0], frequencies, geometry.head_size)
    C = geometry.chunk_size_tokens
    boundaries = torch.arange(1, max_model_len // C + 2) * C
    rotation = average_rotation(frequencies, boundaries, scorer.n_future_tokens)
    return QueryStatistics.of(mean, covariance, rotation, epsilon=scorer.epsilon, device=device)
