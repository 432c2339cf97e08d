"""What a compressed model must answer, worked out the slow way and apart from the engine.

A plain transformers forward in float32 over the whole sequence at once, without a cache: attention
is a softmax under an explicit mask [KV head, query, key], and the mask is the definition itself.
The query at position p sees, for a KV head h,

- the tokens that h kept of every chunk j < p // C, chunk j being positions [jC - W, (j+1)C - W),
- and all tokens in [max(0, C * (p // C) - W), p].

What h keeps of a chunk are the best tokens by the scorer, which is given the layer's own keys;
these depend on the masked attention of the layers below, so each layer's mask is made inside its
forward.

Nothing of the engine, its geometry or its kernels may be imported here: only the budgets' type and
the scorer's interface.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM

from tangram.geometry import HeadGroups
from tangram.scorers.base import Chunks, Scorer
from tangram.scorers.gates import GateSizes

QUERIES_AT_ONCE = 1024
"""Queries whose mask and weights are held at a time; it bounds memory and changes no result."""

ATTENTION = "tangram_oracle"
"""Name under which transformers finds the attention below."""

Chosen = Callable[[int, int, int, Tensor, Tensor], list[int] | None]
"""(layer, head, chunk, keys, values), both [tokens, head_size], to the tokens of the chunk that an
engine kept, ascending; None where it has not sealed the chunk."""


class Oracle:
    """Answers of one model under one set of budgets and one scorer.

    Args:
        model_path: folder of a model whose layers all have full attention; loaded in float32.
        head_groups: budgets; None is full attention, where every token is seen.
        scorer: rates the tokens; may be None with full attention.
        chunk_size_tokens: C.
        window_size_tokens: W.
        n_sink_tokens: S, tokens at the start that every head keeps.
        page_size_rows: P, rows of each head in a page.
        statistics: [layers], the profile's arrays for each layer, for scorers that want some.
        score_noise: error that another implementation's scores may have, as a share of the score.
        score_floor: what a score counts as at least when its error is taken.
        chosen: what an engine kept, whose rounding decides more often than not. Its choice is then
            taken over, and has to be the best within `score_noise`.

    Attributes:
        kept: [layers], each [kv_heads, tokens] bool: what the heads kept of the sealed chunks in
            the last forward; False for tokens of chunks that were not sealed.
        close_calls: (layer, head, chunk) of the last forward where errors of `score_noise` could
            change what is kept. One such row can change every later answer, so an implementation
            can be held to these answers only for a text without close calls.
        kept_rows: rows that `chosen` named, in all forwards.
        differing_rows: those of them that this oracle would not have kept.
    """

    def __init__(
        self,
        model_path: str | Path,
        head_groups: HeadGroups | None,
        scorer: Scorer | None,
        *,
        chunk_size_tokens: int,
        window_size_tokens: int,
        n_sink_tokens: int,
        page_size_rows: int = 16,
        statistics: Sequence[Mapping[str, Tensor]] | None = None,
        score_noise: float = 1e-5,
        score_floor: float = 0.0,
        chosen: Chosen | None = None,
    ) -> None:
        self.head_groups = head_groups
        self.scorer = scorer
        self.C = chunk_size_tokens
        self.W = window_size_tokens
        self.S = n_sink_tokens
        self.P = page_size_rows
        self.statistics = statistics
        self.score_noise = score_noise
        self.score_floor = score_floor
        self.chosen = chosen
        self.kept_rows = self.differing_rows = 0
        self.kept: list[Tensor] = []
        self.close_calls: list[tuple[int, int, int]] = []

        AttentionInterface.register(ATTENTION, _attention)
        self.model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=torch.float32, attn_implementation=ATTENTION
        ).eval()
        layers = [module for module in self.model.modules() if hasattr(module, "layer_idx")]
        assert layers and (head_groups is None or len(layers) == head_groups.num_layers)
        for module in layers:
            assert getattr(module, "sliding_window", None) is None, "a layer has a sliding window"
            module.oracle = self
            module.register_forward_pre_hook(_note_hidden_states, with_kwargs=True)
        self.gates: Any = None
        if scorer is not None and scorer.stores_scores:
            sizes = self.model.config.hidden_size, head_groups.num_kv_heads
            self.gates = scorer.gates(torch.float32, "cpu", len(layers), GateSizes(*sizes))
        self.hidden_states: dict[int, Tensor] = {}

    @torch.inference_mode()
    def logprobs(self, token_ids: Sequence[int]) -> Tensor:
        """[tokens, vocabulary] float32, log-probabilities of the token after each position."""
        self.kept, self.close_calls = [], []
        ids = torch.tensor([list(token_ids)])
        logits = self.model(input_ids=ids, use_cache=False).logits[0]
        return logits.float().log_softmax(dim=-1)

    def greedy(self, prompt_ids: Sequence[int], num_tokens: int) -> list[int]:
        """The tokens that follow the prompt, one whole forward for each: for short answers."""
        ids = list(prompt_ids)
        for _ in range(num_tokens):
            ids.append(int(self.logprobs(ids)[-1].argmax()))
        return ids[len(prompt_ids) :]

    def mask(self, layer: int) -> Tensor:
        """[kv_heads, queries, keys] bool, what was seen in the last forward."""
        kept = self.kept[layer]
        queries = torch.arange(kept.shape[1])
        return torch.stack([self._sees(kept_by_head, queries) for kept_by_head in kept])

    # -- the definition ----------------------------------------------------------------------

    def _sees(self, kept: Tensor, queries: Tensor) -> Tensor:
        """[queries, tokens] bool for one head, from what it kept, [tokens] bool."""
        C, W = self.C, self.W
        t = torch.arange(kept.shape[0])
        p = queries[:, None]
        if self.head_groups is None:
            return t <= p
        chunk = (t + W) // C
        is_recent = t >= (C * (p // C) - W).clamp(min=0)
        is_kept = kept & (chunk < p // C)
        return (t <= p) & (is_recent | is_kept)

    def _keep(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[kv_heads, tokens] bool, from [tokens, heads, head_size] of the whole sequence."""
        num_tokens, num_heads = key.shape[:2]
        kept = torch.zeros(num_heads, num_tokens, dtype=torch.bool)
        if self.head_groups is None:
            return kept
        assert self.scorer is not None and num_heads == self.head_groups.num_kv_heads
        groups = zip(self.head_groups.heads[layer], self.head_groups.pages[layer], strict=True)
        rows_of_head = {head: pages * self.P for heads, pages in groups for head in heads}

        made = self.gates and self.gates[layer](self.hidden_states[layer])
        j = 0
        while (j + 1) * self.C <= num_tokens:
            boundary = (j + 1) * self.C
            start, stop = max(0, boundary - self.C - self.W), boundary - self.W
            chunks = Chunks(
                keys=key[start:stop],
                values=value[start:stop],
                positions=torch.arange(start, stop),
                softmax_scale=scale,
                window_size_tokens=self.W,
                window_queries=query[stop:boundary] if self.scorer.needs_window_queries else None,
                statistics=self.statistics[layer] if self.statistics is not None else {},
                stored_scores=None if made is None else made[start:stop],
            )
            scores = self.scorer.score(chunks)
            assert scores.shape == (stop - start, num_heads) and scores.dtype == torch.float32
            for head, rows in rows_of_head.items():
                sinks = self.S if j == 0 else 0
                of_head = scores[:, head].tolist()
                best = best_tokens(of_head, rows, sinks)
                if self.chosen is not None:
                    tokens = self.chosen(
                        layer, head, j, key[start:stop, head], value[start:stop, head]
                    )
                    if tokens is not None:
                        self._check_choice((layer, head, j), of_head, tokens, best, sinks)
                        best = tokens
                elif is_close_call(of_head, rows, sinks, self.score_noise):
                    self.close_calls.append((layer, head, j))
                kept[head, [start + token for token in best]] = True
            j += 1
        return kept

    def _check_choice(
        self,
        place: tuple[int, int, int],
        scores: list[float],
        tokens: list[int],
        best: list[int],
        sinks: int,
    ) -> None:
        """An engine's choice must be the best if every score is off by `score_noise` its way."""
        moved = shifted(scores, tokens, self.score_noise, self.score_floor)
        assert best_tokens(moved, len(best), sinks) == tokens, (place, tokens, best)
        self.kept_rows += len(best)
        self.differing_rows += len(set(best) - set(tokens))

    def _attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """[query_heads, tokens, head_size] from [heads, tokens, head_size]."""
        assert len(self.kept) == layer, "layers run in order"
        by_token = (tensor.transpose(0, 1) for tensor in (query, key, value))
        self.kept.append(self._keep(layer, *by_token, scale))

        num_tokens = query.shape[1]
        queries_per_head = query.shape[0] // key.shape[0]
        out = torch.empty_like(query)
        for queries in torch.arange(num_tokens).split(QUERIES_AT_ONCE):
            for head, kept in enumerate(self.kept[layer]):
                hidden = ~self._sees(kept, queries)
                for i in range(queries_per_head):
                    query_head = head * queries_per_head + i
                    logits = query[query_head, queries] @ key[head].T * scale
                    weights = logits.masked_fill_(hidden, -math.inf).softmax(dim=-1)
                    out[query_head, queries] = weights @ value[head]
        return out


