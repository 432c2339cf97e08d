"""Ragged decode attention in Triton: one query a request, over sealed rows and raw tokens.

The work of a layer is one line of units of equal bytes (`tables.py`): request by request, and in a
request head set by head set, a head set's sealed rows and then its raw tokens. Every program takes
an equal, contiguous part of the line, whatever the lengths. A part is pieces of head sets: those
that lie in it whole are done; of the first and the last one others may hold the rest, so that a
program leaves at most two parts of results, and a second kernel combines them. Where every
program's part begins is found once a step and for all layers (`schedule_kernel.py`). Grids depend
on the device and the model alone, so that a captured graph serves any lengths.

Heads lie side by side in a page, so that a tile is one piece of memory; a query's scores with other
heads' rows are masked, and cost nothing, since a matrix instruction has 16 query rows anyway.

Not here: anything that looks at a length on the host.
"""

# Triton's functions have no types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tangram.kernels.cache_view import CacheView
from tangram.kernels.decode.schedule_kernel import FIRST_HEAD, LINE_AT, STARTS
from tangram.kernels.decode.tables import (
    MAX_QUERY_HEADS,
    TILE_BYTES,
    DecodeTables,
    DecodeWorkspace,
    reciprocal,
)
from tangram.kernels.launch import remember_compiled
from tangram.kernels.sizes import HEAD_SIZES

LOG2_E = 1.4426950408889634
MAX_LINES = tl.constexpr(MAX_QUERY_HEADS)


class LaunchConfig(NamedTuple):
    """How a program works through its share.

    Attributes:
        tile_rows: rows taken at once.
        num_warps: of a program.
        num_stages: tiles on their way at once, and one.
        dependent: the second kernel is launched while the first drains (CUDA's programmatic
            dependent launch, compute capability 9 and later).
    """

    tile_rows: int
    num_warps: int
    num_stages: int
    dependent: bool = True


