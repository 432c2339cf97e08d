"""What the sealing kernel must know of a scorer: one descriptor for every built-in one.

How the scores themselves are computed is told apart by the scorer's name in `kernel.py`, whose
functions are in `scores_kernel.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from tangram.geometry import Geometry
from tangram.kernels.seal_decode.moments import QueryMoments, RowWeights
from tangram.kernels.sizes import SMALL_SHARED_BYTES, power_of_two
from tangram.scorers import Scorer
from tangram.scorers.expected_attention import average_rotation


class Tiles(NamedTuple):
    """How a launch is cut: tiles in elements of a row, and what Triton is told.

    `factor_tile` is for `expected_attention`.
    """

    key_tile: int
    row_tile: int
    warps: int
    stages: int
    factor_tile: int = 16


# The fastest on an H200 at chunks of 256 and heads of 128, carried over to other sizes.


def _small(C_pad: int, head_size: int, itemsize: int, shared_bytes: int) -> Tiles:
    """Smaller programs, several of them on a processor."""
    warps = min(16, max(4, C_pad * 16 // 2048))
    return _tiles(1 << 13, warps, C_pad, head_size, itemsize)


def _attending(C_pad: int, head_size: int, itemsize: int, shared_bytes: int) -> Tiles:
    """Matrix products want the keys in few tiles; float32 ones must fit the shared memory."""
    elements = 1 << 15 if itemsize == 2 else 1 << 14
    tiles = _tiles(elements, 8 if C_pad < 1024 else 16, C_pad, head_size, itemsize)
    if shared_bytes <= SMALL_SHARED_BYTES:  # it has no room for a second tile of 64 KiB
        return tiles._replace(stages=min(2, tiles.stages))
    return tiles


def _tiles(elements: int, warps: int, C_pad: int, head_size: int, itemsize: int) -> Tiles:
    def tile(row: int) -> int:
        return max(16, min(power_of_two(row), elements // C_pad))

    return Tiles(tile(head_size), tile(2 * head_size), warps, 3 if itemsize == 2 else 1)


def _expecting(C_pad: int, head_size: int, itemsize: int, shared_bytes: int) -> Tiles:
    """Keys, a product and what it is made of fit the registers.

    Float32, which serves tests only, is multiplied without matrix units and takes the least.
    """
    if itemsize > 2:
        return Tiles(key_tile=16, row_tile=16, warps=8, stages=1)
    tile = max(16, min(64, power_of_two(head_size), (1 << 14) // C_pad))
    return Tiles(tile, 2 * tile, 8 if C_pad < 1024 else 16, 2, factor_tile=tile)


@dataclass(frozen=True)
class ScorerKernel:
    """How the kernel runs a scorer.

    Attributes:
        tiles: (chunk padded to a power of two, head size, bytes of an element, shared memory that a
            block of threads can have) to tiles.
        reads_queries: whether it looks at the window's queries, in the ring or of the step.
        reads_scores: whether scores lie beside the rows.
        smooth_parameter: parameter of the scorer that says over how many tokens scores are
            averaged; None if they are not.
        moments: makes what it must know of the profile, by `SealScorer.of`; None if nothing.
    """

    tiles: Callable[[int, int, int, int], Tiles]
    reads_queries: bool = False
    reads_scores: bool = False
    smooth_parameter: str | None = None
    moments: Callable[..., QueryMoments | RowWeights] | None = None


def _expected_moments(
    scorer: Any,
    statistics: Mapping[str, np.ndarray],
    geometry: Geometry,
    max_tokens: int,
    device: torch.device | str,
) -> QueryMoments:
    mean, covariance, frequencies = (
        torch.from_numpy(statistics[name].copy()) for name in scorer.needs_statistics
    )
    scorer.check_statistics(mean[0], covariance[0], frequencies, geometry.head_size)
    C = geometry.chunk_size_tokens
    boundaries = torch.arange(1, max_tokens // C + 2) * C
    rotation = average_rotation(frequencies, boundaries, scorer.n_future_tokens)
    return QueryMoments.of(mean, covariance, rotation, epsilon=scorer.epsilon, device=device)


def _learned_weights(
    scorer: Any,
    statistics: Mapping[str, np.ndarray],
    geometry: Geometry,
    max_tokens: int,
    device: torch.device | str,
) -> RowWeights:
    weights, frequencies = (
        torch.from_numpy(statistics[name].copy()) for name in scorer.needs_statistics
    )
    scorer.check_statistics(weights[0], frequencies, geometry.num_kv_heads, geometry.head_size)
    C = geometry.chunk_size_tokens
    return RowWeights.of(
        weights, frequencies, chunk_size_tokens=C, window_size_tokens=geometry.window_size_tokens,
        num_chunks=max_tokens // C + 1, device=device,
    )  # fmt: skip


KERNELS = {
    "streaming_llm": ScorerKernel(_small),
    "key_norm": ScorerKernel(_small),
    "key_diff": ScorerKernel(_small),
    "expected_attention": ScorerKernel(_expecting, moments=_expected_moments),
    "learned": ScorerKernel(_small, moments=_learned_weights),
    "snap_kv": ScorerKernel(_attending, reads_queries=True, smooth_parameter="kernel_size"),
    "tova": ScorerKernel(_attending, reads_queries=True),
    "fastkvzip": ScorerKernel(_small, reads_scores=True),
    "kvzap": ScorerKernel(_small, reads_scores=True),
}
"""By registry name."""


@dataclass(frozen=True)
class SealScorer:
    """A scorer as launches are given it.

    Attributes:
        name: registry name, one of `KERNELS`.
        smooth_tokens: tokens over which scores are averaged.
        moments: what it must know of the profile, of all layers; None if nothing.
    """

    name: str
    smooth_tokens: int = 1
    moments: QueryMoments | RowWeights | None = None

    @classmethod
    def of(
        cls,
        scorer: Scorer,
        statistics: Mapping[str, np.ndarray],
        geometry: Geometry,
        max_tokens: int,
        device: torch.device | str,
    ) -> SealScorer:
        """The scorer with its parameters, and what it reads of a profile on the device.

        Args:
            scorer: one of `KERNELS`.
            statistics: arrays of the profile of all layers, with what the scorer needs.
            geometry: the layout.
            max_tokens: tokens that a request has at most.
            device: where launches run.

        Raises:
            ScorerError: statistics of another model.
        """
        kernel, smooth_tokens, moments = KERNELS[scorer.name], 1, None
        if kernel.smooth_parameter is not None:
            smooth_tokens = scorer.parameters()[kernel.smooth_parameter]
        if kernel.moments is not None:
            moments = kernel.moments(scorer, statistics, geometry, max_tokens, device)
        return cls(scorer.name, smooth_tokens, moments)

    @cached_property
    def reads_queries(self) -> bool:
        """Whether the window's queries are looked at."""
        return KERNELS[self.name].reads_queries

    @cached_property
    def reads_scores(self) -> bool:
        """Whether scores were made with their tokens."""
        return KERNELS[self.name].reads_scores


@cache
def tiles_of(name: str, C_pad: int, head_size: int, itemsize: int, shared_bytes: int) -> Tiles:
    """Tiles of a scorer's launch."""
    return KERNELS[name].tiles(C_pad, head_size, itemsize, shared_bytes)