def _note_hidden_states(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """What enters the attention block is what a gate makes its scores of."""
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    module.oracle.hidden_states[module.layer_idx] = hidden[0]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: [1, heads, tokens, head_size], after RoPE."""
    assert query.shape[0] == 1 and query.shape[2] == key.shape[2], "one sequence, no cache"
    assert attention_mask is None
    assert query.dtype == torch.float32
    out = module.oracle._attend(module.layer_idx, query[0], key[0], value[0], scaling)
    return out.transpose(0, 1)[None], None


def best_tokens(scores: Sequence[float], rows: int, n_sink_tokens: int) -> list[int]:
    """Indices of the tokens that a head keeps, ascending: sinks, then the best, later ones first.

    Args:
        scores: of every token of a chunk.
        rows: the head's budget; all tokens if they are not more.
        n_sink_tokens: tokens at the start that are kept whatever their score.
    """
    assert n_sink_tokens <= rows
    order = sorted(
        range(len(scores)),
        key=lambda token: (token < n_sink_tokens, rounded(scores[token]), token),
        reverse=True,
    )
    return sorted(order[:rows])


def is_close_call(scores: Sequence[float], rows: int, n_sink_tokens: int, noise: float) -> bool:
    """Whether the choice changes when kept scores sink and dropped ones rise by a share `noise`."""
    best = best_tokens(scores, rows, n_sink_tokens)
    return best_tokens(shifted(scores, best, -noise), rows, n_sink_tokens) != best


def shifted(
    scores: Sequence[float], kept: Sequence[int], noise: float, floor: float = 0.0
) -> list[float]:
    """The scores when those of `kept` rise, and the others sink, by a share `noise` of them.

    A score that is smaller than `floor` is shifted as if it were `floor`.
    """
    up = set(kept)
    return [
        score + noise * max(abs(score), floor) * (1 if token in up else -1)
        for token, score in enumerate(scores)
    ]


def rounded(score: float) -> float:
    """A float32 score to 11 significant bits, halves away from zero; NaN is below everything."""
    if math.isnan(score):
        return -math.inf
    if math.isinf(score):
        return score
    # score = m * 2**exponent with 0.5 <= m < 1; below the smallest normal float32, 2**-126, the
    # step stays that of the smallest normal.
    exponent = max(math.frexp(score)[1], -125)
    step = math.ldexp(1.0, exponent - 11)
    magnitude = math.floor(abs(score) / step + 0.5) * step
    if magnitude >= 2.0**128:
        magnitude = math.inf
    return math.copysign(magnitude, score)
