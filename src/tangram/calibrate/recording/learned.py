"""Learning a scorer from a model: which rows its later questions and answers look at.

In every chunk of the samples, later queries pay some attention to each token. The weights of
`tangram.scorers.learned` are those under which the scores of a chunk, as shares of their sum, are
nearest to the largest attention that a later query pays to each token, times its value's norm (the
least cross-entropy; chunks that are looked at more weigh more, those that nobody looks at nothing).
The problem is convex, so that its solution depends on the samples alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tangram.errors import ProfileError
from tangram.profile import ROPE_FREQUENCIES, ROW_WEIGHTS, ModelIdentity
from tangram.scorers.learned import num_features, row_features, turn_back

MOST_TOKENS = 32768
"""Whose rows are kept in memory, of all samples together."""
MOST_QUERIES = 1024
"""Of a sample that are looked at, spread evenly over those from the first later answer on."""
PENALTY = 1e-3
"""On squared weights of features in units of their deviation, per head."""
_STEPS = 60
_QUERIES_AT_ONCE = 64


class LearnedRows:
    """Takes queries, keys and values of full-KV runs; gives the weights of the scorer `learned`.

    Args:
        model: the network.
        rope_frequencies: [rotary dimensions / 2] float64, radians per position, neox style.
        chunk_size_tokens: C.
        window_size_tokens: W.
        softmax_scale: factor on query . key before the softmax.
        num_samples: how many will come: each keeps its share of `MOST_TOKENS`.
    """

    def __init__(
        self,
        model: ModelIdentity,
        rope_frequencies: Tensor,
        *,
        chunk_size_tokens: int,
        window_size_tokens: int,
        softmax_scale: float,
        num_samples: int,
    ) -> None:
        self._model, self._frequencies = model, rope_frequencies.detach().cpu().double()
        self._chunk, self._window = chunk_size_tokens, window_size_tokens
        self._scale = softmax_scale
        self._most_chunks = max(1, MOST_TOKENS // (chunk_size_tokens * max(1, num_samples)))
        self._later: Sequence[int] = ()
        self._kept: list[list[tuple[Tensor, Tensor, Tensor, Tensor]]] = [
            [] for _ in range(model.num_layers)
        ]

    def begin_sample(self, later: Sequence[int]) -> None:
        """Tell where later answers are generated in the sample whose layers come next.

        Args:
            later: positions of the queries that generate them, rising; all queries where empty.
        """
        self._later = later

    @torch.no_grad()
    def add_layer(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        """Take one layer of the current sample.

        Args:
            layer: attention layer.
            queries: [tokens, query_heads, head_size] after RoPE, of positions 0, 1, 2 ...
            keys: [tokens, kv_heads, head_size] after RoPE.
            values: the same shape as `keys`.
        """
        chunks = self._chunks(len(keys))
        if not chunks:
            return
        attention = self._attention(queries, keys)  # [kv_heads, sealed tokens]
        for start in chunks:
            part = slice(start, start + self._chunk)
            label = attention[:, part] * torch.linalg.vector_norm(values[part].float(), dim=-1).T
            positions = torch.arange(part.start, part.stop)
            rows = (keys[part].cpu(), values[part].cpu(), positions, label.cpu())
            self._kept[layer].append(rows)

    def arrays(self, device: torch.device | str = "cpu") -> dict[str, np.ndarray]:
        """The profile's arrays "row_weights" and "rope_frequencies".

        Args:
            device: where they are worked out.

        Raises:
            ProfileError: no sample has a second sealed chunk, or its rows are not finite.
        """
        if not self._kept[0]:
            raise ProfileError(
                f"no sample has more than {2 * self._chunk} tokens, so that none has a whole chunk "
                "with queries after it, which --compression-scorer learned learns from: give "
                "longer samples, or a smaller --compression-chunk-size"
            )
        weights = []
        for kept in self._kept:
            keys, values, positions, labels = (
                torch.stack(part).to(device) for part in zip(*kept, strict=True)
            )
            turned = turn_back(
                keys.float().movedim(2, 0), positions, self._frequencies.to(device)
            )  # [kv_heads, chunks, C, head_size]
            features = row_features(turned, values.float().movedim(2, 0))
            weights.append(fit(features, labels.transpose(0, 1)).cpu().numpy())
            kept.clear()
        return {ROW_WEIGHTS: np.stack(weights), ROPE_FREQUENCIES: self._frequencies.numpy().copy()}

    def _chunks(self, num_tokens: int) -> list[int]:
        """First tokens of the chunks that are learned from: whole ones with queries after them."""
        starts = list(range(self._chunk - self._window, num_tokens - self._chunk, self._chunk))
        starts = [start for start in starts if start + self._chunk + self._window < num_tokens]
        most = min(self._most_chunks, len(starts))
        return [starts[(2 * i + 1) * len(starts) // (2 * most)] for i in range(most)]

    def _attention(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[kv_heads, tokens], the largest attention from a later query, once a chunk is sealed."""
        tokens, device = len(keys), keys.device
        first = max(self._chunk, self._later[0]) if self._later else self._chunk
        first = min(first, tokens - 1)
        count = min(MOST_QUERIES, tokens - first)
        looking = first + (2 * torch.arange(count) + 1) * (tokens - first) // (2 * count)
        heads = keys.float().transpose(0, 1)  # [kv_heads, tokens, head_size]
        where = torch.arange(tokens, device=device)
        most = torch.zeros(heads.shape[:2], device=device)
        for tile in looking.to(device).split(_QUERIES_AT_ONCE):
            asked = queries[tile].float().unflatten(1, (len(heads), -1))
            asked = asked.permute(1, 2, 0, 3).flatten(1, 2)  # [kv_heads, G * queries, head_size]
            logits = (asked @ heads.mT * self._scale).unflatten(1, (-1, len(tile)))
            paid = logits.masked_fill(where > tile[:, None], -torch.inf).softmax(dim=-1)
            sealed = where < (tile // self._chunk * self._chunk - self._window)[:, None]
            most = torch.maximum(most, (paid * sealed).amax(dim=(1, 2)))
        return most


def fit(features: Tensor, labels: Tensor) -> Tensor:
    """Weights whose exponential is nearest to the labels, up to a factor for every chunk.

    Args:
        features: [heads, chunks, tokens, features] float32, the last of them constant.
        labels: [heads, chunks, tokens], not negative.

    Returns:
        [heads, features] float32; the constant makes the mean exponent 0.

    Raises:
        ProfileError: features or labels that are not finite.
    """
    if not (torch.isfinite(features).all() and torch.isfinite(labels).all()):
        raise ProfileError(
            "the samples have keys or values that are not finite: calibrate with --dtype bfloat16 "
            "or float32, or leave the text out"
        )
    mean = features.mean(dim=(1, 2))
    deviation = features.std(dim=(1, 2)).clamp_min(1e-6)
    units = (features - mean[:, None, None]) / deviation[:, None, None]
    goal = labels / labels.sum(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    flat = units.flatten(1, 2)
    weights = torch.zeros(*mean.shape, 1, device=features.device, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        scores = (flat @ weights).squeeze(-1).unflatten(1, goal.shape[1:])
        found = -(goal * scores.log_softmax(dim=-1)).sum() + PENALTY * weights.square().sum()
        found.backward()
        return found

    with torch.enable_grad():
        solver.step(loss)
    found = weights.detach().squeeze(-1) / deviation
    found[:, -1] = -(found[:, :-1] * mean[:, :-1]).sum(dim=1)
    assert found.shape[1] == num_features((found.shape[1] - 4) // 2)
    return found
