"""What later queries lose when each head keeps only its scorer's best rows, by share kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tangram.geometry import Geometry
from tangram.scorers import Chunks, Scorer, checked_scores
from tangram.scorers.select import row_places

_TILE_BYTES = 2**24
"""Of what is computed for queries that are looked at together."""


@dataclass(frozen=True, eq=False)
class LayerSample:
    """One layer of one sample, full KV.

    Attributes:
        queries: [tokens, query_heads, head_size] after RoPE.
        keys: [tokens, kv_heads, head_size] after RoPE.
        values: [tokens, kv_heads, head_size].
        softmax_scale: factor on query . key before the softmax.
        stored_scores: [tokens, kv_heads] float32, where the scorer's are made with their tokens.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    softmax_scale: float
    stored_scores: Tensor | None = None


def score_sealed(
    sample: LayerSample, scorer: Scorer, statistics: dict[str, Tensor], geometry: Geometry
) -> Tensor:
    """[sealed tokens, kv_heads] float32, the scorer's scores of all chunks that were sealed."""
    chunks = geometry.sealed_chunks(len(sample.keys))
    first, last = geometry.chunk_range(0), geometry.chunk_range(chunks - 1)
    # Chunk 0 is shorter than the others, which are scored at once.
    batches = [(first.start, first.stop, 1)]
    if chunks > 1:
        batches.append((first.stop, last.stop, chunks - 1))
    return torch.cat(
        [
            _score_batch(sample, scorer, statistics, geometry, *batch).flatten(0, 1)
            for batch in batches
        ]
    )


def _score_batch(
    sample: LayerSample,
    scorer: Scorer,
    statistics: dict[str, Tensor],
    geometry: Geometry,
    start: int,
    stop: int,
    chunks: int,
) -> Tensor:
    """[chunks, tokens, kv_heads], scores of the chunks that lie end to end in start .. stop."""
    window = geometry.window_size_tokens
    window_queries = None
    if scorer.needs_window_queries:
        length = (stop - start) // chunks
        ends = range(start + length, stop + 1, length)
        window_queries = torch.stack([sample.queries[end : end + window] for end in ends])
    positions = torch.arange(start, stop, device=sample.keys.device)
    stored = sample.stored_scores
    return checked_scores(
        scorer,
        Chunks(
            sample.keys[start:stop].unflatten(0, (chunks, -1)),
            sample.values[start:stop].unflatten(0, (chunks, -1)),
            positions.unflatten(0, (chunks, -1)),
            sample.softmax_scale,
            window_size_tokens=window,
            window_queries=window_queries,
            statistics=statistics,
            stored_scores=None if stored is None else stored[start:stop].unflatten(0, (chunks, -1)),
        ),
    )


def sink_mask(num_tokens: int, geometry: Geometry, device: torch.device) -> Tensor:
    """[num_tokens] bool, the sinks among the first tokens of a sample."""
    return torch.arange(num_tokens, device=device) < geometry.n_sink_tokens


def keep_steps(scores: Tensor, grid_rows: list[int], geometry: Geometry) -> Tensor:
    """From which point of the grid on each sealed token is kept.

    Args:
        scores: [sealed tokens, kv_heads] float32.
        grid_rows: rows kept of every chunk at each point of the grid, rising from 0 to C.
        geometry: chunks and sinks.

    Returns:
        [sealed tokens, kv_heads] int64, 1 .. points - 1; for every head the same number of each.
    """
    first = geometry.chunk_range(0).stop
    grid = torch.tensor(grid_rows[:-1], device=scores.device)
    steps = []
    for start, stop in ((0, first), (first, len(scores))):
        if start == stop:
            continue
        length = first if start == 0 else geometry.chunk_size_tokens
        chunks = scores[start:stop].unflatten(0, (-1, length))
        always = sink_mask(length, geometry, scores.device) if start == 0 else None
        places = row_places(chunks, always)
        steps.append(torch.searchsorted(grid, places.contiguous(), right=True).flatten(0, 1))
    return torch.cat(steps)


