"""Where the programs of decode attention start: one launch a step, from its lengths.

Not here: anything that looks at a length on the host.
"""

# Triton's functions have no types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from tangram.kernels.cache_view import CacheView
from tangram.kernels.decode.tables import (
    LEAST_REQUESTS,
    START_COLUMNS,
    Column,
    DecodeTables,
    DecodeWorkspace,
)
from tangram.kernels.launch import remember_compiled
from tangram.kernels.sizes import power_of_two

FIRST_HEAD = tl.constexpr(Column.FIRST_HEAD)
STARTS = tl.constexpr(START_COLUMNS)
LINE_AT = tl.constexpr(5)  # integers of a start before the line of its head set


@triton.jit
def _find(at, begins, seq_lens, pages_before, skipped_before, C, W, P, SETS: tl.constexpr):
    """Request, its length, head set, and both ends of that, of units [n] of a layer's line."""
    requests = tl.arange(0, begins.shape[0])
    is_begun = begins[None, :] <= at[:, None]
    request = tl.sum(is_begun.to(tl.int32), 1) - 1
    request_begin = tl.max(tl.where(is_begun, begins[None, :], 0), 1)
    seq_len = tl.sum(tl.where(requests[None, :] == request[:, None], seq_lens[None, :], 0), 1)
    chunks = tl.maximum(seq_len - 1, 0) // C
    raw = tl.cdiv(seq_len - tl.maximum(chunks * C - W, 0), P)
    sets = tl.arange(0, pages_before.shape[0])
    set_begins = chunks[:, None] * pages_before[None, :] + raw[:, None] * sets[None, :]
    set_begins -= tl.where(chunks[:, None] > 0, skipped_before[None, :], 0)
    set_begins += request_begin[:, None]
    is_begun = (set_begins <= at[:, None]) & (sets < SETS)[None, :]
    head_set = tl.sum(is_begun.to(tl.int32), 1) - 1
    begin = tl.max(tl.where(is_begun, set_begins, 0), 1)
    end = tl.max(tl.where(sets[None, :] == head_set[:, None] + 1, set_begins, 0), 1)
    return request, seq_len, head_set, begin, end


@remember_compiled
@triton.jit(do_not_specialize=["num_requests", "num_programs"])
def _schedule(
    seq_lens_ptr,  # [num_requests] int32
    head_sets_ptr,  # [layers, SETS + 1, FIRST_HEAD + HEADS] int32
    starts_ptr,  # [layers, num_programs, STARTS] int32
    cut_ptr,  # [layers, num_programs, 4] int32
    num_requests,
    num_programs,
    C: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    HEADS: tl.constexpr,
    SETS: tl.constexpr,
    SETS_PAD: tl.constexpr,
    REQUESTS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Where the parts of a layer's line begin, of some programs."""
    COLUMNS: tl.constexpr = FIRST_HEAD + HEADS
    layer = tl.program_id(0)
    head_sets_ptr += layer * (SETS + 1) * COLUMNS
    requests = tl.arange(0, REQUESTS)
    seq_lens = tl.load(seq_lens_ptr + requests, requests < num_requests, 0)
    sets = tl.arange(0, SETS_PAD)
    sums = head_sets_ptr + sets * COLUMNS + 5
    pages_before = tl.load(sums, sets <= SETS, 0)
    skipped_before = tl.load(sums + 1, sets <= SETS, 0)
    all_pages = tl.sum(tl.where(sets == SETS, pages_before, 0))
    all_skipped = tl.sum(tl.where(sets == SETS, skipped_before, 0))
    chunks = tl.maximum(seq_lens - 1, 0) // C
    raw = tl.cdiv(seq_lens - tl.maximum(chunks * C - W, 0), P)
    took = chunks * all_pages - tl.where(chunks > 0, all_skipped, 0) + raw * SETS
    took = tl.where(seq_lens > 0, took, 0)
    ends = tl.cumsum(took, 0)
    begins = ends - took
    units = tl.max(ends)

    # The first `more` programs have a unit more than the others.
    each, more = units // num_programs, units % num_programs
    program = tl.program_id(1) * PROGRAMS + tl.arange(0, PROGRAMS)
    low = program * each + tl.minimum(program, more)
    count = each + (program < more).to(tl.int32)
    request, seq_len, head_set, begin, end = _find(
        low, begins, seq_lens, pages_before, skipped_before, C, W, P, SETS
    )
    own = program < num_programs
    line = layer * num_programs + program
    start = starts_ptr + line * STARTS
    tl.store(start, request, own)
    tl.store(start + 1, seq_len, own)
    tl.store(start + 2, low - begin, own)
    tl.store(start + 3, count, own)
    tl.store(start + 4, head_set, own)
    for column in tl.static_range(COLUMNS):
        known = tl.load(head_sets_ptr + head_set * COLUMNS + column, own, 0)
        tl.store(start + LINE_AT + column, known, own)

    # The head set that a part ends in, if the part has its beginning and not its end.
    last = low + tl.maximum(count, 1) - 1
    request, seq_len, head_set, begin, end = _find(
        last, begins, seq_lens, pages_before, skipped_before, C, W, P, SETS
    )
    is_cut = (count > 0) & (begin >= low) & (end > low + count)
    cut = cut_ptr + line * 4
    tl.store(cut, tl.where(is_cut, request, -1), own)
    tl.store(cut + 1, head_set, own)
    tl.store(cut + 2, (begin > low).to(tl.int32), own)
    unit, long = end - 1, more * (each + 1)
    holder = tl.where(unit < long, unit // (each + 1), more + (unit - long) // tl.maximum(each, 1))
    tl.store(cut + 3, holder - program + 1, own)


def schedule(view: CacheView, batch: int, tables: DecodeTables, workspace: DecodeWorkspace) -> None:
    """Launch; see `tangram.kernels.decode.schedule`."""
    g, programs = tables.geometry, workspace.num_programs
    requests = max(LEAST_REQUESTS, power_of_two(batch))
    block = max(1, min(16, 4096 // requests))
    _schedule[(g.num_layers, -(-programs // block))](
        view.seq_lens,
        tables.head_sets,
        workspace.starts,
        workspace.cut,
        batch,
        programs,
        C=g.chunk_size_tokens,
        W=g.window_size_tokens,
        P=g.page_size_rows,
        HEADS=tables.heads_per_program,
        SETS=tables.num_head_sets,
        SETS_PAD=power_of_two(tables.num_head_sets + 1),
        REQUESTS=requests,
        PROGRAMS=block,
        num_warps=4,
    )
