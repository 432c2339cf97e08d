"""Attention of a small step's queries over sealed pages and raw tokens, in Triton.

Programs take equal, contiguous parts of the line of units (`tables.py`), so that a few queries over
a long history keep all multiprocessors busy. A part is pieces of pairs of a tile and a KV head:
those that lie in it whole are done; of the first and the last one others may hold the rest, and a
second kernel combines what they found. A piece goes through its rows as prefill attention does:

    sealed rows, whole blocks | raw rows that every query sees, whole blocks | the rest of both

Grids depend on the device alone, so that a captured graph serves any cut of its tokens.

Not here: anything that looks at a length on the host.
"""

# Triton's functions have no types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tangram.kernels.cache_view import CacheView
from tangram.kernels.decode.schedule_kernel import FIRST_HEAD, STARTS
from tangram.kernels.extend.tables import TILE_COLUMNS, ExtendTables, ExtendWorkspace
from tangram.kernels.launch import remember_compiled
from tangram.kernels.prefill.kernel import LOG2_E, update
from tangram.kernels.sizes import HEAD_SIZES

_COMBINED_ROWS = 16


@triton.jit
def _chunk_of(virtual, reciprocal):
    return tl.umulhi(virtual.to(tl.uint32), reciprocal).to(tl.int32)