def launch_config(row_bytes: int) -> LaunchConfig:
    """What was fastest on an H200: tiles of 32 KiB, two at once."""
    return LaunchConfig(TILE_BYTES // row_bytes, 4, 3)


@triton.jit
def _rows_of(tile, sealed_tiles, begin, raw_begin, lanes, STEP: tl.constexpr):
    """Whether a tile holds raw tokens, and its rows: of the virtual sequence, or positions."""
    is_raw = tile >= sealed_tiles
    low = tl.where(is_raw, raw_begin - sealed_tiles * STEP, begin) + tile * STEP
    return is_raw, low + lanes


@triton.jit
def _chunk_of(rows, is_raw, reciprocal, RAW_RECIPROCAL: tl.constexpr):
    """Chunk of every row, recent block of every position: index into the table of blocks."""
    divisor = tl.where(is_raw, tl.full([], RAW_RECIPROCAL, tl.uint32), reciprocal)
    return tl.umulhi(rows.to(tl.uint32), divisor).to(tl.int32)


@triton.jit
def _head_set(line, head, lane_head):
    """What the line of a head set says, and the KV heads of lines of a program and of a tile."""
    member = tl.load(line)
    first_page = tl.load(line + 1)
    budget = tl.load(line + 2)
    reciprocal = tl.load(line + 3).to(tl.uint32)
    first_row = tl.load(line + 4)
    of_line = tl.load(line + FIRST_HEAD + head)
    of_lane = tl.load(line + FIRST_HEAD + lane_head)
    return member, first_page, budget, reciprocal, first_row, of_line, of_lane


@remember_compiled
@triton.jit(do_not_specialize=["num_requests"])
def _decode(
    query_ptr,  # [B, Hkv * G, D]
    sealed_ptr,  # [blocks, pages_per_block, H_p, P, 2 * D]
    sealed_table_ptr,  # [B, chunks] int32
    recent_ptr,  # [blocks, Hkv, R, 2 * D]
    recent_table_ptr,  # [B, blocks] int32
    seq_lens_ptr,  # [B] int32
    query_start_ptr,  # [B + 1] int32
    starts_ptr,  # [programs, STARTS] int32, of the layer
    head_sets_ptr,  # [SETS + 1, FIRST_HEAD + HEADS] int32, of the layer
    out_ptr,  # [B, Hkv * G, D]
    partial_ptr,  # [programs, 2, HEADS * G, D] float32
    lse_ptr,  # [programs, 2, HEADS * G] float32
    num_requests,
    scale_log2,
    stride_query,
    stride_query_head,
    stride_sealed_block,
    stride_sealed_page,
    stride_sealed_member,
    stride_sealed_table,
    stride_recent_block,
    stride_recent_head,
    stride_recent_table,
    stride_out,
    stride_out_head,
    C: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    RAW_RECIPROCAL: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    SETS: tl.constexpr,
    TILE: tl.constexpr,
    FLOAT32: tl.constexpr,
    AMONG_OTHERS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    AHEAD: tl.constexpr,
):
    M: tl.constexpr = MAX_LINES
    STEP: tl.constexpr = TILE // HEADS
    LINES: tl.constexpr = HEADS * G
    if DEPENDENT:
        gdc_launch_dependents()
    program, programs = tl.program_id(0), tl.num_programs(0)
    start = starts_ptr + program * STARTS
    request = tl.load(start)
    seq_len = tl.load(start + 1)
    first = tl.load(start + 2)
    units = tl.load(start + 3)
    head_set = tl.load(start + 4)
    dims = tl.arange(0, D)
    lines = tl.arange(0, M)
    is_query = lines < LINES
    head = tl.minimum(lines // G, HEADS - 1)
    # A tile: pages of P rows of every head.
    lanes = tl.arange(0, TILE)
    lane_head = lanes // P % HEADS
    lanes = lanes // (P * HEADS) * P + lanes % P
    own = head[:, None] == lane_head[None, :]
    in_sealed = lane_head * stride_sealed_member

    # A start holds the line of its head set, so that the first tile waits for one load less.
    member, first_page, budget, reciprocal, first_row, of_line, of_lane = _head_set(
        start + LINE_AT, head, lane_head
    )
    if AHEAD:  # until here nothing was looked at that the kernel before could write
        gdc_wait()
    left = units
    while left > 0:
        query_head = of_line * G + lines % G
        in_recent = of_lane * stride_recent_head
        row = request.to(tl.int64)
        if AMONG_OTHERS:
            row = tl.load(query_start_ptr + request).to(tl.int64)
        query_ptrs = query_ptr + row * stride_query + dims[None, :]
        query_ptrs += query_head[:, None] * stride_query_head
        query = tl.load(query_ptrs, is_query[:, None], 0.0)
        if FLOAT32:
            query = query.to(tl.float32)

        # Of the head set units [first, last): sealed rows [begin, end), then raw tokens [raw_begin,
        # raw_end). Tiles of both make one loop, so that loads never pause.
        position = seq_len - 1
        chunks = position // C
        raw_start = tl.maximum(chunks * C - W, 0)
        first_unit = first_row // P
        sealed_units = tl.maximum(chunks * (budget // P) - first_unit, 0)
        of_set = sealed_units + tl.cdiv(seq_len - raw_start, P)
        last = tl.minimum(first + left, of_set)
        begin = (first_unit + tl.minimum(first, sealed_units)) * P
        end = (first_unit + tl.minimum(last, sealed_units)) * P
        raw_begin = raw_start + tl.maximum(first - sealed_units, 0) * P
        raw_end = tl.minimum(raw_start + tl.maximum(last - sealed_units, 0) * P, seq_len)
        sealed_tiles = tl.cdiv(end - begin, STEP)
        tiles = sealed_tiles + tl.cdiv(raw_end - raw_begin, STEP)

        own_sealed_table = sealed_table_ptr + request.to(tl.int64) * stride_sealed_table
        own_recent_table = recent_table_ptr + request.to(tl.int64) * stride_recent_table
        own_sealed = sealed_ptr + first_page * stride_sealed_page + member * stride_sealed_member
        peak = tl.full([M], float("-inf"), tl.float32)
        total = tl.full([M, TILE], 0.0, tl.float32)
        acc = tl.full([M, D], 0.0, tl.float32)
        is_raw, rows = _rows_of(0, sealed_tiles, begin, raw_begin, lanes, STEP)
        chunk = _chunk_of(rows, is_raw, reciprocal, RAW_RECIPROCAL)
        table_ptr = tl.where(is_raw, own_recent_table, own_sealed_table)
        block = tl.load(table_ptr + chunk, rows < tl.where(is_raw, raw_end, end), 0)
        for tile in range(0, tiles):
            is_raw, rows = _rows_of(tile, sealed_tiles, begin, raw_begin, lanes, STEP)
            seen = rows < tl.where(is_raw, raw_end, end)
            seen &= rows >= tl.where(is_raw, 0, first_row)
            chunk = _chunk_of(rows, is_raw, reciprocal, RAW_RECIPROCAL)
            own_row = (rows - chunk * tl.where(is_raw, R, budget)).to(tl.uint32)
            cache_ptr = tl.where(is_raw, recent_ptr, own_sealed)
            stride_block = tl.where(is_raw, stride_recent_block, stride_sealed_block)
            stride_page = tl.where(is_raw, P * 2 * D, stride_sealed_page)
            offset = (own_row // P).to(tl.int32) * stride_page
            offset += (own_row % P).to(tl.int32) * (2 * D)
            offset += tl.where(is_raw, in_recent, in_sealed)
            # Rows begin at multiples of 16 elements: without this some versions of Triton do not
            # see it, load element by element, and do not pipeline.
            offset = tl.multiple_of(block.to(tl.int64) * stride_block + offset, 16)
            key_ptrs = cache_ptr + offset[:, None] + dims[None, :]
            key = tl.load(key_ptrs, seen[:, None], 0.0)
            value = tl.load(key_ptrs + D, seen[:, None], 0.0)

            # The next tile's blocks, so that no address waits for a load.
            is_raw, rows = _rows_of(tile + 1, sealed_tiles, begin, raw_begin, lanes, STEP)
            chunk = _chunk_of(rows, is_raw, reciprocal, RAW_RECIPROCAL)
            table_ptr = tl.where(is_raw, own_recent_table, own_sealed_table)
            block = tl.load(table_ptr + chunk, rows < tl.where(is_raw, raw_end, end), 0)

            if FLOAT32:
                key, value = key.to(tl.float32), value.to(tl.float32)
            score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
            score = tl.where(seen[None, :] & own, score, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(score, 1))
            shrink = tl.exp2(peak - new_peak)
            weight = tl.exp2(score - new_peak[:, None])
            total = total * shrink[:, None] + weight
            weight = weight.to(value.dtype)
            acc = tl.dot(weight, value, acc * shrink[:, None], input_precision="ieee")
            peak = new_peak

        sum_of_weights = tl.sum(total, 1)
        sum_of_weights = tl.where(sum_of_weights > 0, sum_of_weights, 1.0)
        result = acc / sum_of_weights[:, None]
        if (first == 0) & (last == of_set):
            out_ptrs = out_ptr + row * stride_out + dims[None, :]
            out_ptrs += query_head[:, None] * stride_out_head
            tl.store(out_ptrs, result, is_query[:, None])
        else:
            entry = (program * 2 + (left < units).to(tl.int32)) * LINES + lines
            tl.store(partial_ptr + entry[:, None] * D + dims[None, :], result, is_query[:, None])
            tl.store(lse_ptr + entry, peak + tl.log2(sum_of_weights), is_query)

        left -= last - first
        first = first * 0
        head_set += 1
        if (head_set == SETS) & (left > 0):
            head_set = head_set * 0
            request += 1
            seq_len = tl.load(seq_lens_ptr + request)
            while seq_len <= 0:  # a padded row; some row has what is left
                request += 1
                seq_len = tl.load(seq_lens_ptr + request)
        if left > 0:
            member, first_page, budget, reciprocal, first_row, of_line, of_lane = _head_set(
                head_sets_ptr + head_set * (FIRST_HEAD + HEADS), head, lane_head
            )

    for nth in range(0, 0 if AMONG_OTHERS else tl.cdiv(num_requests - program, programs)):
        padded = program + nth * programs
        if tl.load(seq_lens_ptr + padded) <= 0:
            row_ptr = out_ptr + padded.to(tl.int64) * stride_out + dims
            for one in range(0, SETS * LINES):
                tl.store(row_ptr + one * stride_out_head, tl.full([D], 0.0, tl.float32))


@remember_compiled
@triton.jit
def _combine(
    cut_ptr,  # [programs, 4] int32, of the layer
    head_sets_ptr,  # [SETS + 1, FIRST_HEAD + HEADS] int32, of the layer
    query_start_ptr,  # [B + 1] int32
    out_ptr,  # [B, Hkv * G, D]
    partial_ptr,  # [programs, 2, LINES, D] float32
    lse_ptr,  # [programs, 2, LINES] float32
    stride_out,
    stride_out_head,
    D: tl.constexpr,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    AMONG_OTHERS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Weigh what the programs of a head set found by their log-sum-exp: a query head a program."""
    LINES: tl.constexpr = HEADS * G
    program, line = tl.program_id(0), tl.program_id(1)
    cut = cut_ptr + program * 4
    request = tl.load(cut)
    head_set = tl.load(cut + 1)
    first_part = tl.load(cut + 2)
    count = tl.load(cut + 3)
    # One program at least, or what follows in the stream could begin before decode has ended.
    if DEPENDENT:
        if (request >= 0) | (program == 0):
            gdc_wait()
    if request >= 0:
        head = tl.load(head_sets_ptr + head_set * (FIRST_HEAD + HEADS) + FIRST_HEAD + line // G)
        dims = tl.arange(0, D)
        peak, total = float("-inf"), 0.0
        acc = tl.full([D], 0.0, tl.float32)
        for begin in range(0, count, PARTS):
            nth = begin + tl.arange(0, PARTS)
            inside = nth < count
            # All but the program that begins the head set begin with it.
            entry = (program + nth) * 2 + tl.where(nth == 0, first_part, 0)
            entry = entry * LINES + line
            lse_log2 = tl.load(lse_ptr + entry, inside, float("-inf"))
            part = tl.load(partial_ptr + entry[:, None] * D + dims[None, :], inside[:, None], 0.0)
            new_peak = tl.maximum(peak, tl.max(lse_log2, 0))
            weight = tl.exp2(lse_log2 - new_peak)
            shrink = tl.exp2(peak - new_peak)
            total = total * shrink + tl.sum(weight, 0)
            acc = acc * shrink + tl.sum(part * weight[:, None], 0)
            peak = new_peak
        row = request.to(tl.int64)
        if AMONG_OTHERS:
            row = tl.load(query_start_ptr + request).to(tl.int64)
        out_row_ptr = out_ptr + row * stride_out
        out_row_ptr += (head * G + line % G) * stride_out_head
        tl.store(out_row_ptr + dims, (acc / total).to(out_ptr.dtype.element_ty))


@functools.cache
def _launches_ahead(device: torch.device) -> bool:
    """Whether a kernel may be launched while the one that it waits for still runs."""
    return torch.cuda.get_device_capability(device)[0] >= 9


def decode_attention(
    query: Tensor,
    view: CacheView,
    *,
    tables: DecodeTables,
    layer: int,
    softmax_scale: float,
    out: Tensor,
    workspace: DecodeWorkspace,
    among_others: bool = False,
    config: LaunchConfig | None = None,
) -> None:
    """Launch; see `tangram.kernels.decode.decode_attention`. `config` is for benchmarks."""
    g = tables.geometry
    batch, D, G = len(query), g.head_size, g.queries_per_kv_head
    assert query.shape == out.shape == (batch, g.num_query_heads, D)
    assert not among_others or view.query_start.dtype == torch.int32
    heads = tables.heads_per_program
    assert tables.lines <= MAX_QUERY_HEADS and D in HEAD_SIZES, f"not built for {G} heads of {D}"
    assert query.stride(2) == out.stride(2) == 1, "the elements of a head must lie side by side"
    sealed, recent = view.sealed.stride(), view.recent.stride()
    assert sealed[3:] == recent[2:] == (2 * D, 1), "the rows of a page must lie side by side"
    assert (sealed[0] | sealed[1] | sealed[2] | recent[0] | recent[1]) % 16 == 0, "rows not aligned"
    assert view.sealed_table.shape[1] * g.chunk_size_tokens <= tables.max_rows
    assert workspace.lse_log2.shape[2] == tables.lines

    config = config or launch_config(2 * D * query.element_size())
    dependent = config.dependent and query.is_cuda and _launches_ahead(query.device)
    # The kernel before the first layer's may be the one that says where programs start.
    ahead = dependent and layer > 0 and not among_others
    head_sets, programs = tables.head_sets[layer], workspace.num_programs
    _decode[(programs,)](
        query,
        view.sealed,
        view.sealed_table,
        view.recent,
        view.recent_table,
        view.seq_lens,
        view.query_start,
        workspace.starts[layer],
        head_sets,
        out,
        workspace.partial_out,
        workspace.lse_log2,
        batch,
        softmax_scale * LOG2_E,
        query.stride(0),
        query.stride(1),
        *sealed[:3],
        view.sealed_table.stride(0),
        *recent[:2],
        view.recent_table.stride(0),
        out.stride(0),
        out.stride(1),
        C=g.chunk_size_tokens,
        W=g.window_size_tokens,
        P=g.page_size_rows,
        R=g.recent_block_tokens,
        RAW_RECIPROCAL=reciprocal(g.recent_block_tokens),
        D=D,
        G=G,
        HEADS=heads,
        SETS=tables.num_head_sets,
        TILE=max(config.tile_rows, heads * g.page_size_rows),
        # Triton's interpreter multiplies bfloat16 wrongly.
        FLOAT32=query.dtype == torch.float32 or not query.is_cuda,
        AMONG_OTHERS=among_others,
        DEPENDENT=dependent,
        AHEAD=ahead,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **({"launch_pdl": True} if ahead else {}),
    )
    _combine[(programs, tables.lines)](
        workspace.cut[layer],
        head_sets,
        view.query_start,
        out,
        workspace.partial_out,
        workspace.lse_log2,
        out.stride(0),
        out.stride(1),
        D=D,
        G=G,
        HEADS=heads,
        # Of many small programs most leave at once: wider ones took longer to come and go.
        PARTS=16,
        AMONG_OTHERS=among_others,
        DEPENDENT=dependent,
        num_warps=1,
        **({"launch_pdl": True} if dependent else {}),
    )
