"""Any transformers model with a compressed cache, in plain torch, without vLLM.

Tokens go through all layers in blocks that end at multiples of C, so that a chunk is sealed, and
what a query sees is decided, as the engine does it. Rows that are dropped stay in memory and are
masked: what is looked for is what they were worth, not what they cost.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.accuracy.plain import FIRST, Keep, Sizes
from tangram.errors import UnsupportedError
from tangram.scorers import Chunks, Scorer, checked_scores, score_ranks

ATTENTION = "tangram_ceiling"
"""Under which name transformers knows this file's attention."""


class Sealing(NamedTuple):
    """A chunk of all layers, at the boundary where its rows are chosen.

    `layers` holds for each layer keys and values [tokens, kv_heads, head_size] and the queries
    [W, query_heads, head_size] of the window after them.
    """

    first_position: int
    layers: Sequence[tuple[Tensor, Tensor, Tensor]]
    softmax_scale: float


Ranking = Callable[[Sealing], Tensor]
"""From a chunk to the scores of its rows, [layers, tokens, kv_heads] float32, higher = keep."""


def by_scorer(
    scorer: Scorer, window: int, statistics: Sequence[Mapping[str, Tensor]] | None
) -> Ranking:
    """The ranking of a scorer of the package.

    Args:
        scorer: rates a chunk of one layer.
        window: W.
        statistics: for each layer what the profile knows of it.
    """

    def rank(sealing: Sealing) -> Tensor:
        scores = []
        for layer, (keys, values, queries) in enumerate(sealing.layers):
            positions = torch.arange(len(keys), device=keys.device) + sealing.first_position
            chunk = Chunks(
                keys=keys,
                values=values,
                positions=positions,
                softmax_scale=sealing.softmax_scale,
                window_size_tokens=window,
                window_queries=queries if scorer.needs_window_queries else None,
                statistics={} if statistics is None else statistics[layer],
            )
            scores.append(checked_scores(scorer, chunk))
        return torch.stack(scores)

    return rank


def by_label(label: Tensor) -> Ranking:
    """The oracle's ranking.

    Args:
        label: [layers, kv_heads, tokens], the largest attention that questions to come pay.
    """

    def rank(sealing: Sealing) -> Tensor:
        first, tokens = sealing.first_position, len(sealing.layers[0][0])
        return label[:, :, first : first + tokens].transpose(1, 2).contiguous()

    return rank


