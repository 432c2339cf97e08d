"""Storing queries on a GPU: a program takes one query of all heads, and the next of its share."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tangram.kernels.cache_view import CacheView
from tangram.kernels.launch import remember_compiled
from tangram.kernels.sizes import power_of_two

_MOST_PROGRAMS = 8
"""That one request gets. In a step with prefill most requests may be decodes, whose programs but
one have nothing to do."""


@remember_compiled
@triton.jit(do_not_specialize=["stride_table"])
def _store_queries_kernel(
    query_ptr,  # [tokens, heads, D]
    query_start_ptr,  # [requests + 1] int32
    seq_lens_ptr,  # [requests] int32
    table_ptr,  # [requests, ring blocks] int32
    ring_ptr,  # [blocks, R, heads, D]
    stride_query_token,
    stride_query_head,
    stride_table,
    stride_block,
    stride_row,
    stride_head,
    W: tl.constexpr,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    D_PAD: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    begin = tl.load(query_start_ptr + request)
    end = tl.load(query_start_ptr + request + 1)
    seq_len = tl.load(seq_lens_ptr + request)
    count = tl.minimum(tl.minimum(end - begin, seq_len), W)
    table = table_ptr + request * stride_table
    head = tl.arange(0, HEADS_PAD)[:, None]
    element = tl.arange(0, D_PAD)[None, :]
    mask = (head < HEADS) & (element < D)
    for nth in range(tl.program_id(1), count, tl.num_programs(1)):
        slot = (seq_len - 1 - nth) % W
        # A pool, and a long step's queries, can have more elements than 32 bits count.
        block = tl.load(table + slot // R).to(tl.int64)
        token = (end - 1 - nth).to(tl.int64)
        source = query_ptr + token * stride_query_token + head * stride_query_head + element
        target = ring_ptr + block * stride_block + (slot % R) * stride_row
        query = tl.load(source, mask=mask)
        tl.store(
            target + head * stride_head + element,
            query.to(ring_ptr.dtype.element_ty),
            mask=mask,
        )


def store_queries(query: Tensor, view: CacheView, layer: int, window_size_tokens: int) -> None:
    """See `tangram.kernels.store_queries.store_queries`."""
    assert view.ring is not None and view.ring_table is not None
    ring, ring_table = view.ring.select(2, layer), view.ring_table
    query_start, seq_lens = view.query_start, view.seq_lens
    requests = seq_lens.shape[0]
    if requests == 0:
        return
    _, R, heads, D = ring.shape
    assert query.shape[1:] == (heads, D), (query.shape, ring.shape)
    assert query_start.shape[0] > requests and ring_table.shape[0] >= requests
    assert ring_table.shape[1] * R >= window_size_tokens
    assert query.stride(2) == ring.stride(3) == ring_table.stride(1) == 1
    assert query_start.stride(0) == seq_lens.stride(0) == 1
    # All that one request can have if the others have one each; a program takes more if it must.
    most = max(1, query.shape[0] - requests + 1)
    programs = min(most, window_size_tokens, _MOST_PROGRAMS)
    _store_queries_kernel[(requests, programs)](
        query,
        query_start,
        seq_lens,
        ring_table,
        ring,
        query.stride(0),
        query.stride(1),
        ring_table.stride(0),
        ring.stride(0),
        ring.stride(1),
        ring.stride(2),
        W=window_size_tokens,
        HEADS=heads,
        R=R,
        D=D,
        HEADS_PAD=power_of_two(heads),
        D_PAD=power_of_two(D),
        num_warps=4,
    )
