"""Laying out a layer's sequences for FlashAttention: queries by KV head, and tables of pages.

One program copies some queries of one segment, for one KV head and all query heads that read it,
and writes its share of that sequence's pages.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tangram.kernels.cache_view import CacheView
from tangram.kernels.flash.tables import SEGMENT_COLUMNS, SealedStep, page_strides
from tangram.kernels.launch import remember_compiled
from tangram.kernels.prefill.tables import HEAD_COLUMNS
from tangram.kernels.sizes import HEAD_SIZES

QUERY_ROWS = 64
"""Rows that a program copies; a row is one query of one query head."""
PAGES = 128
"""Pages that a program writes at once."""


@remember_compiled
@triton.jit(do_not_specialize=["num_gathered", "table_width", "stride_sealed_request"])
def _gather_kernel(
    query_ptr,  # [tokens, query_heads, D]
    segments_ptr,  # [segments, SEGMENT_COLUMNS] int32
    heads_ptr,  # [kv_heads, HEAD_COLUMNS] int32
    sealed_table_ptr,  # [requests, chunks] int32
    gathered_ptr,  # [kv_heads, num_gathered, G, D]
    pages_ptr,  # [kv_heads, segments, table_width] int32
    rows_ptr,  # [kv_heads, segments] int32
    num_gathered,
    table_width,
    stride_query_token,
    stride_query_head,
    stride_sealed_request,
    block_pages,
    page_pages,
    member_pages,
    G: tl.constexpr,  # query heads of a KV head
    D: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    SEGMENT_COLUMNS: tl.constexpr,
    HEAD_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    PAGES: tl.constexpr,
):
    part = tl.program_id(2)
    rank = tl.program_id(1).to(tl.int64)
    segment = segments_ptr + tl.program_id(0) * SEGMENT_COLUMNS
    request = tl.load(segment).to(tl.int64)
    first_query = tl.load(segment + 1).to(tl.int64)
    num_queries = tl.load(segment + 2)
    sealed_chunks = tl.load(segment + 3)
    first_gathered = tl.load(segment + 4)
    head = heads_ptr + rank * HEAD_COLUMNS
    kv_head = tl.load(head).to(tl.int64)
    first_page = tl.load(head + 1)
    budget_pages = tl.load(head + 2)
    member = tl.load(head + 3)
    skipped_pages = tl.load(head + 4) // PAGE_ROWS
    sequence = rank * tl.num_programs(0) + tl.program_id(0)

    num_pages = sealed_chunks * budget_pages - skipped_pages
    for begin in range(part * PAGES, num_pages, tl.num_programs(2) * PAGES):
        index = begin + tl.arange(0, PAGES)
        virtual = skipped_pages + index
        chunk = virtual // budget_pages
        block_at = sealed_table_ptr + request * stride_sealed_request + chunk
        block = tl.load(block_at, mask=index < num_pages, other=0)
        page = first_page + virtual - chunk * budget_pages
        page = block * block_pages + page * page_pages + member * member_pages
        tl.store(pages_ptr + sequence * table_width + index, page, mask=index < num_pages)
    if part == 0:
        tl.store(rows_ptr + sequence, num_pages * PAGE_ROWS)

    PER_PART: tl.constexpr = ROWS // G
    row = tl.arange(0, ROWS)
    element = tl.arange(0, D)
    query = part * PER_PART + row // G
    is_query = ((row < PER_PART * G) & (query < num_queries))[:, None]
    query_head = kv_head * G + row % G
    source = (first_query + query) * stride_query_token + query_head * stride_query_head
    target = ((rank * num_gathered + first_gathered + query) * G + row % G) * D
    rows = tl.load(query_ptr + source[:, None] + element[None, :], mask=is_query)
    tl.store(gathered_ptr + target[:, None] + element[None, :], rows, mask=is_query)


def gather(
    query: Tensor,
    step: SealedStep,
    view: CacheView,
    head_table: Tensor,
    *,
    gathered: Tensor,
    pages: Tensor,
    rows: Tensor,
) -> None:
    """Write the queries, page tables and lengths of a layer's sequences.

    Args:
        query: [tokens, query_heads, head_size], any strides but the last.
        step: the segments.
        view: the cache.
        head_table: [kv_heads, 6] int32, from `make_head_table`.
        gathered: [kv_heads * queries, G, head_size], to be written.
        pages: [kv_heads * segments, max_pages] int32, to be written, as far as a sequence has
            pages: numbers of the pages of `head_pages`.
        rows: [kv_heads * segments] int32, to be written: sealed rows of every sequence.
    """
    num_kv_heads, num_segments = head_table.shape[0], step.segments.shape[0]
    _, per, head_size = gathered.shape
    sealed_table = view.sealed_table
    assert step.segments.dtype == head_table.dtype == sealed_table.dtype == torch.int32
    assert pages.dtype == rows.dtype == torch.int32 and sealed_table.stride(1) == 1
    assert step.segments.is_contiguous() and head_table.is_contiguous()
    assert gathered.is_contiguous() and pages.is_contiguous() and rows.is_contiguous()
    assert query.stride(2) == 1 and query.shape[1:] == (num_kv_heads * per, head_size)
    assert head_size in HEAD_SIZES and per <= QUERY_ROWS
    assert gathered.shape[0] == num_kv_heads * step.num_queries
    assert pages.shape == (num_kv_heads * num_segments, step.max_pages)
    parts = -(-step.max_queries // (QUERY_ROWS // per))
    _gather_kernel[num_segments, num_kv_heads, parts](
        query,
        step.segments,
        head_table,
        sealed_table,
        gathered,
        pages,
        rows,
        step.num_queries,
        step.max_pages,
        *query.stride()[:2],
        sealed_table.stride(0),
        *page_strides(view.sealed),
        G=per,
        D=head_size,
        PAGE_ROWS=view.sealed.shape[3],
        SEGMENT_COLUMNS=len(SEGMENT_COLUMNS),
        HEAD_COLUMNS=len(HEAD_COLUMNS),
        ROWS=QUERY_ROWS,
        PAGES=PAGES,
        num_warps=4,
    )