class Run:
    """One conversation.

    Args:
        model: a causal language model of transformers, made ready by `prepare`.
        sizes: C, W and S.
        ranking: rates a chunk's rows; None seals nothing: full KV.
        keep: chooses rows by their order, see `plain.Keep`.
        sees_all: queries below this position see all tokens before them, whatever was dropped.
        labels_from: queries from this position on are asked for what they attend to.

    Attributes:
        label: [layers, kv_heads, tokens], of every row the largest attention that a query from
            `labels_from` on paid to it once its chunk was, or would have been, sealed.
        kept_rows: [chunks] of [layers, kv_heads], rows kept.
    """

    def __init__(
        self,
        model: Any,
        sizes: Sizes,
        ranking: Ranking | None = None,
        keep: Keep | None = None,
        *,
        sees_all: int = 0,
        labels_from: int | None = None,
    ) -> None:
        self._model, self._sizes = model, sizes
        self._ranking, self._keep = ranking, keep
        self._sees_all, self._labels_from = sees_all, labels_from
        layers = model.config.get_text_config().num_hidden_layers
        self._rows: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self._queries: list[Tensor | None] = [None] * layers
        self._labels: list[Tensor | None] = [None] * layers
        self._dropped: Tensor | None = None
        self._scale = 1.0
        self.length = 0
        self.kept_rows: list[Tensor] = []

    def fork(self) -> Run:
        """A run that goes on from here by itself."""
        other = copy.copy(self)
        for name in ("_rows", "_queries", "_labels", "kept_rows"):
            setattr(other, name, list(getattr(self, name)))
        return other

    @property
    def label(self) -> Tensor:
        """See the class; 0 where nobody looked."""
        found = [label for label in self._labels if label is not None]
        if not found:
            (keys, _), *_ = self._rows
            return keys.new_zeros(len(self._rows), keys.shape[0], self.length, dtype=torch.float32)
        padded = [F.pad(label, (0, self.length - label.shape[1])) for label in found]
        return torch.stack(padded)

    @torch.inference_mode()
    def read(self, tokens: Sequence[int], wanted: Sequence[int] = ()) -> Tensor:
        """Go on by some tokens.

        Args:
            tokens: ids.
            wanted: positions of the conversation, among these tokens, rising.

        Returns:
            [wanted, vocabulary] float32, logits of the next tokens there.
        """
        C = self._sizes.chunk
        found, ids = [], torch.tensor(list(tokens), device=self._model.device)
        while len(ids):
            block, ids = ids.split([n := min(C - self.length % C, len(ids)), len(ids) - n])
            here = [p - self.length for p in wanted if self.length <= p < self.length + n]
            positions = torch.arange(self.length, self.length + n, device=block.device)
            self.length += n
            logits = self._model(
                input_ids=block[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=torch.tensor(here or [n - 1], device=block.device),
                ceiling_run=self,
            ).logits[0]
            found += [logits.float()] if here else []
            if self.length % C == 0 and self._ranking is not None:
                self._seal()
        return torch.cat(found) if found else torch.empty(0)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of a block in one layer.

        Args:
            layer: its number.
            query: [query_heads, tokens, head_size], after RoPE.
            key: [kv_heads, tokens, head_size], after RoPE.
            value: the same.
            scale: on query . key.

        Returns:
            [tokens, query_heads, head_size].
        """
        before = self._rows[layer]
        if before is not None:
            key, value = (torch.cat(p, dim=1) for p in zip(before, (key, value), strict=True))
        self._rows[layer], self._scale = (key, value), scale
        past = self._queries[layer]
        queries = query if past is None else torch.cat((past, query), dim=1)
        self._queries[layer] = queries[:, -max(self._sizes.window, 1) :]
        tokens, group = query.shape[1], query.shape[0] // key.shape[0]
        where = torch.arange(self.length, device=key.device)
        mine = where[-tokens:, None]
        sees = (where <= mine).expand(key.shape[0], -1, -1)
        if self._dropped is not None:
            gone = F.pad(self._dropped[layer], (0, self.length - self._dropped.shape[2]))
            sees = sees & ~(gone[:, None] & (mine >= self._sees_all))
        sees = sees.repeat_interleave(group, dim=0)
        if self._labels_from is not None and self.length > self._labels_from:
            self._look(layer, query, key, sees)
        out = F.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=sees[None], scale=scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    def _look(self, layer: int, query: Tensor, key: Tensor, sees: Tensor) -> None:
        """Note what the questions among the block's queries attend to."""
        tokens = query.shape[1]
        begin = self.length - tokens
        first = max(self._labels_from or 0, begin) - begin
        # All queries of a block see the same chunks sealed: those before it.
        sealed = max(0, begin // self._sizes.chunk * self._sizes.chunk - self._sizes.window)
        if not sealed:
            return
        asked = query[:, first:].unflatten(0, (key.shape[0], -1)).float()
        logits = asked @ key[:, None].float().mT * self._scale  # [kv_heads, G, asked, tokens]
        seen = sees[:, first:].unflatten(0, (key.shape[0], -1))
        paid = logits.masked_fill(~seen, -torch.inf).softmax(dim=-1)[..., :sealed]
        most = paid.amax(dim=(1, 2))
        old = self._labels[layer]
        if old is not None:
            most = torch.maximum(most, F.pad(old, (0, sealed - old.shape[1])))
        self._labels[layer] = most

    def _seal(self) -> None:
        """Choose the rows of the chunk before the boundary, of all layers at once."""
        C, W = self._sizes.chunk, self._sizes.window
        first, stop = max(0, self.length - C - W), self.length - W
        layers = []
        for rows, queries in zip(self._rows, self._queries, strict=True):
            assert rows is not None and queries is not None
            keys, values = (part[:, first:stop].transpose(0, 1) for part in rows)
            window = queries[:, queries.shape[1] - W :].transpose(0, 1)
            layers.append((keys, values, window))
        assert self._ranking is not None and self._keep is not None
        scores = self._ranking(Sealing(first, layers, self._scale))
        later = torch.arange(stop - first, device=scores.device)[:, None]
        order = score_ranks(scores).long() * len(later) + later
        kept = self._keep(order.masked_fill(later + first < self._sizes.sinks, FIRST))
        self.kept_rows.append(kept.sum(dim=1))
        gone = ~kept.transpose(1, 2)  # [layers, kv_heads, tokens]
        before = self._dropped
        self._dropped = gone if before is None else torch.cat((before, gone), dim=2)


def prepare(model: Any) -> Any:
    """The model, with this file's attention.

    Raises:
        UnsupportedError: its attention cannot be replaced.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attend)
    try:
        model.set_attn_implementation(ATTENTION)
    except ValueError as error:
        raise UnsupportedError(
            f"{type(model).__name__} does not take another attention ({error}): take a model that "
            "does, such as those of Llama's and Qwen's families"
        ) from error
    return model.eval()


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scaling: float,
    ceiling_run: Run, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    out = ceiling_run.attend(module.layer_idx, query[0], key[0], value[0], scaling)
    return out[None], None
