"""What the sealing kernel's scorers make of a chunk's rows: one number a token, [tokens].

Rows are pointers to [K | V], one a token, whose elements pass by in tiles.

ExpectedAttention's covariance of queries is given as a factor F, covariance = F F^T, so that the
quadratic form of a key is |k F|^2. RoPE's average rotation R turns the factor and the mean rather
than the keys, which stay as they are cached, exact in their type, and go into matrix products of
it. The turned factor has float32's bits, more than such a product takes: it goes in as parts that
together have them.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

_SHORTEST = tl.constexpr(1e-12)  # below it a key has no direction
_SHORTEST_VALUE = tl.constexpr(1e-6)  # see `tangram.scorers.learned`
_HIGHEST = tl.constexpr(80.0)


@triton.jit
def _load_rows(rows, is_row, first, END: tl.constexpr, TILE: tl.constexpr):
    """The elements [first, first + TILE) of rows that are given as pointers."""
    element = first + tl.arange(0, TILE)
    mask = is_row[:, None] & (element < END)[None, :]
    return tl.load(rows[:, None] + element[None, :], mask=mask, other=0.0)


@triton.jit
def of_keys(rows, in_chunk, count, SCORER: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    """Scores [tokens] that need keys only."""
    square = tl.zeros(rows.shape, tl.float32)
    for first in range(0, D, TILE):
        keys = _load_rows(rows, in_chunk, first, D, TILE).to(tl.float32)
        square += tl.sum(keys * keys, axis=1)
    norm = tl.sqrt_rn(square)
    score = -norm
    if SCORER == "key_diff":
        scale = 1.0 / tl.maximum(norm, _SHORTEST)
        dot = tl.zeros(rows.shape, tl.float32)
        anchor_square = tl.sum(dot)
        for first in range(0, D, TILE):
            keys = _load_rows(rows, in_chunk, first, D, TILE).to(tl.float32)
            anchor = tl.sum(keys * scale[:, None], axis=0) / count
            dot += tl.sum(keys * anchor[None, :], axis=1)
            anchor_square += tl.sum(anchor * anchor)
        score = -dot * scale / tl.maximum(tl.sqrt_rn(anchor_square), _SHORTEST)
    return score


@triton.jit
def attention(queries, is_query, rows, in_chunk, scale, D: tl.constexpr, TILE: tl.constexpr):
    """Attention weights over the chunk's tokens, [tokens], summed over the queries."""
    logits = tl.zeros([queries.shape[0], rows.shape[0]], tl.float32)
    for first in range(0, D, TILE):
        query = _load_rows(queries, is_query, first, D, TILE)
        keys = _load_rows(rows, in_chunk, first, D, TILE)
        logits = tl.dot(query.to(keys.dtype), tl.trans(keys), logits, input_precision="ieee")
    logits = tl.where(in_chunk[None, :], logits * scale, float("-inf"))
    weight = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    weight = weight / tl.sum(weight, axis=1)[:, None]
    return tl.sum(tl.where(is_query[:, None], weight, 0.0), axis=0)


