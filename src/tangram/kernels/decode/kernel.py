"""Ragged decode attention in Triton: one query a request, over sealed rows and raw tokens.

The work of a layer is one line of units of equal bytes (`tables.py`): request by request, and in a
request head set by head set, a head set's sealed rows and then its raw tokens. Every program takes
an equal, contiguous part of the line, whatever the lengths. A part is pieces of head sets: those
that lie in it whole are done; of the first and the last one others may hold the rest, so that a
program leaves at most two parts of results, and a second kernel combines them. `_schedule`, once a
step, sums up the lengths; where its part begins, a program finds itself. Grids depend on the device
alone, so that a captured graph serves any lengths and any batch.

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

from tangram.geometry import Geometry
from tangram.kernels.cache_view import CacheView
from tangram.kernels.decode.tables import (
    MAX_QUERY_HEADS,
    TILE_BYTES,
    Column,
    DecodeTable,
    DecodeWorkspace,
    reciprocal,
)
from tangram.kernels.launch import remember_compiled
from tangram.kernels.sizes import HEAD_SIZES, power_of_two

LOG2_E = 1.4426950408889634
COLUMNS = tl.constexpr(len(Column))
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
def _units_of(seq_len, C: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    """Sealed chunks before a request's query, and units of its raw tokens."""
    chunks = tl.maximum(seq_len - 1, 0) // C
    raw = tl.cdiv(seq_len - tl.maximum(chunks * C - W, 0), P)
    return chunks, tl.where(seq_len > 0, raw, 0)


@triton.jit(do_not_specialize=["num_requests", "max_requests"])
def _schedule(
    seq_lens_ptr,  # [num_requests] int32
    prefix_ptr,  # [3, max_requests + 1] int32, see DecodeWorkspace
    num_requests,
    max_requests,
    C: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    REQUESTS: tl.constexpr,
):
    """Running sums over the requests, the same for all layers."""
    request = tl.arange(0, REQUESTS)
    seq_len = tl.load(seq_lens_ptr + request, request < num_requests, 0)
    chunks, raw = _units_of(seq_len, C, W, P)
    out = prefix_ptr + 1 + request
    fits = request < num_requests
    tl.store(out, tl.cumsum(chunks, 0), fits)
    tl.store(out + (max_requests + 1), tl.cumsum((chunks > 0).to(tl.int32), 0), fits)
    tl.store(out + 2 * (max_requests + 1), tl.cumsum(raw, 0), fits)


