"""What one attention layer does in one step, gathered in one place for all who take part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tangram.kernels.cache_view import CacheView, recent_scores
from tangram.kernels.flash import SealedStep
from tangram.kernels.segments import SealingChunks, Segments, cut_step
from tangram.kernels.store import store
from tangram.kernels.store_queries import store_queries

if TYPE_CHECKING:
    from tangram.vllm_plugin.worker.storage import QueryRing, SealedCache


@dataclass
class HostStep:
    """A step cut on the host.

    Attributes:
        query_start: [requests + 1] int64, where each request's queries begin.
        num_tokens_after: [requests] int64, tokens computed after the step.
        segments: the step cut at multiples of C.
        sealing: chunks that the step completes.
        num_decodes: requests at the front of the batch that compute one token; for kernels.
        sampled: the one of them whose scores are compared with the profile, if any.
        tiles: [tiles, columns] int32 on the device, of the other requests' queries; for kernels.
        sealed_step: those of them whose sealed rows FlashAttention takes, if any.
    """

    query_start: np.ndarray
    num_tokens_after: np.ndarray
    segments: Segments
    sealing: SealingChunks
    num_decodes: int = 0
    sampled: SealingChunks | None = None
    tiles: Tensor | None = None
    sealed_step: SealedStep | None = None


@dataclass
class LayerStep:
    """One layer in one step.

    Attributes:
        layer: ordinal of the layer among those that are compressed.
        softmax_scale: factor on query times key.
        query: [tokens, query_heads, head_size], after RoPE, without padding.
        key: [tokens or more, kv_heads, head_size], after RoPE.
        value: the same shape.
        out: [tokens or more, query_heads, head_size], to be written.
        slot_mapping: [tokens] int64, block * R + offset in the block; negative for padding.
        view: the cache of the layer.
        sealed: the layout in force, the scorer, and what watches for drift.
        host: the step as the host cut it; None in a step that kernels cut, which may be part of a
            CUDA graph and knows nothing of the host.
        is_decode: every request computes one token, or none.
        scores: [tokens or more, kv_heads] float32, made with the tokens, where the scorer does so.
    """

    layer: int
    softmax_scale: float
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    slot_mapping: Tensor
    view: CacheView
    sealed: SealedCache
    host: HostStep | None
    is_decode: bool
    scores: Tensor | None = None

    def store_rows(self) -> None:
        """Write the step's keys, values and scores to recent blocks."""
        store(
            self.key,
            self.value,
            self.slot_mapping,
            self.view.recent,
            self.scores,
            self.view.scores,
        )

    def store_queries(self) -> None:
        """Keep the step's last queries in the ring, if there is one.

        Only once a step with prefill has sealed: until then it needs those that they replace.
        """
        if self.view.ring is not None:
            W = self.sealed.geometry.window_size_tokens
            store_queries(self.query, self.view, self.layer, W)


def harmless_step(
    sealed: SealedCache, recent: Tensor, ring: QueryRing | None
) -> tuple[LayerStep, HostStep]:
    """Layer 0 of a step of one token, which comes after a sealed chunk.

    All blocks of its request are the null block: it seals nothing, and reads and writes nothing of
    any request.
    """
    g, device = sealed.geometry, recent.device
    query_start, after = np.array([0, 1]), np.array([g.chunk_size_tokens + 1])
    blocks = max(-(-after[0] // g.recent_block_tokens), g.ring_blocks)
    null = torch.zeros(1, blocks, dtype=torch.int32, device=device)
    query = torch.zeros(1, g.num_query_heads, g.head_size, dtype=recent.dtype, device=device)
    view = CacheView(
        sealed=sealed.pages,
        sealed_table=null,
        recent=recent,
        recent_table=null,
        query_start=torch.from_numpy(query_start).to(device, torch.int32),
        seq_lens=torch.from_numpy(after).to(device, torch.int32),
        ring=None if ring is None else ring.queries,
        ring_table=None if ring is None else null,
        scores=recent_scores(recent) if g.has_stored_scores else None,
    )
    step = LayerStep(
        layer=0,
        softmax_scale=1.0,
        query=query,
        key=query[:, : g.num_kv_heads],
        value=query[:, : g.num_kv_heads],
        out=torch.empty_like(query),
        slot_mapping=null[0, :1].long(),
        view=view,
        sealed=sealed,
        host=None,
        is_decode=False,
    )
    return step, HostStep(query_start, after, *cut_step(g, query_start, after))