@triton.jit
def smooth(mean, SIZE: tl.constexpr):
    """The mean over SIZE neighbours, with zeros beyond the chunk's ends."""
    token = tl.arange(0, mean.shape[0])
    total = tl.zeros(mean.shape, tl.float32)
    for offset in tl.static_range(-(SIZE // 2), SIZE // 2 + 1):
        there = token + offset
        inside = (there >= 0) & (there < mean.shape[0])
        total += tl.where(inside, tl.gather(mean, tl.where(inside, there, 0), 0), 0.0)
    return total / SIZE


@triton.jit
def _average_turn(element, rotation, HALF: tl.constexpr):
    """What (R x)[element] is made of, cos * x[element] + sin * x[other]: `other`, cos, sin."""
    is_turned = element < 2 * HALF
    other = tl.where(element < HALF, element + HALF, element - HALF)
    other = tl.where(is_turned, other, element)
    pair = rotation + 2 * tl.minimum(element, other)
    cos = tl.load(pair, mask=is_turned, other=1.0)
    sin = tl.load(pair + 1, mask=is_turned, other=0.0)
    return other, cos, tl.where(element < HALF, -sin, sin)


@triton.jit
def _linear_form(
    rows, in_chunk, mean, rotation, D: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr
):
    """k . R mean, [tokens]."""
    total = tl.zeros(rows.shape, tl.float32)
    for first in range(0, D, TILE):
        element = first + tl.arange(0, TILE)
        inside = element < D
        other, cos, sin = _average_turn(element, rotation, HALF)
        turned = cos * tl.load(mean + element, mask=inside, other=0.0)
        turned += sin * tl.load(mean + other, mask=inside, other=0.0)
        keys = _load_rows(rows, in_chunk, first, D, TILE).to(tl.float32)
        total += tl.sum(keys * turned[None, :], axis=1)
    return total


@triton.jit
def _quadratic_form(
    rows,
    in_chunk,
    factor,
    rotation,
    D: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """|k R F|^2, [tokens], some columns of F at a time."""
    total = tl.zeros(rows.shape, tl.float32)
    for begin in range(0, D, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        product = tl.zeros([rows.shape[0], COLUMNS], tl.float32)
        for first in range(0, D, TILE):
            element = first + tl.arange(0, TILE)
            inside = (element < D)[:, None] & (column < D)[None, :]
            other, cos, sin = _average_turn(element, rotation, HALF)
            at = factor + column[None, :]
            rest = cos[:, None] * tl.load(at + element[:, None] * D, mask=inside, other=0.0)
            rest += sin[:, None] * tl.load(at + other[:, None] * D, mask=inside, other=0.0)
            keys = _load_rows(rows, in_chunk, first, D, TILE)
            for _ in tl.static_range(PARTS):
                part = rest.to(keys.dtype)
                product = tl.dot(keys, part, product, input_precision="ieee")
                rest -= part.to(tl.float32)
        total += tl.sum(product * product, axis=1)
    return total


@triton.jit
def learned(
    rows,
    in_chunk,
    weights,  # [2 * D + 4] float32, of one KV head
    steps,  # [C, HALF, 2] float32
    rotation,  # [HALF, 2] float32
    D: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
):
    """The learned scorer's scores [tokens], for one KV head.

    The key before RoPE times the weights is the key as it is times the weights turned by the
    token's position.
    """
    token = tl.arange(0, rows.shape[0])
    total = tl.zeros(rows.shape, tl.float32)
    key_square = tl.zeros(rows.shape, tl.float32)
    value_square = tl.zeros(rows.shape, tl.float32)
    for first in range(0, D, TILE):
        element = first + tl.arange(0, TILE)
        inside = element < D
        is_turned = element < 2 * HALF
        other = tl.where(element < HALF, element + HALF, element - HALF)
        other = tl.where(is_turned, other, element)
        pair = 2 * tl.minimum(element, other)
        cos = tl.load(rotation + pair, mask=is_turned, other=1.0)[None, :]
        sin = tl.load(rotation + pair + 1, mask=is_turned, other=0.0)[None, :]
        step = steps + token[:, None] * (2 * HALF) + pair[None, :]
        mask = in_chunk[:, None] & is_turned[None, :]
        step_cos = tl.load(step, mask=mask, other=1.0)
        step_sin = tl.load(step + 1, mask=mask, other=0.0)
        mine = tl.load(weights + element, mask=inside, other=0.0)
        theirs = tl.load(weights + other, mask=inside, other=0.0)
        theirs = tl.where(element < HALF, -theirs, theirs)
        turned = (cos * step_cos - sin * step_sin) * mine[None, :]
        turned += (sin * step_cos + cos * step_sin) * theirs[None, :]
        keys = _load_rows(rows, in_chunk, first, D, TILE).to(tl.float32)
        total += tl.sum(keys * turned, axis=1)
        key_square += tl.sum(keys * keys, axis=1)
        values = _load_rows(rows + D, in_chunk, first, D, TILE).to(tl.float32)
        of_values = tl.load(weights + D + element, mask=inside, other=0.0)
        total += tl.sum(values * of_values[None, :], axis=1)
        value_square += tl.sum(values * values, axis=1)
    value_norm = tl.sqrt_rn(value_square)
    total += tl.load(weights + 2 * D) * tl.sqrt_rn(key_square)
    total += tl.load(weights + 2 * D + 1) * value_norm
    total += tl.load(weights + 2 * D + 2) * tl.log(tl.maximum(value_norm, _SHORTEST_VALUE))
    total += tl.load(weights + 2 * D + 3)
    return tl.exp(tl.minimum(tl.maximum(total, -_HIGHEST), _HIGHEST))


@triton.jit
def expected(
    rows,
    in_chunk,
    mean,  # [GROUP, D] float32, of the queries of one KV head
    factor,  # [GROUP, D, D] float32
    rotation,  # [HALF, 2] float32
    scale,
    epsilon,
    D: tl.constexpr,
    HALF: tl.constexpr,  # pairs of dimensions that RoPE turns
    GROUP: tl.constexpr,
    TILE: tl.constexpr,  # elements of keys in one product
    COLUMNS: tl.constexpr,  # of a factor in one product
    PARTS: tl.constexpr,  # how many of the rows' type hold a float32
):
    """ExpectedAttention's scores [tokens], for one KV head."""
    weight = tl.zeros(rows.shape, tl.float32)
    for query_head in range(GROUP):
        of_head = mean + query_head * D
        logits = scale * _linear_form(rows, in_chunk, of_head, rotation, D, HALF, TILE)
        of_head = factor + query_head * (D * D)
        logits += (0.5 * scale * scale) * _quadratic_form(
            rows, in_chunk, of_head, rotation, D, HALF, TILE, COLUMNS, PARTS
        )
        logits = tl.where(in_chunk, logits, float("-inf"))
        exponential = tl.exp(logits - tl.max(logits, axis=0))
        weight += exponential / tl.sum(exponential, axis=0)
    square = tl.zeros(rows.shape, tl.float32)
    for first in range(0, D, TILE):
        values = _load_rows(rows + D, in_chunk, first, D, TILE).to(tl.float32)
        square += tl.sum(values * values, axis=1)
    return (weight / GROUP + epsilon) * tl.sqrt_rn(square)
