"""Mean and covariance of the queries before RoPE, for scorers that expect future attention."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tangram.errors import ProfileError
from tangram.profile import QUERY_COVARIANCE, QUERY_MEAN, ROPE_FREQUENCIES, ModelIdentity
from tangram.scorers.base import turn_pairs

# Bounds the float64 copies of a long sample.
_TILE_TOKENS = 1024


class QueryStatistics:
    """Running sums over all tokens of all samples but each sample's first S.

    The first tokens are left out because their queries are unlike all others. Sums are float64,
    so the order of the samples does not show beyond rounding.

    Args:
        model: the network.
        rope_frequencies: [rotary dimensions / 2] float64, radians per position; the first halves
            and second halves of the rotary dimensions are paired (neox style).
        n_sink_tokens: S.

    Source: ExpectedAttention, arXiv 2510.00636.
    """

    def __init__(self, model: ModelIdentity, rope_frequencies: Tensor, n_sink_tokens: int) -> None:
        if rope_frequencies.ndim != 1 or not 1 <= 2 * len(rope_frequencies) <= model.head_size:
            raise ProfileError(
                f"rope_frequencies must have shape [1 .. {model.head_size // 2}], half of the "
                f"rotary dimensions, got {list(rope_frequencies.shape)}"
            )
        self._frequencies = rope_frequencies.detach().to("cpu", torch.float64)
        self._n_sink_tokens = n_sink_tokens
        layers, heads, size = model.num_layers, model.num_query_heads, model.head_size
        self._counts = torch.zeros(layers, dtype=torch.int64)
        self._sums = torch.zeros(layers, heads, size, dtype=torch.float64)
        self._products = torch.zeros(layers, heads, size, size, dtype=torch.float64)

    def add_layer(self, layer: int, queries: Tensor) -> None:
        """Add one layer of one sample.

        Args:
            layer: attention layer.
            queries: [tokens, query_heads, head_size] after RoPE, of positions 0, 1, 2 ...

        Raises:
            ProfileError: queries that are not finite.
        """
        if not bool(torch.isfinite(queries).all()):
            raise ProfileError(
                f"a sample of {len(queries)} tokens has queries that are not finite in layer "
                f"{layer}: calibrate with --dtype bfloat16 or float32, or leave the text out"
            )
        for start in range(self._n_sink_tokens, len(queries), _TILE_TOKENS):
            tile = queries[start : start + _TILE_TOKENS]
            positions = torch.arange(start, start + len(tile), device=queries.device)
            heads = unrotate(tile, positions, self._frequencies).transpose(0, 1)
            self._counts[layer] += len(tile)
            self._sums[layer] += heads.sum(dim=1).cpu()
            self._products[layer] += (heads.mT @ heads).cpu()

    def state(self) -> dict[str, np.ndarray]:
        """What was gathered so far, for `restore`."""
        sums = {"counts": self._counts, "sums": self._sums, "products": self._products}
        return {name: tensor.numpy().copy() for name, tensor in sums.items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from where `state` was taken, with statistics of the same model."""
        for tensor, name in (
            (self._counts, "counts"), (self._sums, "sums"), (self._products, "products")
        ):  # fmt: skip
            tensor.copy_(torch.from_numpy(np.array(state[name])))

    def arrays(self) -> dict[str, np.ndarray]:
        """The profile's arrays "query_mean", "query_covariance" and "rope_frequencies".

        Raises:
            ProfileError: some layer has no token.
        """
        if not self._counts.all():
            empty = self._counts.eq(0).nonzero().flatten().tolist()
            raise ProfileError(f"no queries were recorded for the layers {empty}")
        mean = self._sums / self._counts[:, None, None]
        products = self._products / self._counts[:, None, None, None]
        covariance = products - mean[..., :, None] * mean[..., None, :]
        return {
            QUERY_MEAN: mean.float().numpy(),
            QUERY_COVARIANCE: covariance.float().numpy(),
            ROPE_FREQUENCIES: self._frequencies.numpy().copy(),
        }


def unrotate(queries: Tensor, positions: Tensor, rope_frequencies: Tensor) -> Tensor:
    """Queries as they were before RoPE.

    Args:
        queries: [tokens, heads, head_size]; dimensions past the rotary ones were not rotated.
        positions: [tokens].
        rope_frequencies: [rotary dimensions / 2] float64.

    Returns:
        [tokens, heads, head_size] float64.
    """
    angles = positions.double()[:, None] * rope_frequencies.to(positions.device)
    return turn_pairs(queries.double(), angles.cos()[:, None], angles.sin()[:, None])
