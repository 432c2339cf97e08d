"""What scorers know from a profile, as a sealing launch reads it; made once, at start."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QueryMoments:
    """Gaussian queries of all layers before RoPE, and how far RoPE turns them on the average.

    All in float32, like the scorer's own arithmetic. Of 16-bit statistics, and of TF32 products of
    these, logits are off by more than the 11 bits of a score that count.

    Attributes:
        mean: [layers, query_heads, head_size].
        factor: [layers, query_heads, head_size, head_size]; factor @ factor^T is the covariance.
        rotation: [chunks, rotary_dim / 2, 2], cosine and sine of the average rotation after every
            chunk's boundary. Pair i is dimensions i and i + rotary_dim / 2.
        epsilon: parameter of the scorer.
    """

    mean: Tensor
    factor: Tensor
    rotation: Tensor
    epsilon: float

    @classmethod
    def of(
        cls,
        mean: Tensor,
        covariance: Tensor,
        rotation: Tensor,
        *,
        epsilon: float,
        device: torch.device | str,
    ) -> QueryMoments:
        """The statistics on a device.

        Args:
            mean: [layers, query_heads, head_size].
            covariance: [layers, query_heads, head_size, head_size].
            rotation: [chunks, rotary_dim / 2] complex64: row j belongs to boundary (j + 1) * C.
            epsilon: parameter of the scorer.
            device: where launches read them.
        """
        # A layer at a time: all of them in float64 are some hundred megabytes.
        factor = torch.stack([_factor(layer).float() for layer in covariance])
        return cls(
            mean=mean.float().contiguous().to(device),
            factor=factor.to(device),
            rotation=torch.view_as_real(rotation).float().contiguous().to(device),
            epsilon=float(epsilon),
        )

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, factor and rotation."""
        return self.mean, self.factor, self.rotation


@dataclass(frozen=True)
class RowWeights:
    """What `learned` makes scores of, and RoPE's rotations, all in float32.

    A token at position jC - W + i is turned by the rotation of jC - W, then by that of i.

    Attributes:
        weights: [layers, kv_heads, 2 * head_size + 4].
        steps: [C, rotary_dim / 2, 2], cosine and sine of the rotation by i.
        rotation: [chunks, rotary_dim / 2, 2], of the rotation by jC - W.
        epsilon: unused.
    """

    weights: Tensor
    steps: Tensor
    rotation: Tensor
    epsilon: float = 0.0

    @classmethod
    def of(
        cls,
        weights: Tensor,
        frequencies: Tensor,
        *,
        chunk_size_tokens: int,
        window_size_tokens: int,
        num_chunks: int,
        device: torch.device | str,
    ) -> RowWeights:
        """The statistics on a device.

        Args:
            weights: [layers, kv_heads, 2 * head_size + 4].
            frequencies: [rotary_dim / 2], radians per position.
            chunk_size_tokens: C.
            window_size_tokens: W.
            num_chunks: that a request has at most.
            device: where launches read them.
        """

        def turns(positions: Tensor) -> Tensor:
            angles = positions.double()[:, None] * frequencies.double()
            return torch.stack((angles.cos(), angles.sin()), dim=-1).float().to(device)

        starts = torch.arange(num_chunks) * chunk_size_tokens - window_size_tokens
        return cls(
            weights=weights.float().contiguous().to(device),
            steps=turns(torch.arange(chunk_size_tokens)),
            rotation=turns(starts),
        )

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, steps and rotation."""
        return self.weights, self.steps, self.rotation


def _factor(covariance: Tensor) -> Tensor:
    """F [..., n, n] float64 with F @ F^T the symmetric part of [..., n, n].

    A covariance of few samples has directions without variance, which rounding may make negative;
    these count as zero.
    """
    covariance = covariance.double()
    covariance = (covariance + covariance.mT) / 2
    factor, failed = torch.linalg.cholesky_ex(covariance)
    for index in failed.nonzero().tolist():
        values, vectors = torch.linalg.eigh(covariance[tuple(index)])
        factor[tuple(index)] = vectors * values.clamp(min=0).sqrt()
    return factor
