"""Sealing on a GPU: every program sees which chunks the step completes, and takes a share.

A share is one chunk for one head of one layer. What is one number a token (score, key, row) lies in
registers as a vector over the chunk; keys and rows pass by in tiles of some elements. Which tokens
the head keeps is decided by integer keys, no two of them equal, made of the rounded score and the
token (the order of `tangram.scorers.select`), and a search for the key of the last one kept.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tangram.geometry.block import SCORE_BYTES
from tangram.kernels.cache_view import CacheView
from tangram.kernels.launch import remember_compiled
from tangram.kernels.seal_decode.scorers import SealScorer, tiles_of
from tangram.kernels.seal_decode.scores_kernel import (
    attention,
    expected,
    learned,
    of_keys,
    smooth,
)
from tangram.kernels.seal_decode.tables import MAX_CHUNK_TOKENS, SealTables
from tangram.kernels.sizes import power_of_two, shared_bytes

_DROPPED_BITS = tl.constexpr(13)  # of a score's 24 significant bits, 11 count
_HALF = tl.constexpr(1 << 12)
_INFINITY = tl.constexpr(0x7F800000 >> 13)  # the largest rank of a score
_RANK_BITS = 19  # of a rank, from minus infinity to what goes before all scores


@triton.jit
def _order(score, always, in_chunk):
    """Integers [tokens], the larger the sooner kept; -1 beyond the chunk."""
    token = tl.arange(0, score.shape[0])
    score = tl.where(score == score, score, float("-inf"))
    bits = score.to(tl.int32, bitcast=True)
    rank = ((bits & 0x7FFFFFFF) + _HALF) >> _DROPPED_BITS
    rank = tl.where(bits < 0, -rank, rank)
    rank = tl.where(always, _INFINITY + 1, rank)
    return tl.where(in_chunk, (rank + _INFINITY) * score.shape[0] + token, -1)


@triton.jit
def _nth_largest(key, n, KEY_BITS: tl.constexpr, DIGIT_BITS: tl.constexpr):
    """The n-th largest of distinct integers below 2**KEY_BITS, digit by digit."""
    digits = tl.arange(0, 1 << DIGIT_BITS)
    found = n * 0
    for place in range(DIGIT_BITS, KEY_BITS + DIGIT_BITS, DIGIT_BITS):
        shift = tl.maximum(KEY_BITS - place, 0)
        candidate = found + (digits << shift)
        at_least = tl.sum((key[:, None] >= candidate[None, :]).to(tl.int32), axis=0)
        found += (tl.sum((at_least >= n).to(tl.int32)) - 1) << shift
    return found


@triton.jit
def _pack(
    rows,
    kept,
    pages,
    unused,
    stride_page,
    stride_row,
    P: tl.constexpr,
    ROW: tl.constexpr,
    TILE: tl.constexpr,
):
    """Copy the kept rows to the pages, in the order of the text, after `unused` rows of zeros."""
    place = unused + tl.cumsum(kept.to(tl.int32)) - 1
    target = pages + (place // P) * stride_page + (place % P) * stride_row
    for first in range(0, ROW, TILE):
        element = first + tl.arange(0, TILE)
        mask = kept[:, None] & (element < ROW)[None, :]
        row = tl.load(rows[:, None] + element[None, :], mask=mask)
        tl.store(target[:, None] + element[None, :], row, mask=mask)
    if unused > 0:  # a budget is not above C, so that a vector over the chunk counts its rows too
        place = tl.arange(0, kept.shape[0])
        target = pages + (place // P) * stride_page + (place % P) * stride_row
        zero = tl.zeros([kept.shape[0], TILE], pages.dtype.element_ty)
        for first in range(0, ROW, TILE):
            element = first + tl.arange(0, TILE)
            mask = (place < unused)[:, None] & (element < ROW)[None, :]
            tl.store(target[:, None] + element[None, :], zero, mask=mask)


@remember_compiled
@triton.jit(
    do_not_specialize=[
        "num_requests",
        "stride_recent_table",
        "stride_sealed_table",
        "stride_ring_table",
    ]
)
def _seal_kernel(
    recent_ptr,  # [blocks, heads, R, 2 * D] of the first layer
    sealed_ptr,  # [blocks, pages, H_p, P, 2 * D]
    ring_ptr,  # [blocks, RING_R, layers of the model, query heads, D]
    query_ptr,  # [tokens, query heads, D]
    recent_table_ptr,  # [requests, recent blocks] int32
    sealed_table_ptr,  # [requests, chunks] int32
    ring_table_ptr,  # [requests, ring blocks] int32
    query_start_ptr,  # [requests + 1] int32
    seq_lens_ptr,  # [requests] int32
    layer_table_ptr,  # [LAYERS, 2] int64, see SealTables
    head_table_ptr,  # [LAYERS, HEADS, 3] int32, see SealTables
    mean_ptr,  # [layers of the model, query heads, D] float32, see QueryMoments; or RowWeights'
    factor_ptr,  # [layers of the model, query heads, D, D] float32; or RowWeights' steps
    rotation_ptr,  # [chunks, HALF, 2] float32
    score_ptr,  # [blocks, heads, R] float32 of the first layer
    num_requests,
    softmax_scale,
    epsilon,
    stride_recent_block,
    stride_recent_head,
    stride_recent_row,
    stride_sealed_block,
    stride_sealed_page,
    stride_sealed_head,
    stride_sealed_row,
    stride_ring_block,
    stride_ring_token,
    stride_ring_layer,
    stride_ring_head,
    stride_query_token,
    stride_query_head,
    stride_recent_table,
    stride_sealed_table,
    stride_ring_table,
    stride_score_block,
    SCORER: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    HAS_QUERY: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    RING_R: tl.constexpr,
    SCORE_ROW: tl.constexpr,  # float32s that take a row's bytes
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    C_PAD: tl.constexpr,
    REQUESTS_PAD: tl.constexpr,
    HALF: tl.constexpr,
    PARTS: tl.constexpr,
    KEY_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    FACTOR_TILE: tl.constexpr,
    KEY_BITS: tl.constexpr,
    DIGIT_BITS: tl.constexpr,
):
    requests = tl.arange(0, REQUESTS_PAD)
    is_request = requests < num_requests
    after = tl.load(seq_lens_ptr + requests, mask=is_request, other=0)
    query_begin = tl.load(query_start_ptr + requests, mask=is_request, other=0)
    query_end = tl.load(query_start_ptr + requests + 1, mask=is_request, other=0)
    before = tl.maximum(after - (query_end - query_begin), 0)
    completed = after // C - before // C
    chunks = tl.sum(completed)
    if chunks == 0:
        return
    completed_to = tl.cumsum(completed)

    token = tl.arange(0, C_PAD)
    for share in range(tl.program_id(0), chunks * LAYERS * HEADS, tl.num_programs(0)):
        head = share % HEADS
        layer = share // HEADS % LAYERS
        nth = share // (HEADS * LAYERS)
        request = tl.sum((completed_to <= nth).to(tl.int32))
        is_mine = requests == request
        chunk = tl.sum(tl.where(is_mine, before // C + nth - (completed_to - completed), 0))

        start = tl.maximum(chunk * C - W, 0)
        count = (chunk + 1) * C - W - start
        in_chunk = token < count
        position = start + token
        table = recent_table_ptr + request.to(tl.int64) * stride_recent_table
        block = tl.load(table + position // R, mask=in_chunk, other=0).to(tl.int64)
        # A pool can have more elements than 32 bits count.
        first_row = tl.load(layer_table_ptr + layer * 2) * (2 * D) + head * stride_recent_head
        rows = recent_ptr + first_row + block * stride_recent_block
        rows += (position % R) * stride_recent_row

        entry = head_table_ptr + (layer * HEADS + head) * 3
        first_page = tl.load(entry)
        budget = tl.load(entry + 1) * P
        member = tl.load(entry + 2)
        keep = tl.minimum(budget, count)
        kept = in_chunk
        if keep < count:
            if HAS_SCORES:
                beside = score_ptr + tl.load(layer_table_ptr + layer * 2) * SCORE_ROW
                beside += block * stride_score_block + head * R + position % R
                score = tl.load(beside, mask=in_chunk, other=0.0)
            elif SCORER == "streaming_llm":
                score = token.to(tl.float32)
            elif SCORER == "key_norm" or SCORER == "key_diff":
                score = of_keys(rows, in_chunk, count, SCORER, D, KEY_TILE)
            elif SCORER == "expected_attention":
                of_model = tl.load(layer_table_ptr + layer * 2 + 1)
                first_query_head = (of_model * HEADS + head) * GROUP
                score = expected(
                    rows, in_chunk, mean_ptr + first_query_head * D,
                    factor_ptr + first_query_head * (D * D), rotation_ptr + chunk * (2 * HALF),
                    softmax_scale, epsilon, D, HALF, GROUP, KEY_TILE, FACTOR_TILE, PARTS,
                )  # fmt: skip
            elif SCORER == "learned":
                of_model = tl.load(layer_table_ptr + layer * 2 + 1)
                score = learned(
                    rows, in_chunk, mean_ptr + (of_model * HEADS + head) * (2 * D + 4),
                    factor_ptr + (start - (chunk * C - W)) * (2 * HALF),
                    rotation_ptr + chunk * (2 * HALF), D, HALF, KEY_TILE,
                )  # fmt: skip
            else:
                mean = tl.zeros([C_PAD], tl.float32)
                ring_table = ring_table_ptr + request.to(tl.int64) * stride_ring_table
                ring = ring_ptr + tl.load(layer_table_ptr + layer * 2 + 1) * stride_ring_layer
                old = tl.sum(tl.where(is_mine, before, 0))
                begin = tl.sum(tl.where(is_mine, query_begin, 0)).to(tl.int64)
                query = query_ptr + begin * stride_query_token
                # Heads that decide together, and queries that each of them has.
                ALL: tl.constexpr = HEADS if SCORER == "tova" else 1
                EACH: tl.constexpr = GROUP if SCORER == "tova" else GROUP * W
                for other in range(0, ALL):
                    by = other if SCORER == "tova" else head
                    for first in range(0, EACH, QUERY_TILE):
                        index = first + tl.arange(0, QUERY_TILE)
                        is_query = index < EACH
                        # The last query is the first one here: one is enough for TOVA.
                        at = (chunk + 1) * C - 1 - index // GROUP
                        slot = at % W
                        own = tl.load(ring_table + slot // RING_R, mask=is_query, other=0)
                        of_head = by * GROUP + index % GROUP
                        queries = ring + own.to(tl.int64) * stride_ring_block
                        queries += (slot % RING_R) * stride_ring_token
                        queries += of_head * stride_ring_head
                        if HAS_QUERY:
                            new = query + (at - old).to(tl.int64) * stride_query_token
                            new += of_head * stride_query_head
                            queries = tl.where(at >= old, new, queries)
                        of_other = rows + (by - head) * stride_recent_head
                        mean += attention(
                            queries, is_query, of_other, in_chunk, softmax_scale, D, KEY_TILE
                        )
                score = mean / (ALL * EACH)
                if SCORER == "snap_kv":
                    score = smooth(score, SMOOTH)
            key = _order(score, position < S, in_chunk)
            kept = in_chunk & (key >= _nth_largest(key, keep, KEY_BITS, DIGIT_BITS))

        own = tl.load(sealed_table_ptr + request.to(tl.int64) * stride_sealed_table + chunk)
        pages = sealed_ptr + own.to(tl.int64) * stride_sealed_block
        pages += first_page * stride_sealed_page + member * stride_sealed_head
        _pack(
            rows, kept, pages, budget - keep, stride_sealed_page, stride_sealed_row,
            P, 2 * D, ROW_TILE,
        )  # fmt: skip


_DIGIT_BITS = 4
_PARTS = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}  # that hold a float32's bits
_PROGRAMS_PER_PROCESSOR = 4
_INTERPRETED_PROGRAMS = 3


@functools.cache
def _num_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return processors * _PROGRAMS_PER_PROCESSOR


def seal_decode(
    tables: SealTables,
    view: CacheView,
    *,
    scorer: SealScorer,
    softmax_scale: float = 1.0,
    query: Tensor | None = None,
) -> None:
    """See `tangram.kernels.seal_decode.seal_decode`."""
    g, recent, sealed = tables.geometry, tables.recent_cache, view.sealed
    C, D = g.chunk_size_tokens, g.head_size
    requests = view.seq_lens.shape[0]
    if requests == 0:
        return
    C_pad = power_of_two(C)
    tiles = tiles_of(scorer.name, C_pad, D, recent.itemsize, shared_bytes(recent.device))
    key_bits = _RANK_BITS + C_pad.bit_length() - 1
    assert C <= MAX_CHUNK_TOKENS, f"chunks of {C} tokens, above {MAX_CHUNK_TOKENS}"
    assert view.query_start.shape[0] > requests and len(view.sealed_table) >= requests
    assert recent.stride(3) == sealed.stride(4) == 1
    assert recent.dtype == sealed.dtype
    ring, moments = view.ring, scorer.moments
    scores = tables.scores if scorer.reads_scores else None
    assert scorer.reads_scores == (scores is not None)
    if scorer.reads_queries:
        assert ring is not None and view.ring_table is not None and ring.stride(4) == 1
        assert query is None or (query.dtype == ring.dtype and len(tables.layers) == 1)
    # What a scorer does not read stands for what it is not given; its strides must not tell of the
    # pool's size, for which the kernel would be compiled anew.
    ring_strides = (0, 0, 0, 0) if ring is None else ring.stride()[:4]
    ring = recent[None] if ring is None else ring
    ring_table = view.recent_table if view.ring_table is None else view.ring_table
    given = query
    query = ring[0, 0] if query is None else query
    of_queries = (recent,) * 3 if moments is None else moments.tensors
    _seal_kernel[(_num_programs(recent.device),)](
        recent,
        sealed,
        ring,
        query,
        view.recent_table,
        view.sealed_table,
        ring_table,
        view.query_start,
        view.seq_lens,
        tables.layer_table,
        tables.head_table,
        *of_queries,
        recent if scores is None else scores,
        requests,
        softmax_scale,
        0.0 if moments is None else moments.epsilon,
        *recent.stride()[:3],
        *sealed.stride()[:4],
        *ring_strides,
        *query.stride()[:2],
        view.recent_table.stride(0),
        view.sealed_table.stride(0),
        ring_table.stride(0),
        0 if scores is None else scores.stride(0),
        SCORER=scorer.name,
        SMOOTH=scorer.smooth_tokens,
        HAS_SCORES=scores is not None,
        HAS_QUERY=given is not None,
        C=C,
        W=g.window_size_tokens,
        S=g.n_sink_tokens,
        R=g.recent_block_tokens,
        P=g.page_size_rows,
        D=D,
        RING_R=max(1, g.ring_block_tokens),
        SCORE_ROW=g.row_bytes // SCORE_BYTES,
        LAYERS=len(tables.layers),
        HEADS=g.num_kv_heads,
        GROUP=g.queries_per_kv_head,
        C_PAD=C_pad,
        REQUESTS_PAD=max(128, power_of_two(requests)),
        HALF=0 if moments is None else moments.rotation.shape[1],
        PARTS=_PARTS[recent.dtype],
        KEY_TILE=tiles.key_tile,
        ROW_TILE=tiles.row_tile,
        QUERY_TILE=16,
        FACTOR_TILE=tiles.factor_tile,
        KEY_BITS=key_bits,
        DIGIT_BITS=_DIGIT_BITS,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
