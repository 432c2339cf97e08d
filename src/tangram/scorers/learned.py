"""Learned: what later questions attend to, as calibration learned it from the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tangram.errors import ScorerError
from tangram.scorers.base import Chunks, Scorer, heads_first, turn_pairs

SHORTEST_VALUE = 1e-6
"""Values below it count as that long in a logarithm."""
_HIGHEST = 80.0
"""Of an exponent that float32 still has room for."""


@dataclass(frozen=True)
class Learned(Scorer):
    """A linear function of a token's own key and value, of weights that the profile holds.

    score = exp(w . x), where x is the key as it was before RoPE, the value, the norms of both, the
    logarithm of the value's, and 1. Calibration chooses w for every head so that, within a chunk,
    the scores are as near as can be to the attention that later questions and answers of its
    samples pay, times the value's norm (`tangram.calibrate.recording.learned`).
    """

    name: ClassVar[str] = "learned"
    needs_statistics: ClassVar[tuple[str, ...]] = ("row_weights", "rope_frequencies")

    def score(self, chunks: Chunks) -> Tensor:
        """The weights' exponential."""
        weights = self.statistic(chunks, "row_weights").float()
        frequencies = self.statistic(chunks, "rope_frequencies")
        self.check_statistics(weights, frequencies, chunks.num_kv_heads, chunks.head_size)
        keys = turn_back(heads_first(chunks.keys), chunks.positions.unsqueeze(-2), frequencies)
        features = row_features(keys, heads_first(chunks.values))
        total = (features @ weights.unsqueeze(-1)).squeeze(-1)  # [..., kv_heads, tokens]
        return total.clamp(-_HIGHEST, _HIGHEST).exp().mT.contiguous()

    def check_statistics(
        self, weights: Tensor, frequencies: Tensor, num_kv_heads: int, head_size: int
    ) -> None:
        """Check the shapes of one layer's statistics.

        Args:
            weights: [kv_heads, 2 * head_size + 4].
            frequencies: [rotary_dim / 2].
            num_kv_heads: of the model that is served.
            head_size: likewise.

        Raises:
            ScorerError: they are of another model.
        """
        expected = (num_kv_heads, num_features(head_size))
        if tuple(weights.shape) != expected or not 0 < 2 * len(frequencies) <= head_size:
            raise ScorerError(
                f"{self.name}: row_weights have shape {tuple(weights.shape)}, expected {expected}, "
                f"and there are {len(frequencies)} rope_frequencies, expected at most "
                f"{head_size // 2}: the profile of --compression-profile is of another model"
            )


def num_features(head_size: int) -> int:
    """Numbers that a token's score is made of."""
    return 2 * head_size + 4


def row_features(keys: Tensor, values: Tensor) -> Tensor:
    """What a token's score is a linear function of.

    Args:
        keys: [..., head_size] float32, before RoPE.
        values: the same shape.

    Returns:
        [..., 2 * head_size + 4].
    """
    key_norm, value_norm = (
        torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (keys, values)
    )
    log_norm = value_norm.clamp_min(SHORTEST_VALUE).log()
    parts = (keys, values, key_norm, value_norm, log_norm, torch.ones_like(log_norm))
    return torch.cat(parts, dim=-1)


def turn_back(keys: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Keys as they were before RoPE.

    Args:
        keys: [..., tokens, head_size] float32; dimension i is paired with i + rotary_dim / 2.
        positions: [..., tokens] int64, of as many dimensions as `keys` but the last.
        frequencies: [rotary_dim / 2], radians per position.
    """
    angles = positions.double().unsqueeze(-1) * frequencies.double()
    return turn_pairs(keys, angles.cos().float(), angles.sin().float())