@triton.jit
def _program_of(unit, each, more):
    """The program whose part of the line a unit lies in: the first `more` have one more."""
    long = more * (each + 1)
    return tl.where(unit < long, unit // (each + 1), more + (unit - long) // tl.maximum(each, 1))


@remember_compiled
@triton.jit(do_not_specialize=["num_requests", "max_requests"])
def _decode(
    query_ptr,  # [B, Hkv * G, D]
    sealed_ptr,  # [blocks, pages_per_block, H_p, P, 2 * D]
    sealed_table_ptr,  # [B, chunks] int32
    recent_ptr,  # [blocks, Hkv, R, 2 * D]
    recent_table_ptr,  # [B, blocks] int32
    seq_lens_ptr,  # [B] int32
    prefix_ptr,  # [3, max_requests + 1] int32
    head_sets_ptr,  # [SETS + 1, COLUMNS] int32
    order_ptr,  # [Hkv] int32, heads in the order of their groups
    out_ptr,  # [B, Hkv * G, D]
    partial_ptr,  # [programs, 2, HEADS * G, D] float32
    lse_ptr,  # [programs, 2, HEADS * G] float32
    cut_ptr,  # [programs, 4] int32
    num_requests,
    max_requests,
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
    SETS_PAD: tl.constexpr,
    REQUESTS: tl.constexpr,
    TILE: tl.constexpr,
    FLOAT32: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    M: tl.constexpr = MAX_LINES
    STEP: tl.constexpr = TILE // HEADS
    LINES: tl.constexpr = HEADS * G
    if DEPENDENT:
        gdc_launch_dependents()
    program, programs = tl.program_id(0), tl.num_programs(0)
    dims = tl.arange(0, D)
    lines = tl.arange(0, M)
    is_query = lines < LINES
    head = tl.minimum(lines // G, HEADS - 1)

    # The line of units: where every request begins, and of a request every head set.
    requests = tl.arange(0, REQUESTS)
    known = requests <= num_requests
    of_chunks = tl.load(prefix_ptr + requests, known, 0)
    of_some = tl.load(prefix_ptr + (max_requests + 1) + requests, known, 0)
    of_raw = tl.load(prefix_ptr + 2 * (max_requests + 1) + requests, known, 0)
    seq_lens = tl.load(seq_lens_ptr + requests, requests < num_requests, 0)
    sets = tl.arange(0, SETS_PAD)
    set_ptrs = head_sets_ptr + sets * COLUMNS
    pages_before = tl.load(set_ptrs + 6, sets <= SETS, 0)
    skipped_before = tl.load(set_ptrs + 7, sets <= SETS, 0)
    all_pages = tl.sum(tl.where(sets == SETS, pages_before, 0))
    all_skipped = tl.sum(tl.where(sets == SETS, skipped_before, 0))
    begins = of_chunks * all_pages - of_some * all_skipped + of_raw * SETS
    units = tl.max(tl.where(known, begins, 0))
    begins = tl.where(known, begins, units + 1)
    each, more = units // programs, units % programs
    low = program * each + tl.minimum(program, more)
    high = low + each + (program < more).to(tl.int32)

    for nth in range(0, tl.cdiv(num_requests - program, programs)):
        padded = program + nth * programs
        if tl.load(seq_lens_ptr + padded) <= 0:
            row_ptr = out_ptr + padded.to(tl.int64) * stride_out + dims
            for query_head in range(0, SETS * LINES):
                tl.store(row_ptr + query_head * stride_out_head, tl.zeros([D], tl.float32))

    cut_request, cut_rank, cut_part, cut_count = -1, 0, 0, 0
    at = low
    while at < high:
        # The piece at `at`: its request, its head set, and both ends of that.
        request = tl.sum((begins <= at).to(tl.int32)) - 1
        request_begin = tl.max(tl.where(begins <= at, begins, 0))
        position = tl.sum(tl.where(requests == request, seq_lens, 0)) - 1
        chunks = position // C
        raw_start = tl.maximum(chunks * C - W, 0)
        raw_units = tl.cdiv(position + 1 - raw_start, P)
        has_some = (chunks > 0).to(tl.int32)
        set_begins = request_begin + chunks * pages_before - has_some * skipped_before
        set_begins += sets * raw_units
        is_begun = (set_begins <= at) & (sets < SETS)
        head_set = tl.sum(is_begun.to(tl.int32)) - 1
        set_begin = tl.max(tl.where(is_begun, set_begins, 0))
        set_end = tl.max(tl.where(sets == head_set + 1, set_begins, 0))
        piece_end = tl.minimum(set_end, high)

        set_ptr = head_sets_ptr + head_set * COLUMNS
        rank = tl.load(set_ptr + 0)
        member = tl.load(set_ptr + 1)
        first_page = tl.load(set_ptr + 2)
        budget = tl.load(set_ptr + 3)
        reciprocal = tl.load(set_ptr + 4).to(tl.uint32)
        first_row = tl.load(set_ptr + 5)
        query_head = tl.load(order_ptr + rank + head) * G + lines % G
        query_ptrs = query_ptr + request.to(tl.int64) * stride_query + dims[None, :]
        query_ptrs += query_head[:, None] * stride_query_head
        query = tl.load(query_ptrs, is_query[:, None], 0.0)
        if FLOAT32:
            query = query.to(tl.float32)

        # Sealed rows [begin, end), then raw tokens [raw_begin, raw_end), cut at multiples of P
        # rows. Tiles of both make one loop, so that loads never pause.
        first_unit = first_row // P
        sealed_units = tl.maximum(chunks * (budget // P) - first_unit, 0)
        first, last = at - set_begin, piece_end - set_begin
        begin = (first_unit + tl.minimum(first, sealed_units)) * P
        end = (first_unit + tl.minimum(last, sealed_units)) * P
        raw_begin = raw_start + tl.maximum(first - sealed_units, 0) * P
        raw_end = tl.minimum(raw_start + tl.maximum(last - sealed_units, 0) * P, position + 1)
        sealed_tiles = tl.cdiv(end - begin, STEP)
        tiles = sealed_tiles + tl.cdiv(raw_end - raw_begin, STEP)

        own_sealed_table = sealed_table_ptr + request.to(tl.int64) * stride_sealed_table
        own_recent_table = recent_table_ptr + request.to(tl.int64) * stride_recent_table
        own_sealed = sealed_ptr + first_page * stride_sealed_page + member * stride_sealed_member

        peak = tl.full([M], float("-inf"), tl.float32)
        total = tl.full([M, TILE], 0.0, tl.float32)
        acc = tl.full([M, D], 0.0, tl.float32)
        # A tile: pages of P rows of every head.
        lanes = tl.arange(0, TILE)
        lane_head = lanes // P % HEADS
        lanes = lanes // (P * HEADS) * P + lanes % P
        in_sealed = lane_head * stride_sealed_member
        in_recent = tl.load(order_ptr + rank + lane_head) * stride_recent_head
        own = head[:, None] == lane_head[None, :]
        is_raw, rows = _rows_of(0, sealed_tiles, begin, raw_begin, lanes, STEP)
        chunk = _chunk_of(rows, is_raw, reciprocal, RAW_RECIPROCAL)
        table_ptr = tl.where(is_raw, own_recent_table, own_sealed_table)
        block = tl.load(table_ptr + chunk, rows < tl.where(is_raw, raw_end, end), 0)
        for tile in range(0, tiles):
            is_raw, rows = _rows_of(tile, sealed_tiles, begin, raw_begin, lanes, STEP)
            seen = rows < tl.where(is_raw, raw_end, end)
            seen &= rows >= tl.where(is_raw, 0, first_row)
            chunk = _chunk_of(rows, is_raw, reciprocal, RAW_RECIPROCAL)
            row = (rows - chunk * tl.where(is_raw, R, budget)).to(tl.uint32)
            cache_ptr = tl.where(is_raw, recent_ptr, own_sealed)
            stride_block = tl.where(is_raw, stride_recent_block, stride_sealed_block)
            stride_page = tl.where(is_raw, P * 2 * D, stride_sealed_page)
            offset = (row // P).to(tl.int32) * stride_page + (row % P).to(tl.int32) * (2 * D)
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
        if (at == set_begin) & (piece_end == set_end):
            out_ptrs = out_ptr + request.to(tl.int64) * stride_out + dims[None, :]
            out_ptrs += query_head[:, None] * stride_out_head
            tl.store(out_ptrs, result, is_query[:, None])
        else:
            part = (at > low).to(tl.int32)
            entry = (program * 2 + part) * LINES + lines
            tl.store(partial_ptr + entry[:, None] * D + dims[None, :], result, is_query[:, None])
            tl.store(lse_ptr + entry, peak + tl.log2(sum_of_weights), is_query)
            if at == set_begin:
                cut_request, cut_rank, cut_part = request, rank, part
                cut_count = _program_of(set_end - 1, each, more) - program + 1
        at = piece_end
    cut_ptrs = cut_ptr + program * 4
    tl.store(cut_ptrs, cut_request)
    tl.store(cut_ptrs + 1, cut_rank)
    tl.store(cut_ptrs + 2, cut_part)
    tl.store(cut_ptrs + 3, cut_count)


@remember_compiled
@triton.jit
def _combine(
    cut_ptr,  # [programs, 4] int32
    order_ptr,  # [Hkv] int32
    out_ptr,  # [B, Hkv * G, D]
    partial_ptr,  # [programs, 2, LINES, D] float32
    lse_ptr,  # [programs, 2, LINES] float32
    stride_out,
    stride_out_head,
    D: tl.constexpr,
    G: tl.constexpr,
    LINES: tl.constexpr,
    PARTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Weigh what the programs of a head set found by their log-sum-exp: a query head a program."""
    program, line = tl.program_id(0), tl.program_id(1)
    if DEPENDENT:
        gdc_wait()
    cut = cut_ptr + program * 4
    request = tl.load(cut)
    if request < 0:
        return
    rank = tl.load(cut + 1)
    first_part = tl.load(cut + 2)
    count = tl.load(cut + 3)
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
    query_head = tl.load(order_ptr + rank + line // G) * G + line % G
    out_row_ptr = out_ptr + request.to(tl.int64) * stride_out + query_head * stride_out_head
    tl.store(out_row_ptr + dims, (acc / total).to(out_ptr.dtype.element_ty))


@functools.cache
def _launches_ahead(device: torch.device) -> bool:
    """Whether a kernel may be launched while the one that it waits for still runs."""
    return torch.cuda.get_device_capability(device)[0] >= 9


def schedule(view: CacheView, geometry: Geometry, workspace: DecodeWorkspace, batch: int) -> None:
    """Launch; see `tangram.kernels.decode.schedule`."""
    assert batch <= workspace.max_requests
    _schedule[(1,)](
        view.seq_lens,
        workspace.prefix,
        batch,
        workspace.max_requests,
        C=geometry.chunk_size_tokens,
        W=geometry.window_size_tokens,
        P=geometry.page_size_rows,
        REQUESTS=power_of_two(workspace.max_requests),
        num_warps=4,
    )


def decode_attention(
    query: Tensor,
    view: CacheView,
    *,
    table: DecodeTable,
    softmax_scale: float,
    out: Tensor,
    workspace: DecodeWorkspace,
    config: LaunchConfig | None = None,
) -> None:
    """Launch; see `tangram.kernels.decode.decode_attention`. `config` is for benchmarks."""
    g = table.geometry
    batch, D, G = len(query), g.head_size, g.queries_per_kv_head
    assert batch <= workspace.max_requests
    assert query.shape == out.shape == (batch, g.num_query_heads, D)
    heads = table.heads_per_program
    assert G * heads <= MAX_QUERY_HEADS and D in HEAD_SIZES, f"not built for {G} heads of {D}"
    assert query.stride(2) == out.stride(2) == 1, "the elements of a head must lie side by side"
    sealed, recent = view.sealed.stride(), view.recent.stride()
    assert sealed[3:] == recent[2:] == (2 * D, 1), "the rows of a page must lie side by side"
    assert (sealed[0] | sealed[1] | sealed[2] | recent[0] | recent[1]) % 16 == 0, "rows not aligned"
    assert view.sealed_table.shape[1] * g.chunk_size_tokens <= table.max_rows
    assert workspace.lse_log2.shape[2] == heads * G

    config = config or launch_config(2 * D * query.element_size())
    dependent = config.dependent and query.is_cuda and _launches_ahead(query.device)
    sets = table.num_head_sets
    _decode[(workspace.num_programs,)](
        query,
        view.sealed,
        view.sealed_table,
        view.recent,
        view.recent_table,
        view.seq_lens,
        workspace.prefix,
        table.head_sets,
        table.order,
        out,
        workspace.partial_out,
        workspace.lse_log2,
        workspace.cut,
        batch,
        workspace.max_requests,
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
        SETS=sets,
        SETS_PAD=power_of_two(sets + 1),
        REQUESTS=power_of_two(batch + 1),
        TILE=max(config.tile_rows, heads * g.page_size_rows),
        # Triton's interpreter multiplies bfloat16 wrongly.
        FLOAT32=query.dtype == torch.float32 or not query.is_cuda,
        DEPENDENT=dependent,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    _combine[(workspace.num_programs, heads * G)](
        workspace.cut,
        table.order,
        out,
        workspace.partial_out,
        workspace.lse_log2,
        out.stride(0),
        out.stride(1),
        D=D,
        G=G,
        LINES=heads * G,
        PARTS=min(8192 // D, 64),
        DEPENDENT=dependent,
        num_warps=4,
        **({"launch_pdl": True} if dependent else {}),
    )
