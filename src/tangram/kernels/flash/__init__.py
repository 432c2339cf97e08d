"""The sealed part of prefill attention on FlashAttention, where a head's page is a page of its own.

`SealedStep.make` is called once a step, `attend_sealed` for every layer; `prefill_attention` goes
on from its result with the raw tokens.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tangram.kernels.cache_view import CacheView
from tangram.kernels.flash.tables import (
    MAX_PAGE_NUMBERS,
    MIN_PAIRS,
    SealedStep,
    SealedWorkspace,
    fits,
    head_pages,
    page_numbers,
    sealed_pairs,
)

__all__ = [
    "MAX_PAGE_NUMBERS",
    "MIN_PAIRS",
    "PagedAttention",
    "SealedPart",
    "SealedStep",
    "SealedWorkspace",
    "attend_sealed",
    "fits",
    "head_pages",
    "page_numbers",
    "sealed_pairs",
]


class PagedAttention(Protocol):
    """FlashAttention over sequences of paged keys and values, every query seeing all its rows."""

    def __call__(
        self,
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        max_seqlen_q: int,
        seqused_k: Tensor,
        max_seqlen_k: int,
        block_table: Tensor,
        softmax_scale: float,
        out: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Write `out`; gives it and the natural logarithm of the sums of exponentials.

        Args:
            q: [queries, query_heads, head_size], of one sequence after the other.
            k: [pages, P, kv_heads, head_size], any strides but the last.
            v: the same.
            cu_seqlens_q: [sequences + 1] int32, where a sequence's queries begin.
            max_seqlen_q: most queries of a sequence.
            seqused_k: [sequences] int32, rows of every sequence, at least one.
            max_seqlen_k: most rows of a sequence, or more.
            block_table: [sequences, pages] int32, entries past a sequence's rows are not read.
            softmax_scale: factor on query times key.
            out: like q.

        Returns:
            `out`, and [query_heads, queries] float32.
        """
        ...


class SealedPart(NamedTuple):
    """Attention to sealed rows alone, for the queries of a `SealedStep`.

    Attributes:
        out: [kv_heads * queries, G, head_size], KV heads in the order of the layer's head table.
        lse_ln: [G, kv_heads * queries] float32, natural logarithm of the sum of exponentials.
    """

    out: Tensor
    lse_ln: Tensor


def attend_sealed(
    query: Tensor,
    step: SealedStep,
    view: CacheView,
    *,
    head_table: Tensor,
    softmax_scale: float,
    attention: PagedAttention,
    workspace: SealedWorkspace,
) -> SealedPart:
    """Attend the step's queries to the sealed rows of one layer.

    Args:
        query: [tokens, query_heads, head_size], after RoPE.
        step: the segments that see sealed rows.
        view: the cache, of a layout that `fits`; raw tokens are not looked at.
        head_table: [kv_heads, 6] int32 on the device, from `make_head_table`.
        softmax_scale: factor on query times key.
        attention: FlashAttention.
        workspace: holds the result until the next call.
    """
    from tangram.kernels.flash import kernel

    num_kv_heads, num_segments = head_table.shape[0], step.segments.shape[0]
    tokens, num_query_heads, head_size = query.shape
    shape = num_kv_heads * step.num_queries, num_query_heads // num_kv_heads, head_size
    gathered = workspace.give("queries", query.dtype, *shape)
    num_sequences = num_kv_heads * num_segments
    pages = workspace.give("pages", torch.int32, num_sequences, step.max_pages)
    rows = workspace.give("rows", torch.int32, num_sequences)
    kernel.gather(query, step, view, head_table, gathered=gathered, pages=pages, rows=rows)
    keys, values = head_pages(view.sealed)
    out, lse_ln = attention(
        q=gathered,
        k=keys,
        v=values,
        cu_seqlens_q=step.starts,
        max_seqlen_q=step.max_queries,
        seqused_k=rows,
        max_seqlen_k=step.max_pages * view.sealed.shape[3],
        block_table=pages,
        softmax_scale=softmax_scale,
        out=workspace.give("out", query.dtype, *shape),
    )
    return SealedPart(out, lse_ln)
