"""ExpectedAttention: the tokens that queries to come are expected to attend to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tangram.errors import ScorerError
from tangram.scorers.base import (
    Chunks,
    Scorer,
    check_whole,
    group_query_heads,
    heads_first,
    turn_pairs,
)


@dataclass(frozen=True)
class ExpectedAttention(Scorer):
    """Expected attention of Gaussian queries at the positions to come, times the value's norm.

    The profile gives mean and covariance of every query head before RoPE; both are turned by the
    average rotation R of positions boundary .. boundary + n_future_tokens - 1. The expectation of
    exp(scale * q . k) is then exp(scale * mean . k + scale^2 / 2 * k . covariance . k). RoPE is
    the one that pairs dimension i with i + rotary_dim / 2; dimensions from rotary_dim on are not
    turned.

    Attributes:
        n_future_tokens: positions after the boundary that the rotation is averaged over.
        epsilon: added to the expected attention, so that tokens that hardly any query attends to
            are ranked by their values' norms.

    Source: arXiv 2510.00636.
    """

    name: ClassVar[str] = "expected_attention"
    needs_statistics: ClassVar[tuple[str, ...]] = (
        "query_mean",
        "query_covariance",
        "rope_frequencies",
    )

    n_future_tokens: int = 512
    epsilon: float = 0.01

    def __post_init__(self) -> None:
        check_whole(self.name, "n_future_tokens", self.n_future_tokens, least=1)
        epsilon = self.epsilon
        if (
            isinstance(epsilon, bool)
            or not isinstance(epsilon, int | float)
            or not math.isfinite(epsilon)
            or epsilon < 0
        ):
            raise ScorerError(
                f"{self.name}: epsilon is {epsilon!r}, expected a finite number of at least 0"
            )

    def score(self, chunks: Chunks) -> Tensor:
        """Expected attention plus epsilon, times the value's L2 norm."""
        mean, covariance, frequencies = self._checked_statistics(chunks)
        rotation = average_rotation(frequencies, chunks.boundaries, self.n_future_tokens)
        # (R mean) . k = mean . (R^T k), and so for the covariance: turning the keys costs
        # head_size per key, turning a covariance head_size^3 per chunk and query head.
        keys = rotate_back(heads_first(chunks.keys), rotation)

        linear = keys @ mean.mT.contiguous()  # [..., kv_heads, tokens, G]
        group = mean.shape[-2]
        turned = keys @ covariance.transpose(-3, -2).flatten(-2)  # [..., kv_heads, tokens, G * D]
        quadratic = (turned.unflatten(-1, (group, -1)) * keys.unsqueeze(-2)).sum(dim=-1)

        scale = chunks.softmax_scale
        expected = (scale * linear + 0.5 * scale**2 * quadratic).softmax(dim=-2).mean(dim=-1)
        value_norm = torch.linalg.vector_norm(chunks.values.float(), dim=-1)
        return (expected.mT.contiguous() + self.epsilon) * value_norm

    def _checked_statistics(self, chunks: Chunks) -> tuple[Tensor, Tensor, Tensor]:
        """Mean [kv_heads, G, D], covariance [kv_heads, G, D, D], frequencies [rotary_dim / 2]."""
        mean = self.statistic(chunks, "query_mean")
        covariance = self.statistic(chunks, "query_covariance")
        frequencies = self.statistic(chunks, "rope_frequencies")
        self.check_statistics(mean, covariance, frequencies, chunks.head_size)
        return (
            group_query_heads(mean.float(), chunks.num_kv_heads, dim=0),
            group_query_heads(covariance.float(), chunks.num_kv_heads, dim=0),
            frequencies,
        )

    def check_statistics(
        self, mean: Tensor, covariance: Tensor, frequencies: Tensor, head_size: int
    ) -> None:
        """Check the shapes of one layer's statistics.

        Args:
            mean: [query_heads, head_size].
            covariance: [query_heads, head_size, head_size].
            frequencies: [rotary_dim / 2].
            head_size: of the model that is served.

        Raises:
            ScorerError: they are of another model.
        """
        heads, size = mean.shape[0], head_size
        expected = {
            "query_mean": (mean, (heads, size)),
            "query_covariance": (covariance, (heads, size, size)),
        }
        for name, (found, shape) in expected.items():
            if tuple(found.shape) != shape:
                raise ScorerError(
                    f"{self.name}: {name} has shape {tuple(found.shape)}, expected {shape}: the "
                    "profile of --compression-profile is of another model"
                )
        if frequencies.dim() != 1 or 2 * frequencies.shape[0] > size:
            raise ScorerError(
                f"{self.name}: rope_frequencies has shape {tuple(frequencies.shape)}, expected "
                f"at most {size // 2} for a head size of {size}: the profile of "
                "--compression-profile is of another model"
            )


def average_rotation(frequencies: Tensor, first_position: Tensor, n_tokens: int) -> Tensor:
    """RoPE's rotation, averaged over consecutive positions: a rotation that shrinks.

    Args:
        frequencies: [rotary_dim / 2], radians per position.
        first_position: [...] int64.
        n_tokens: positions to average over.

    Returns:
        [..., rotary_dim / 2] complex64: cosine + i * sine, worked out in float64, for which
        positions of a million still have exact angles.
    """
    frequencies = frequencies.double()
    steps = torch.arange(n_tokens, dtype=torch.float64, device=frequencies.device)
    ahead = steps.unsqueeze(-1) * frequencies  # [n_tokens, rotary_dim / 2]
    shrink = torch.complex(ahead.cos(), ahead.sin()).mean(dim=0)
    angle = first_position.double().unsqueeze(-1) * frequencies
    return (torch.complex(angle.cos(), angle.sin()) * shrink).to(torch.complex64)


def rotate_back(keys: Tensor, rotation: Tensor) -> Tensor:
    """Multiplies keys by the transpose of a rotation.

    Args:
        keys: [..., kv_heads, tokens, head_size] float32.
        rotation: [..., rotary_dim / 2] complex64; pair i is dimensions i and i + rotary_dim / 2.
    """
    rotation = rotation.unsqueeze(-2).unsqueeze(-2)
    return turn_pairs(keys, rotation.real, rotation.imag)