@remember_compiled
@triton.jit(
    do_not_specialize=["num_requests", "num_tokens", "stride_sealed_table", "stride_recent_table"]
)
def _extend(
    query_ptr,  # [tokens, Hkv * G, D]
    out_ptr,  # [tokens, Hkv * G, D]
    query_start_ptr,  # [num_requests + 1] int32
    tiles_ptr,  # [tiles, COLUMNS] int32
    starts_ptr,  # [programs, STARTS] int32, of the layer
    heads_ptr,  # [Hkv + 1, FIRST_HEAD + 1] int32, of the layer
    sealed_ptr,  # [blocks, pages_per_block, H_p, P, 2 * D]
    sealed_table_ptr,  # [requests, chunks] int32
    recent_ptr,  # [blocks, Hkv, R, 2 * D]
    recent_table_ptr,  # [requests, blocks] int32
    partial_ptr,  # [programs, 2, ROWS, D] float32
    lse_ptr,  # [programs, 2, ROWS] float32
    num_requests,
    num_tokens,
    scale_log2,
    stride_query_token,
    stride_query_head,
    stride_out_token,
    stride_out_head,
    stride_sealed_block,
    stride_sealed_page,
    stride_sealed_member,
    stride_sealed_row,
    stride_sealed_table,
    stride_recent_block,
    stride_recent_head,
    stride_recent_row,
    stride_recent_table,
    C: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,  # query heads of a KV head
    D: tl.constexpr,
    KV_HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    program = tl.program_id(0)
    start = starts_ptr + program * STARTS
    tile = tl.load(start)
    first = tl.load(start + 2)
    units = tl.load(start + 3)
    nth_head = tl.load(start + 4)
    row = tl.arange(0, ROWS)
    element = tl.arange(0, D)
    key = tl.arange(0, KEYS)
    left = units
    while left > 0:
        head = heads_ptr + nth_head * (FIRST_HEAD + 1)
        member = tl.load(head).to(tl.int64)
        first_page = tl.load(head + 1).to(tl.int64)
        budget = tl.load(head + 2)
        reciprocal = tl.load(head + 3).to(tl.uint32, bitcast=True)
        first_row = tl.load(head + 4)
        kv_head = tl.load(head + FIRST_HEAD).to(tl.int64)
        line = tiles_ptr + tile * COLUMNS
        request = tl.load(line).to(tl.int64)
        first_query = tl.load(line + 1).to(tl.int64)
        num_queries = tl.load(line + 2)
        position = tl.load(line + 3)

        token = first_query + row // G
        query_head = kv_head * G + row % G
        is_query = (row < num_queries * G)[:, None]
        query_at = token * stride_query_token + query_head * stride_query_head
        q = tl.load(query_ptr + query_at[:, None] + element[None, :], mask=is_query, other=0.0)
        mixed = tl.zeros([ROWS, D], tl.float32)
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)

        # Of the tile and head units [first, last): sealed rows [virtual, sealed_end), then raw
        # tokens [raw_begin, raw_end).
        chunks = position // C
        raw_start = tl.maximum(chunks * C - W, 0)
        end = position + num_queries
        first_unit = first_row // P
        sealed_units = tl.maximum(chunks * (budget // P) - first_unit, 0)
        of_pair = sealed_units + tl.cdiv(end - raw_start, P)
        last = tl.minimum(first + left, of_pair)
        begin = tl.maximum((first_unit + tl.minimum(first, sealed_units)) * P, first_row)
        sealed_end = (first_unit + tl.minimum(last, sealed_units)) * P
        sealed_rows = tl.maximum(sealed_end - begin, 0)
        raw_begin = raw_start + tl.maximum(first - sealed_units, 0) * P
        raw_end = tl.minimum(raw_start + tl.maximum(last - sealed_units, 0) * P, end)
        own_sealed = sealed_ptr + first_page * stride_sealed_page + member * stride_sealed_member
        own_recent = recent_ptr + kv_head * stride_recent_head
        own_sealed_table = sealed_table_ptr + request * stride_sealed_table
        own_recent_table = recent_table_ptr + request * stride_recent_table

        # Sealed rows, whole blocks. Table entries are fetched one iteration ahead.
        virtual = begin + key
        chunk = _chunk_of(virtual, reciprocal)
        block = tl.load(own_sealed_table + chunk, mask=chunk < chunks, other=0)
        for _ in range(sealed_rows // KEYS):
            of_chunk = virtual - _chunk_of(virtual, reciprocal) * budget
            at = of_chunk // P * stride_sealed_page + of_chunk % P * stride_sealed_row
            rows_ptr = own_sealed + (block.to(tl.int64) * stride_sealed_block + at)[:, None]
            virtual += KEYS
            chunk = _chunk_of(virtual, reciprocal)
            block = tl.load(own_sealed_table + chunk, mask=chunk < chunks, other=0)
            mixed, peak, total = update(
                q, rows_ptr + element[None, :], None, mixed, peak, total, None, scale_log2
            )

        # Raw rows that every query sees, whole blocks.
        raw_blocks = tl.maximum(tl.minimum(raw_end, position + 1) - raw_begin, 0) // KEYS
        raw = raw_begin + key
        block = tl.load(own_recent_table + raw // R, mask=raw < raw_end, other=0)
        for _ in range(raw_blocks):
            at = raw % R * stride_recent_row
            rows_ptr = own_recent + (block.to(tl.int64) * stride_recent_block + at)[:, None]
            raw += KEYS
            block = tl.load(own_recent_table + raw // R, mask=raw < raw_end, other=0)
            mixed, peak, total = update(
                q, rows_ptr + element[None, :], None, mixed, peak, total, None, scale_log2
            )

        # The rest: fewer than KEYS sealed rows, then the raw rows up to the last query.
        rest = sealed_rows % KEYS
        virtual = begin + sealed_rows - rest + key
        chunk = _chunk_of(virtual, reciprocal)
        block = tl.load(own_sealed_table + chunk, mask=key < rest, other=0)
        of_chunk = virtual - chunk * budget
        at = of_chunk // P * stride_sealed_page + of_chunk % P * stride_sealed_row
        kept_ptr = own_sealed + block.to(tl.int64) * stride_sealed_block + at
        rest_begin = raw_begin + raw_blocks * KEYS
        raw = rest_begin - rest + key
        for done in range(0, rest + tl.maximum(raw_end - rest_begin, 0), KEYS):
            is_sealed = done + key < rest
            is_raw = (done + key >= rest) & (raw < raw_end)
            block = tl.load(own_recent_table + raw // R, mask=is_raw, other=0)
            raw_at = block.to(tl.int64) * stride_recent_block + raw % R * stride_recent_row
            rows_ptr = tl.where(is_sealed, kept_ptr, own_recent + raw_at)
            seen = is_raw[None, :] & (raw[None, :] <= position + row[:, None] // G)
            mixed, peak, total = update(
                q,
                rows_ptr[:, None] + element[None, :],
                (is_sealed | is_raw)[:, None],
                mixed,
                peak,
                total,
                is_sealed[None, :] | seen,
                scale_log2,
            )
            raw += KEYS

        total = tl.where(total > 0, total, 1.0)
        mixed = mixed / total[:, None]
        if (first == 0) & (last == of_pair):
            out_at = token * stride_out_token + query_head * stride_out_head
            result = mixed.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + out_at[:, None] + element[None, :], result, mask=is_query)
        else:
            entry = (program * 2 + (left < units).to(tl.int32)) * ROWS + row
            tl.store(partial_ptr + entry[:, None] * D + element[None, :], mixed, mask=is_query)
            tl.store(lse_ptr + entry, peak + tl.log2(total))

        left -= last - first
        first = first * 0
        nth_head += 1
        if nth_head == KV_HEADS:
            nth_head = nth_head * 0
            tile += 1

    nothing = tl.zeros([D], out_ptr.dtype.element_ty)
    programs = tl.num_programs(0)
    padded = tl.load(query_start_ptr + num_requests) + program
    for nth in range(0, tl.cdiv(tl.maximum(num_tokens - padded, 0), programs)):
        token = (padded + nth * programs).to(tl.int64)
        row_ptr = out_ptr + token * stride_out_token + element
        for one in range(0, KV_HEADS * G):
            tl.store(row_ptr + one * stride_out_head, nothing)


@remember_compiled
@triton.jit
def _combine_tiles(
    cut_ptr,  # [programs, 4] int32, of the layer
    heads_ptr,  # [Hkv + 1, FIRST_HEAD + 1] int32, of the layer
    tiles_ptr,  # [tiles, COLUMNS] int32
    out_ptr,  # [tokens, Hkv * G, D]
    partial_ptr,  # [programs, 2, ROWS, D] float32
    lse_ptr,  # [programs, 2, ROWS] float32
    stride_out_token,
    stride_out_head,
    G: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    TAKEN: tl.constexpr,
):
    """Weigh what the programs of a tile and head found by their log-sum-exp, some rows of it."""
    program = tl.program_id(0)
    cut = cut_ptr + program * 4
    tile = tl.load(cut)
    if tile >= 0:
        nth_head = tl.load(cut + 1)
        first_part = tl.load(cut + 2)
        count = tl.load(cut + 3)
        line = tiles_ptr + tile * COLUMNS
        first_query = tl.load(line + 1).to(tl.int64)
        num_queries = tl.load(line + 2)
        kv_head = tl.load(heads_ptr + nth_head * (FIRST_HEAD + 1) + FIRST_HEAD).to(tl.int64)
        row = tl.program_id(1) * TAKEN + tl.arange(0, TAKEN)
        element = tl.arange(0, D)
        is_query = row < num_queries * G
        peak = tl.full([TAKEN], float("-inf"), tl.float32)
        total = tl.zeros([TAKEN], tl.float32)
        mixed = tl.zeros([TAKEN, D], tl.float32)
        for nth in range(0, tl.where(tl.program_id(1) * TAKEN < num_queries * G, count, 0)):
            # All but the program that begins the pair begin with it.
            entry = ((program + nth) * 2 + tl.where(nth == 0, first_part, 0)) * ROWS + row
            lse_log2 = tl.load(lse_ptr + entry, mask=is_query, other=0.0)
            part = tl.load(
                partial_ptr + entry[:, None] * D + element[None, :],
                mask=is_query[:, None],
                other=0.0,
            )
            new_peak = tl.maximum(peak, lse_log2)
            # A part may lie behind a query altogether.
            offset = tl.where(new_peak > float("-inf"), new_peak, 0.0)
            weight, shrink = tl.exp2(lse_log2 - offset), tl.exp2(peak - offset)
            total = total * shrink + weight
            mixed = mixed * shrink[:, None] + part * weight[:, None]
            peak = new_peak
        total = tl.where(total > 0, total, 1.0)
        at = (first_query + row // G) * stride_out_token + (kv_head * G + row % G) * stride_out_head
        result = (mixed / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at[:, None] + element[None, :], result, mask=is_query[:, None])


def extend_attention(
    query: Tensor,
    view: CacheView,
    *,
    tables: ExtendTables,
    layer: int,
    softmax_scale: float,
    out: Tensor,
    workspace: ExtendWorkspace,
) -> None:
    """Launch; see `tangram.kernels.extend.extend_attention`."""
    g, blocks, parts = tables.geometry, tables.blocks, workspace.parts
    D, G = g.head_size, g.queries_per_kv_head
    assert query.shape[1:] == out.shape[1:] == (g.num_query_heads, D) and D in HEAD_SIZES
    sealed, recent = view.sealed.stride(), view.recent.stride()
    assert query.stride(2) == out.stride(2) == sealed[4] == recent[3] == 1
    assert view.sealed_table.stride(1) == view.recent_table.stride(1) == 1
    assert view.sealed_table.dtype == view.recent_table.dtype == torch.int32
    assert view.sealed_table.shape[1] * g.chunk_size_tokens <= tables.heads.max_rows
    assert parts.lse_log2.shape[2] == blocks.query_rows
    heads, programs = tables.heads.head_sets[layer], parts.num_programs
    _extend[(programs,)](
        query,
        out,
        view.query_start,
        workspace.tiles,
        parts.starts[layer],
        heads,
        view.sealed,
        view.sealed_table,
        view.recent,
        view.recent_table,
        parts.partial_out,
        parts.lse_log2,
        view.seq_lens.shape[0],
        query.shape[0],
        softmax_scale * LOG2_E.value,
        *query.stride()[:2],
        *out.stride()[:2],
        *sealed[:4],
        view.sealed_table.stride(0),
        *recent[:3],
        view.recent_table.stride(0),
        C=g.chunk_size_tokens,
        W=g.window_size_tokens,
        P=g.page_size_rows,
        R=g.recent_block_tokens,
        G=G,
        D=D,
        KV_HEADS=g.num_kv_heads,
        COLUMNS=len(TILE_COLUMNS),
        ROWS=blocks.query_rows,
        KEYS=blocks.key_rows,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    _combine_tiles[(programs, blocks.query_rows // _COMBINED_ROWS)](
        parts.cut[layer],
        heads,
        workspace.tiles,
        out,
        parts.partial_out,
        parts.lse_log2,
        *out.stride()[:2],
        G=G,
        D=D,
        COLUMNS=len(TILE_COLUMNS),
        ROWS=blocks.query_rows,
        TAKEN=_COMBINED_ROWS,
        num_warps=4,
    )
