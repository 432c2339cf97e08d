"""The compressed cache as one step sees it: what kernels and references are given of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class CacheView(NamedTuple):
    """The cache of one layer in one step. All but `recent` and `scores` is every layer's.

    Tables may have more rows and columns than a step has requests and blocks; what lies beyond is
    not read.

    Attributes:
        sealed: [blocks, pages_per_block, H_p, P, 2 * head_size], rows [K | V] of the sealed chunks
            of all layers; the rows of a page lie side by side, other strides are free.
        sealed_table: [requests, chunks] int32, block of every sealed chunk.
        recent: [blocks, kv_heads, R, 2 * head_size], raw tokens of the layer, strided likewise.
        recent_table: [requests, blocks] int32, block of positions [i * R, (i + 1) * R); entries
            before the first raw token may be stale.
        query_start: [requests + 1] int32, where each request's queries begin in the step.
        seq_lens: [requests] int32, tokens computed after the step; 0 for a padded row.
        ring: [blocks, ring_block_tokens, layers, query_heads, head_size], the last W queries of all
            layers, position p at slot p % W; None for scorers that do not look at queries.
        ring_table: [requests, ring blocks] int32; slot s lies in block `s // ring_block_tokens`.
        scores: [blocks, kv_heads, R] float32, beside the raw tokens (`recent_scores`); None for
            scorers whose scores are not made with their tokens.
    """

    sealed: Tensor
    sealed_table: Tensor
    recent: Tensor
    recent_table: Tensor
    query_start: Tensor
    seq_lens: Tensor
    ring: Tensor | None = None
    ring_table: Tensor | None = None
    scores: Tensor | None = None

    def of_layer(self, recent: Tensor) -> CacheView:
        """The same step's view of the layer with these raw tokens."""
        # Every layer of every step asks: `_replace` would take the host four times as long.
        return CacheView(
            self.sealed,
            self.sealed_table,
            recent,
            self.recent_table,
            self.query_start,
            self.seq_lens,
            self.ring,
            self.ring_table,
            None if self.scores is None else recent_scores(recent),
        )


def recent_scores(recent: Tensor) -> Tensor:
    """The scores that lie behind a layer's raw tokens, block by block.

    Args:
        recent: [blocks, kv_heads, R, 2 * head_size] of a layout with stored scores.

    Returns:
        [blocks, kv_heads, R] float32, a view.
    """
    blocks, heads, R, _ = recent.shape
    floats = recent.view(torch.float32)
    block, head, row, _ = floats.stride()
    assert head == R * row, "the rows of a layer's part of a block lie side by side"
    first = floats.storage_offset() + heads * head
    return floats.as_strided((blocks, heads, R), (block, R, 1), first)