def later_positions(num_tokens: int, chunk_size_tokens: int, at_most: int) -> Tensor:
    """[queries] int64, positions past the first boundary, thinned out evenly to `at_most`.

    A query at or past the boundary (j + 1) C is a later query of chunk j.
    """
    count = num_tokens - chunk_size_tokens
    if count <= at_most:
        return torch.arange(chunk_size_tokens, num_tokens)
    return chunk_size_tokens + (2 * torch.arange(at_most) + 1) * count // (2 * at_most)


def later_queries(
    num_tokens: int, chunk_size_tokens: int, at_most: int, turns: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Later queries of a sample, and what each weighs.

    Those that generate later answers weigh one half together, and those of all following tokens
    the other; without later answers past the first boundary all of it is the latter's.

    Args:
        num_tokens: of the sample.
        chunk_size_tokens: C.
        at_most: queries, spread evenly over either half.
        turns: positions of the queries that generate later answers, rising.

    Returns:
        positions [queries] int64, and weights [queries] float64 whose sum is 1.
    """
    of_turns = torch.tensor([p for p in turns if p >= chunk_size_tokens], dtype=torch.int64)
    if not len(of_turns) or at_most < 2:
        following = later_positions(num_tokens, chunk_size_tokens, at_most)
        return following, torch.full((len(following),), 1 / len(following), dtype=torch.float64)
    most = at_most // 2
    if len(of_turns) > most:
        of_turns = of_turns[(2 * torch.arange(most) + 1) * len(of_turns) // (2 * most)]
    following = later_positions(num_tokens, chunk_size_tokens, at_most - most)
    halves = [
        torch.full((len(p),), 0.5 / len(p), dtype=torch.float64) for p in (of_turns, following)
    ]
    return torch.cat([of_turns, following]), torch.cat(halves)


def retention_curves(
    sample: LayerSample,
    steps: Tensor,
    num_points: int,
    *,
    positions: Tensor,
    weights: Tensor,
    residual_norms: Tensor,
    factors: Tensor,
    geometry: Geometry,
    max_query_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Mass and error of every head at every point of the grid, weighted means over later queries.

    Both compare attention over all tokens with attention over what a query sees when each sealed
    chunk keeps its best rows: kept rows of sealed chunks, and the raw tokens. For the mass all
    query heads of a KV head weigh the same.

    - mass: of the attention to sealed tokens, the part that falls on kept ones; 0 when none is
      kept and 1 when all are.
    - error: norm of the change that the KV head's query heads make together, through their slice
      of the output projection, relative to the norm of the residual stream; 0 when all are kept.

    Args:
        sample: the layer.
        steps: [sealed tokens, kv_heads], from which point on a token is kept; the same number of
            each for every head.
        num_points: points of the grid, the first of which keeps nothing.
        positions: [queries] later queries.
        weights: [queries] float64, what each weighs; their sum is 1.
        residual_norms: [tokens], norms of the residual stream.
        factors: [kv_heads, k, group * head_size], of which |factors @ x| is the norm of x after
            the output projection.
        geometry: chunks.
        max_query_rows: queries that are looked at together; as many as memory allows when absent.

    Returns:
        (mass, error), each [kv_heads, num_points] float64.

    Source: docs/design.md section 5.
    """
    sealed = _by_steps(sample, steps, num_points)
    rows = max_query_rows or _rows_at_once(sample, num_points)
    mass = torch.zeros(sealed.keys.shape[0], num_points, dtype=torch.float64, device=steps.device)
    error = torch.zeros_like(mass)
    tiles = [x.to(steps.device).split(rows) for x in (positions, weights)]
    for tile, weight in zip(*tiles, strict=True):
        tile_mass, outputs = _tile_outputs(sample, sealed, tile, geometry)
        change = (outputs[:, -1:] - outputs).flatten(3)  # [kv_heads, points, queries, G * d]
        moved = (change @ factors.mT[:, None]).norm(dim=-1).double()
        norms = residual_norms[tile].double().clamp_min(torch.finfo(torch.float32).tiny)
        error += moved @ (weight / norms)
        mass += tile_mass.mean(dim=-1) @ weight
    return mass, error


@dataclass(frozen=True, eq=False)
class _BySteps:
    """Sealed tokens by the step of a rising budget that keeps them first, steps 1, 2 ...

    `keys` and `values`: [kv_heads, steps, tokens of the largest step, head_size] float32;
    `positions`: [kv_heads, steps, tokens of the largest step], past the sample's end where a
    smaller step has no token.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor


def _by_steps(sample: LayerSample, steps: Tensor, num_points: int) -> _BySteps:
    order = steps.argsort(dim=0, stable=True).T  # [kv_heads, sealed tokens], by step, position
    counts = steps[:, 0].bincount(minlength=num_points)
    slot = torch.arange(int(counts[1:].max()), device=steps.device)
    place = (counts.cumsum(0) - counts)[1:, None] + slot
    positions = order[:, place.clamp(max=len(steps) - 1)]
    index = positions.flatten(1)[..., None].expand(-1, -1, sample.keys.shape[-1])
    keys, values = (
        x[: len(steps)].float().transpose(0, 1).gather(1, index).unflatten(1, place.shape)
        for x in (sample.keys, sample.values)
    )
    return _BySteps(keys, values, positions.masked_fill(slot >= counts[1:, None], len(sample.keys)))


def _rows_at_once(sample: LayerSample, num_points: int) -> int:
    """Queries whose logits, and outputs at every point, are in memory together."""
    tokens, heads, size = sample.queries.shape
    row_bytes = 4 * heads * (2 * tokens + 3 * num_points * size)
    return max(1, _TILE_BYTES // row_bytes)


def _tile_outputs(
    sample: LayerSample, sealed: _BySteps, tile: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """Attention of some queries at every point of the grid.

    Returns:
        mass [kv_heads, points, queries, group] float64, and the attention output
        [kv_heads, points, queries, group, head_size] float32.
    """
    chunk, window = geometry.chunk_size_tokens, geometry.window_size_tokens
    limits = tile // chunk * chunk - window  # [queries], first raw position
    queries = sample.queries[tile].float() * sample.softmax_scale
    queries = queries.unflatten(1, (sample.keys.shape[1], -1)).transpose(0, 1)[:, None]

    start, stop = int(limits.min()), int(tile.max()) + 1
    raw = torch.arange(start, stop, device=tile.device)
    visible = (raw >= limits[:, None]) & (raw <= tile[:, None])
    keys, values = (
        x[start:stop].float().transpose(0, 1)[:, None] for x in (sample.keys, sample.values)
    )
    of_raw = _attend(queries, keys, values, visible)
    visible = sealed.positions[:, :, None] < limits[:, None]
    of_steps = _attend(queries, sealed.keys, sealed.values, visible)

    # A point attends to the raw tokens and those of the steps up to its own.
    outputs, lses = (torch.cat(parts, dim=1) for parts in zip(of_raw, of_steps, strict=True))
    shares = (lses - lses.logcumsumexp(dim=1)).exp()[..., None]
    for point in range(1, outputs.shape[1]):
        torch.lerp(
            outputs[:, point - 1], outputs[:, point], shares[:, point], out=outputs[:, point]
        )

    lses = of_steps[1].double()
    weights = (lses - lses.amax(dim=1, keepdim=True)).exp().cumsum(dim=1)
    mass = torch.cat([torch.zeros_like(weights[:, :1]), weights / weights[:, -1:]], dim=1)
    return mass, outputs


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over some keys, and its log-sum-exp (-inf and output 0 where none is visible).

    Args:
        queries: [kv_heads, 1, queries, group, head_size], scaled.
        keys: [kv_heads, parts, tokens, head_size].
        values: the same shape.
        visible: bool, broadcast to [kv_heads, parts, queries, tokens].

    Returns:
        output [kv_heads, parts, queries, group, head_size] and lse_ln [kv_heads, parts, queries,
        group].
    """
    # Flattened, or a product over broadcast heads would copy the keys for every query head.
    rows = queries.shape[2:4]
    logits = (queries.flatten(2, 3) @ keys.mT).unflatten(2, rows)
    logits.masked_fill_(~visible.unsqueeze(-2), -torch.inf)
    base = logits.amax(dim=-1, keepdim=True)
    base = base.masked_fill(base == -torch.inf, 0.0)
    weights = logits.sub_(base).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    output = (weights.flatten(2, 3) @ values).unflatten(2, rows)
    # A sum of visible weights is at least 1: the largest one is exp(0).
    return output.div_(total.clamp_min(1.0)), (base + total.log()).squeeze(-1)
