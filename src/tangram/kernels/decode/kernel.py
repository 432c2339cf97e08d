"""Ragged decode attention in Triton: one query a request, over sealed rows and raw tokens.

Every program takes one work item of one request (`tables.py`): some KV heads of a head group with
all their query heads, and a share of their rows. Heads lie side by side in a page, so that a tile
is one piece of memory; a query's scores with other heads' rows are masked, and cost nothing, since
a matrix instruction has 16 query rows anyway. Heads that one program serves are done; the others
leave an output and a log-sum-exp in the workspace, and a second kernel combines them. The grids
depend on the batch size only, so a captured graph serves any lengths.

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
from tangram.kernels.decode.split_map import MAX_QUERY_HEADS, TILE_BYTES
from tangram.kernels.decode.tables import Column, DecodeTables, DecodeWorkspace, reciprocal
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


@remember_compiled
@triton.jit
def _decode(
    query_ptr,  # [B, Hkv * G, D]
    sealed_ptr,  # [blocks, pages_per_block, H_p, P, 2 * D]
    sealed_table_ptr,  # [B, chunks] int32
    recent_ptr,  # [blocks, Hkv, R, 2 * D]
    recent_table_ptr,  # [B, blocks] int32
    seq_lens_ptr,  # [B] int32
    items_ptr,  # [items, COLUMNS] int32
    order_ptr,  # [Hkv] int32, heads in the order of their groups
    out_ptr,  # [B, Hkv * G, D]
    partial_ptr,  # [B, items, HEADS, G, D] float32
    lse_ptr,  # [B, items, HEADS, G] float32
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
    TILE: tl.constexpr,
    FLOAT32: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    M: tl.constexpr = MAX_LINES
    STEP: tl.constexpr = TILE // HEADS
    if DEPENDENT:
        gdc_launch_dependents()
    request = tl.program_id(0)
    item_ptr = items_ptr + tl.program_id(1) * COLUMNS
    rank = tl.load(item_ptr + 0)
    member = tl.load(item_ptr + 1)
    first_page = tl.load(item_ptr + 2)
    budget = tl.load(item_ptr + 3)
    reciprocal = tl.load(item_ptr + 4).to(tl.uint32)
    first_row = tl.load(item_ptr + 5)
    split = tl.load(item_ptr + 6)
    num_splits = tl.load(item_ptr + 7)
    first_slot = tl.load(item_ptr + 8)
    position = tl.load(seq_lens_ptr + request) - 1

    dims = tl.arange(0, D)
    lines = tl.arange(0, M)
    is_query = lines < HEADS * G
    head = tl.minimum(lines // G, HEADS - 1)
    query_head = tl.load(order_ptr + rank + head) * G + lines % G
    out_ptrs = out_ptr + request.to(tl.int64) * stride_out + dims[None, :]
    out_ptrs += query_head[:, None] * stride_out_head
    if position < 0:  # a padded row
        if split == 0:
            tl.store(out_ptrs, tl.full([M, D], 0.0, tl.float32), is_query[:, None])
        return
    query_ptrs = query_ptr + request.to(tl.int64) * stride_query + dims[None, :]
    query_ptrs += query_head[:, None] * stride_query_head
    query = tl.load(query_ptrs, is_query[:, None], 0.0)
    if FLOAT32:
        query = query.to(tl.float32)

    # The share: sealed rows [begin, end), then raw tokens [raw_begin, raw_end), cut at multiples
    # of P rows. Tiles of both make one loop, so that loads never pause.
    chunks = position // C
    raw_start = tl.maximum(chunks * C - W, 0)
    first_unit = first_row // P
    sealed_units = tl.maximum(chunks * (budget // P) - first_unit, 0)
    units = sealed_units + tl.cdiv(position + 1 - raw_start, P)
    low = tl.cdiv(units * split, num_splits)
    high = tl.cdiv(units * (split + 1), num_splits)
    begin = (first_unit + tl.minimum(low, sealed_units)) * P
    end = (first_unit + tl.minimum(high, sealed_units)) * P
    raw_begin = raw_start + tl.maximum(low - sealed_units, 0) * P
    raw_end = tl.minimum(raw_start + tl.maximum(high - sealed_units, 0) * P, position + 1)
    sealed_tiles = tl.cdiv(end - begin, STEP)
    tiles = sealed_tiles + tl.cdiv(raw_end - raw_begin, STEP)

    sealed_table_ptr += request.to(tl.int64) * stride_sealed_table
    recent_table_ptr += request.to(tl.int64) * stride_recent_table
    sealed_ptr += first_page * stride_sealed_page + member * stride_sealed_member

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
    table_ptr = tl.where(is_raw, recent_table_ptr, sealed_table_ptr)
    block = tl.load(table_ptr + chunk, rows < tl.where(is_raw, raw_end, end), 0)
    for tile in range(0, tiles):
        is_raw, rows = _rows_of(tile, sealed_tiles, begin, raw_begin, lanes, STEP)
        seen = (rows < tl.where(is_raw, raw_end, end)) & (rows >= tl.where(is_raw, 0, first_row))
        chunk = _chunk_of(rows, is_raw, reciprocal, RAW_RECIPROCAL)
        row = (rows - chunk * tl.where(is_raw, R, budget)).to(tl.uint32)
        cache_ptr = tl.where(is_raw, recent_ptr, sealed_ptr)
        stride_block = tl.where(is_raw, stride_recent_block, stride_sealed_block)
        stride_page = tl.where(is_raw, P * 2 * D, stride_sealed_page)
        offset = (row // P).to(tl.int32) * stride_page + (row % P).to(tl.int32) * (2 * D)
        offset += tl.where(is_raw, in_recent, in_sealed)
        # Rows begin at multiples of 16 elements: without this some versions of Triton do not see
        # it, load element by element, and do not pipeline.
        offset = tl.multiple_of(block.to(tl.int64) * stride_block + offset, 16)
        key_ptrs = cache_ptr + offset[:, None] + dims[None, :]
        key = tl.load(key_ptrs, seen[:, None], 0.0)
        value = tl.load(key_ptrs + D, seen[:, None], 0.0)

        # The next tile's blocks, so that no address waits for a load.
        is_raw, rows = _rows_of(tile + 1, sealed_tiles, begin, raw_begin, lanes, STEP)
        chunk = _chunk_of(rows, is_raw, reciprocal, RAW_RECIPROCAL)
        table_ptr = tl.where(is_raw, recent_table_ptr, sealed_table_ptr)
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
    if num_splits == 1:
        tl.store(out_ptrs, result, is_query[:, None])
        return
    entry = (request * tl.num_programs(1) + first_slot + split) * (HEADS * G) + lines
    # No tile, no output; the combine looks at the log-sum-exp first.
    wrote = lines < tl.where(tiles > 0, HEADS * G, 0)
    tl.store(partial_ptr + entry[:, None] * D + dims[None, :], result, wrote[:, None])
    tl.store(lse_ptr + entry, peak + tl.log2(sum_of_weights), is_query)


@remember_compiled
@triton.jit
def _combine(
    heads_ptr,  # [Hkv, 3] int32
    seq_lens_ptr,  # [B] int32
    out_ptr,  # [B, Hkv * G, D]
    partial_ptr,  # [B, items, HEADS, G, D] float32
    lse_ptr,  # [B, items, HEADS, G] float32
    num_items,
    stride_out,
    stride_out_head,
    D: tl.constexpr,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Weigh what the programs of a head found by their log-sum-exp: one query head a program."""
    request, head = tl.program_id(0), tl.program_id(1)
    first_slot = tl.load(heads_ptr + head // G * 3)
    num_slots = tl.load(heads_ptr + head // G * 3 + 1)
    place = tl.load(heads_ptr + head // G * 3 + 2)
    seq_len = tl.load(seq_lens_ptr + request)
    if DEPENDENT:
        gdc_wait()
    # The first kernel has written heads that it did not cut, and padded rows.
    if num_slots == 1:
        return
    if seq_len <= 0:
        return
    dims = tl.arange(0, D)
    peak, total = float("-inf"), 0.0
    acc = tl.full([D], 0.0, tl.float32)
    for begin in range(0, num_slots, SLOTS):
        slot = begin + tl.arange(0, SLOTS)
        inside = slot < num_slots
        entry = (request * num_items + first_slot + slot) * HEADS + place
        entry = entry * G + head % G
        lse_log2 = tl.load(lse_ptr + entry, inside, float("-inf"))
        part = tl.load(partial_ptr + entry[:, None] * D + dims[None, :], inside[:, None], 0.0)
        new_peak = tl.maximum(peak, tl.max(lse_log2, 0))
        # The first program of a head always has a tile, so no peak is -inf.
        weight = tl.exp2(lse_log2 - new_peak)
        shrink = tl.exp2(peak - new_peak)
        part = tl.where(weight[:, None] > 0, part * weight[:, None], 0.0)
        total = total * shrink + tl.sum(weight, 0)
        acc = acc * shrink + tl.sum(part, 0)
        peak = new_peak
    out_row_ptr = out_ptr + request.to(tl.int64) * stride_out + head * stride_out_head
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
    softmax_scale: float,
    out: Tensor,
    workspace: DecodeWorkspace,
    config: LaunchConfig | None = None,
) -> None:
    """Launch; see `tangram.kernels.decode.decode_attention`. `config` is for benchmarks."""
    g = tables.geometry
    batch, D, G = len(query), g.head_size, g.queries_per_kv_head
    assert batch <= tables.batch_size
    assert query.shape == out.shape == (batch, g.num_query_heads, D)
    heads = tables.heads_per_program
    assert G * heads <= MAX_QUERY_HEADS and D in HEAD_SIZES, f"not built for {G} heads of {D}"
    assert query.stride(2) == out.stride(2) == 1, "the elements of a head must lie side by side"
    sealed, recent = view.sealed.stride(), view.recent.stride()
    assert sealed[3:] == recent[2:] == (2 * D, 1), "the rows of a page must lie side by side"
    assert (sealed[0] | sealed[1] | sealed[2] | recent[0] | recent[1]) % 16 == 0, "rows not aligned"
    assert view.sealed_table.shape[1] * g.chunk_size_tokens <= tables.max_rows
    assert workspace.lse_log2.shape[0] >= batch * tables.num_items

    config = config or launch_config(2 * D * query.element_size())
    dependent = config.dependent and query.is_cuda and _launches_ahead(query.device)
    _decode[(batch, tables.num_items)](
        query,
        view.sealed,
        view.sealed_table,
        view.recent,
        view.recent_table,
        view.seq_lens,
        tables.items,
        tables.order,
        out,
        workspace.partial_out,
        workspace.lse_log2,
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
        TILE=max(config.tile_rows, heads * g.page_size_rows),
        # Triton's interpreter multiplies bfloat16 wrongly.
        FLOAT32=query.dtype == torch.float32 or not query.is_cuda,
        DEPENDENT=dependent,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if tables.num_items * heads == g.num_kv_heads:
        return  # no head is cut
    _combine[(batch, g.num_query_heads)](
        tables.heads,
        view.seq_lens,
        out,
        workspace.partial_out,
        workspace.lse_log2,
        tables.num_items,
        out.stride(0),
        out.stride(1),
        D=D,
        G=G,
        HEADS=heads,
        SLOTS=min(8192 // D, power_of_two(tables.max_splits)),
        DEPENDENT=dependent,
        num_warps=4,
        **({"launch_pdl": True} if dependent else {}),
    )
