"""Attention of a step's queries over sealed pages and raw tokens, in Triton.

One program takes one tile of queries of one segment, for one KV head and all query heads that read
it. All queries of a segment see the same sealed rows and the same first raw token, so only the last
raw rows of a tile need a mask:

    sealed rows, whole blocks | raw rows that every query sees, whole blocks | the rest of both

A head's sealed rows over all chunks are one run of virtual rows, first_row(chunk 0) onwards;
virtual row v is row v % budget of chunk v // budget.

Where another kernel has attended to the sealed rows before, a tile begins from its result: a mean
of values, whose sum of exponentials is known, is a running softmax like any other.

Table entries are fetched one iteration ahead, so that an iteration's addresses are known when it
begins and its rows can be fetched asynchronously.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from tangram.kernels.cache_view import CacheView
from tangram.kernels.launch import remember_compiled
from tangram.kernels.prefill.tables import HEAD_COLUMNS, TILE_COLUMNS, Blocks, choose_blocks
from tangram.kernels.sizes import HEAD_SIZES, shared_bytes

if TYPE_CHECKING:
    from tangram.kernels.flash import SealedPart

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _chunk_of(virtual, divisor, PAGE_ROWS: tl.constexpr):
    """Chunk of a virtual row: its page over the pages of a chunk, by `divisor`, see tables.py."""
    return tl.umulhi((virtual // PAGE_ROWS * 2).to(tl.uint32), divisor).to(tl.int32)


@triton.jit
def update(q, rows_ptr, in_reach, mixed, peak, total, sees, scale_log2):
    """Take one block of rows into the running softmax; `peak` is a base-2 logarithm.

    `in_reach` and `sees` are None where every row lies in reach and every query sees it. A query
    may have seen no row yet, and see none of this block.
    """
    D: tl.constexpr = q.shape[1]
    other: tl.constexpr = None if in_reach is None else 0.0
    key = tl.load(rows_ptr, mask=in_reach, other=other)
    scores = tl.dot(q, tl.trans(key), input_precision="ieee")
    if sees is not None:
        scores = tl.where(sees, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
    offset = new_peak if sees is None else tl.where(new_peak > float("-inf"), new_peak, 0.0)
    weights = tl.exp2(scores * scale_log2 - offset[:, None])
    fade = tl.exp2(peak - offset)
    total = total * fade + tl.sum(weights, 1)
    value = tl.load(rows_ptr + D, mask=in_reach, other=other)
    mixed = tl.dot(weights.to(value.dtype), value, mixed * fade[:, None], input_precision="ieee")
    return mixed, new_peak, total


@remember_compiled
@triton.jit(do_not_specialize=["num_gathered", "stride_sealed_request", "stride_recent_request"])
def _prefill_kernel(
    query_ptr,  # [tokens, query_heads, D]
    out_ptr,  # [tokens, query_heads, D]
    tiles_ptr,  # [tiles, TILE_COLUMNS] int32
    heads_ptr,  # [kv_heads, HEAD_COLUMNS] int32
    sealed_ptr,  # [blocks, pages_per_block, H_p, PAGE_ROWS, 2 * D]
    sealed_table_ptr,  # [requests, chunks] int32
    recent_ptr,  # [blocks, kv_heads, BLOCK_TOKENS, 2 * D]
    recent_table_ptr,  # [requests, blocks] int32
    part_ptr,  # [kv_heads, num_gathered, G, D], attention to sealed rows; None without
    part_lse_ln_ptr,  # [G, kv_heads, num_gathered] float32
    num_gathered,
    scale_log2,
    stride_query_token,
    stride_query_head,
    stride_out_token,
    stride_out_head,
    stride_sealed_block,
    stride_sealed_page,
    stride_sealed_member,
    stride_sealed_row,
    stride_sealed_request,
    stride_recent_block,
    stride_recent_head,
    stride_recent_row,
    stride_recent_request,
    G: tl.constexpr,  # query heads of a KV head
    D: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    HEAD_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    tile = tiles_ptr + tl.program_id(0) * TILE_COLUMNS
    request = tl.load(tile).to(tl.int64)
    first_query = tl.load(tile + 1).to(tl.int64)
    num_queries = tl.load(tile + 2)
    position = tl.load(tile + 3)
    sealed_chunks = tl.load(tile + 4)
    raw_start = tl.load(tile + 5)
    head = heads_ptr + tl.program_id(1) * HEAD_COLUMNS
    kv_head = tl.load(head).to(tl.int64)
    first_page = tl.load(head + 1).to(tl.int64)
    budget_pages = tl.load(head + 2)
    member = tl.load(head + 3).to(tl.int64)
    first_row = tl.load(head + 4)
    divisor = tl.load(head + 5).to(tl.uint32, bitcast=True)

    sealed_ptr += first_page * stride_sealed_page + member * stride_sealed_member
    recent_ptr += kv_head * stride_recent_head
    sealed_table_ptr += request * stride_sealed_request
    recent_table_ptr += request * stride_recent_request

    row = tl.arange(0, ROWS)
    element = tl.arange(0, D)
    key = tl.arange(0, KEYS)
    token = first_query + row // G
    query_head = kv_head * G + row % G
    is_query = (row < num_queries * G)[:, None]
    query_at = token * stride_query_token + query_head * stride_query_head
    q = tl.load(query_ptr + query_at[:, None] + element[None, :], mask=is_query, other=0.0)
    mixed = tl.zeros([ROWS, D], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)

    sealed_rows = tl.maximum(sealed_chunks * budget_pages * PAGE_ROWS - first_row, 0)
    if part_ptr is not None:
        first_gathered = tl.load(tile + 6)
        is_gathered = row < tl.where(first_gathered >= 0, num_queries, 0) * G
        gathered = tl.program_id(1).to(tl.int64) * num_gathered + first_gathered + row // G
        part_at = (gathered * G + row % G) * D
        part = part_ptr + part_at[:, None] + element[None, :]
        mixed = tl.load(part, mask=is_gathered[:, None], other=0.0).to(tl.float32)
        lse_at = row % G * tl.num_programs(1).to(tl.int64) * num_gathered + gathered
        lse_ln = tl.load(part_lse_ln_ptr + lse_at, mask=is_gathered, other=float("-inf"))
        peak = lse_ln * LOG2_E
        total = tl.where(is_gathered, 1.0, 0.0)
        sealed_rows = tl.where(first_gathered >= 0, 0, sealed_rows)

    # Sealed rows, whole blocks.
    virtual = first_row + key
    chunk = _chunk_of(virtual, divisor, PAGE_ROWS)
    block = tl.load(sealed_table_ptr + chunk, mask=chunk < sealed_chunks, other=0)
    for _ in range(sealed_rows // KEYS):
        page = virtual // PAGE_ROWS - _chunk_of(virtual, divisor, PAGE_ROWS) * budget_pages
        at = page * stride_sealed_page + virtual % PAGE_ROWS * stride_sealed_row
        rows_ptr = sealed_ptr + (block.to(tl.int64) * stride_sealed_block + at)[:, None]
        virtual += KEYS
        chunk = _chunk_of(virtual, divisor, PAGE_ROWS)
        block = tl.load(sealed_table_ptr + chunk, mask=chunk < sealed_chunks, other=0)
        mixed, peak, total = update(
            q, rows_ptr + element[None, :], None, mixed, peak, total, None, scale_log2
        )

    # Raw rows that every query sees, whole blocks.
    raw_blocks = (position + 1 - raw_start) // KEYS
    raw = raw_start + key
    end = position + num_queries
    block = tl.load(recent_table_ptr + raw // BLOCK_TOKENS, mask=raw < end, other=0)
    for _ in range(raw_blocks):
        at = raw % BLOCK_TOKENS * stride_recent_row
        rows_ptr = recent_ptr + (block.to(tl.int64) * stride_recent_block + at)[:, None]
        raw += KEYS
        block = tl.load(recent_table_ptr + raw // BLOCK_TOKENS, mask=raw < end, other=0)
        mixed, peak, total = update(
            q, rows_ptr + element[None, :], None, mixed, peak, total, None, scale_log2
        )

    # The rest: fewer than KEYS sealed rows, then the raw rows up to the last query.
    rest = sealed_rows % KEYS
    virtual = first_row + sealed_rows - rest + key
    chunk = _chunk_of(virtual, divisor, PAGE_ROWS)
    block = tl.load(sealed_table_ptr + chunk, mask=key < rest, other=0)
    page = virtual // PAGE_ROWS - chunk * budget_pages
    at = page * stride_sealed_page + virtual % PAGE_ROWS * stride_sealed_row
    kept_ptr = sealed_ptr + block.to(tl.int64) * stride_sealed_block + at
    raw = raw_start + raw_blocks * KEYS - rest + key
    for done in range(0, rest + end - raw_start - raw_blocks * KEYS, KEYS):
        is_sealed = done + key < rest
        is_raw = (done + key >= rest) & (raw < end)
        block = tl.load(recent_table_ptr + raw // BLOCK_TOKENS, mask=is_raw, other=0)
        raw_at = block.to(tl.int64) * stride_recent_block + raw % BLOCK_TOKENS * stride_recent_row
        rows_ptr = tl.where(is_sealed, kept_ptr, recent_ptr + raw_at)[:, None] + element[None, :]
        seen = is_raw[None, :] & (raw[None, :] <= position + row[:, None] // G)
        mixed, peak, total = update(
            q,
            rows_ptr,
            (is_sealed | is_raw)[:, None],
            mixed,
            peak,
            total,
            is_sealed[None, :] | seen,
            scale_log2,
        )
        raw += KEYS

    out_at = token * stride_out_token + query_head * stride_out_head
    mixed = (mixed / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_at[:, None] + element[None, :], mixed, mask=is_query)


def prefill_attention(
    query: Tensor,
    tiles: Tensor,
    view: CacheView,
    *,
    head_table: Tensor,
    softmax_scale: float,
    out: Tensor,
    blocks: Blocks | None = None,
    sealed_part: SealedPart | None = None,
) -> None:
    """Attend the queries of all tiles to their sealed rows and raw tokens, and write `out`.

    Args:
        query: [tokens, query_heads, head_size], after RoPE; head size 64, 128 or 256.
        tiles: [tiles, 7] int32 on the device, from `make_tiles` with the same `blocks`; the same
            for all layers of a step.
        view: the cache of the layer, any strides but the last.
        head_table: [kv_heads, 6] int32 on the device, from `make_head_table`.
        softmax_scale: factor on query times key; above 0.
        out: [tokens, query_heads, head_size], written at the tiles' tokens only.
        blocks: the tiles' sizes; `choose_blocks` picks them when absent.
        sealed_part: from `attend_sealed`, of the `SealedStep` that the tiles were made with;
            without it every tile attends to its sealed rows here.
    """
    num_tiles = tiles.shape[0]
    if not num_tiles:
        return
    num_kv_heads, block_tokens = view.recent.shape[1:3]
    num_query_heads, head_size = query.shape[1:]
    sealed, recent = view.sealed.stride(), view.recent.stride()
    of_query, of_out = query.stride(), out.stride()
    assert of_query[2] == of_out[2] == sealed[4] == recent[3] == 1
    assert view.sealed_table.stride(1) == view.recent_table.stride(1) == 1
    assert tiles.dtype == head_table.dtype == torch.int32
    assert view.sealed_table.dtype == view.recent_table.dtype == torch.int32
    assert tiles.is_contiguous() and tiles.shape[1] == len(TILE_COLUMNS)
    assert head_table.is_contiguous() and head_table.shape == (num_kv_heads, len(HEAD_COLUMNS))
    assert head_size in HEAD_SIZES and num_query_heads % num_kv_heads == 0
    blocks = blocks or choose_blocks(head_size, query.element_size(), shared_bytes(query.device))
    part = part_lse_ln = None
    num_gathered = 0
    if sealed_part is not None:
        part, part_lse_ln = sealed_part
        num_gathered = part.shape[0] // num_kv_heads
        assert part.is_contiguous() and part_lse_ln.is_contiguous()
    _prefill_kernel[num_tiles, num_kv_heads](
        query,
        out,
        tiles,
        head_table,
        view.sealed,
        view.sealed_table,
        view.recent,
        view.recent_table,
        part,
        part_lse_ln,
        num_gathered,
        softmax_scale * LOG2_E.value,
        *of_query[:2],
        *of_out[:2],
        *sealed[:4],
        view.sealed_table.stride(0),
        *recent[:3],
        view.recent_table.stride(0),
        G=num_query_heads // num_kv_heads,
        D=head_size,
        PAGE_ROWS=view.sealed.shape[3],
        BLOCK_TOKENS=block_tokens,
        TILE_COLUMNS=len(TILE_COLUMNS),
        HEAD_COLUMNS=len(HEAD_COLUMNS),
        ROWS=blocks.query_rows,
        KEYS=blocks.key_rows,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
