"""Inputs that kernel tests and kernel benchmarks share: a pool as a running server would have it.

Blocks are handed out in random order. All that must not be read is NaN: blocks of no request,
rows of a pool's block beyond what its use needs, tokens not computed yet, table entries of freed
blocks (which point to block 0, as vLLM's null block does, or to a poisoned block).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tangram.geometry import Geometry, HeadGroups
from tangram.kernels.cache_view import CacheView, recent_scores
from tangram.scorers import get_scorer

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest norm of the difference over the norm of the reference, by type; the same everywhere."""


def make_geometry(
    pages: Sequence[Sequence[int]],
    *,
    num_kv_heads: int = 4,
    queries_per_kv_head: int = 2,
    head_size: int = 64,
    dtype: torch.dtype = torch.float32,
    chunk_size_tokens: int = 64,
    window_size_tokens: int = 16,
    n_sink_tokens: int = 4,
    has_query_ring: bool = False,
    has_stored_scores: bool = False,
) -> Geometry:
    """A layout with `pages` [layers][groups]; heads are dealt to groups out of order."""
    size = num_kv_heads // len(pages[0])
    heads = [
        [
            [(layer + 1 + (group + member * len(counts))) % num_kv_heads for member in range(size)]
            for group in range(len(counts))
        ]
        for layer, counts in enumerate(pages)
    ]
    return Geometry(
        head_groups=HeadGroups.from_lists(heads, [list(counts) for counts in pages]),
        num_query_heads=num_kv_heads * queries_per_kv_head,
        head_size=head_size,
        itemsize_bytes=dtype.itemsize,
        chunk_size_tokens=chunk_size_tokens,
        window_size_tokens=window_size_tokens,
        n_sink_tokens=n_sink_tokens,
        has_query_ring=has_query_ring,
        has_stored_scores=has_stored_scores,
    )


def needs_of(scorer: str) -> dict[str, bool]:
    """What `make_geometry` must be told for a scorer."""
    made = get_scorer(scorer)
    return {"has_query_ring": made.needs_window_queries, "has_stored_scores": made.stores_scores}


@dataclass
class Pool:
    """One step's view of the cache for one layer.

    Attributes:
        geometry: the layout.
        layer: attention layer.
        num_tokens: [requests], tokens computed after the step, those of the step included.
        sealed_cache: [blocks, pages_per_block, H_p, P, 2 * head_size], a strided view.
        recent_cache: [blocks, kv_heads, R, 2 * head_size] of this layer, a strided view.
        sealed_table: [requests, chunks] int32.
        recent_table: [requests, blocks] int32.
        generator: for further random inputs.
    """

    geometry: Geometry
    layer: int
    num_tokens: list[int]
    sealed_cache: Tensor
    recent_cache: Tensor
    sealed_table: Tensor
    recent_table: Tensor
    generator: torch.Generator

    def view(
        self, query_start: Tensor | None = None, ring: Tensor | None = None,
        ring_table: Tensor | None = None, device: str | None = None,
    ) -> CacheView:  # fmt: skip
        """What kernels are given of it; a request computes one token where nothing else is said."""
        count = len(self.num_tokens)
        lens = torch.tensor(self.num_tokens, dtype=torch.int32)
        view = CacheView(
            sealed=self.sealed_cache,
            sealed_table=self.sealed_table,
            recent=self.recent_cache,
            recent_table=self.recent_table,
            query_start=torch.arange(count + 1) if query_start is None else query_start,
            seq_lens=lens,
            ring=ring,
            ring_table=ring_table,
            scores=recent_scores(self.recent_cache) if self.geometry.has_stored_scores else None,
        )
        to = self.sealed_cache.device if device is None else device
        return CacheView(*(None if tensor is None else tensor.to(to) for tensor in view))

    def random(self, *shape: int) -> Tensor:
        """Normal values of the pool's type."""
        cache = self.recent_cache
        values = torch.randn(*shape, generator=self.generator, device=cache.device)
        return values.to(cache.dtype)


def make_pool(
    geometry: Geometry,
    num_tokens: Sequence[int],
    *,
    layer: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    spare_blocks: int = 3,
    step_tokens: Sequence[int] | None = None,
) -> Pool:
    """A pool in which every request has `num_tokens` computed.

    Args:
        geometry: the layout.
        num_tokens: tokens of each request after the step.
        layer: whose recent rows and whose pages get values; other layers' stay NaN.
        dtype: of the cache.
        device: where it lies.
        seed: of everything random.
        spare_blocks: blocks of no request.
        step_tokens: of these `num_tokens`, how many the step itself computes (1 when absent): raw
            rows reach back to where they did before the step.
    """
    g = geometry
    generator = torch.Generator(device=device).manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    step_tokens = [1] * len(num_tokens) if step_tokens is None else list(step_tokens)
    held = [g.blocks_held(n, n - s) for n, s in zip(num_tokens, step_tokens, strict=True)]
    blocks = 1 + spare_blocks + sum(h.sealed + h.recent for h in held)
    elements = g.block_bytes // g.itemsize_bytes
    pool = torch.full((blocks, elements), torch.nan, dtype=dtype, device=device)
    free = (1 + torch.randperm(blocks - 1, generator=order)).tolist()

    sealed_cache = pool[:, : g.rows_per_block * g.row_elements].unflatten(
        1, (g.pages_per_block, g.page_group_size, g.page_size_rows, g.row_elements)
    )
    page = g.recent_layer_bytes // g.itemsize_bytes
    rows = g.num_kv_heads * g.recent_block_tokens * g.row_elements
    recent_cache = pool[:, layer * page : layer * page + rows].unflatten(
        1, (g.num_kv_heads, g.recent_block_tokens, g.row_elements)
    )
    R = g.recent_block_tokens
    longest = max(num_tokens)
    sealed_table = torch.zeros(len(num_tokens), longest // g.chunk_size_tokens + 1)
    recent_table = torch.full((len(num_tokens), longest // R + 2), free[0])
    result = Pool(
        g,
        layer,
        list(num_tokens),
        sealed_cache,
        recent_cache,
        sealed_table.to(torch.int32).to(device),
        recent_table.to(torch.int32).to(device),
        generator,
    )
    del free[0]  # poisoned: entries of freed blocks point to it
    for request, (n, step) in enumerate(zip(num_tokens, step_tokens, strict=True)):
        for chunk in range(g.sealed_chunks(n)):
            block = free.pop()
            result.sealed_table[request, chunk] = block
            # A chunk that this very step completes is sealed by the step.
            if chunk < g.sealed_chunks(n - step):
                _fill_sealed(result, block, chunk)
        first = g.recent_start(n - step)
        for index in range(first // R, -(-n // R)):
            block = free.pop()
            result.recent_table[request, index] = block
            low, high = max(first, index * R), min(n, (index + 1) * R)
            rows = result.random(g.num_kv_heads, high - low, g.row_elements)
            recent_cache[block, :, low - index * R : high - index * R] = rows
            if g.has_stored_scores:
                scores = torch.randn(rows.shape[:2], generator=generator, device=device)
                beside = recent_scores(recent_cache)
                beside[block, :, low - index * R : high - index * R] = scores
    return result


def _fill_sealed(pool: Pool, block: int, chunk: int) -> None:
    g = pool.geometry
    for group, pages in enumerate(g.head_groups.pages[pool.layer]):
        first = g.page_offsets[pool.layer][group]
        rows = pool.random(g.page_group_size, pages * g.page_size_rows, g.row_elements)
        rows[:, : g.first_row(pool.layer, group, chunk)] = torch.nan
        paged = rows.unflatten(1, (pages, g.page_size_rows)).transpose(0, 1)
        pool.sealed_cache[block, first : first + pages] = paged


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the reference; NaN anywhere makes it NaN."""
    expected = expected.double()
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def fill_step_chunks(pool: Pool, step_tokens: Sequence[int]) -> None:
    """Give values to the chunks that the step itself completes, as sealing would have."""
    g = pool.geometry
    for request, (n, step) in enumerate(zip(pool.num_tokens, step_tokens, strict=True)):
        for chunk in range(g.sealed_chunks(n - step), g.sealed_chunks(n)):
            _fill_sealed(pool, int(pool.sealed_table[request, chunk]), chunk)


def make_stack(
    geometry: Geometry, num_tokens: Sequence[int], buffer: Tensor, *, seed: int = 0
) -> list[Pool]:
    """Every layer's view of one pool that is `buffer`, whatever it holds; blocks in random order.

    Args:
        geometry: the layout.
        num_tokens: tokens of each request after a step of one token.
        buffer: flat, of the cache's type; its first blocks are used.
        seed: of the order.
    """
    g = geometry
    elements = g.block_bytes // g.itemsize_bytes
    held = [g.blocks_held(n, n - 1) for n in num_tokens]
    count = sum(h.sealed + h.recent for h in held)
    pool = buffer[: count * elements].view(count, elements)
    free = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    R, longest = g.recent_block_tokens, max(num_tokens)
    sealed_table = torch.zeros(len(num_tokens), longest // g.chunk_size_tokens, dtype=torch.int32)
    recent_table = torch.zeros(len(num_tokens), -(-longest // R), dtype=torch.int32)
    used = 0
    for request, (n, blocks) in enumerate(zip(num_tokens, held, strict=True)):
        sealed_table[request, : blocks.sealed] = free[used : used + blocks.sealed]
        used += blocks.sealed
        last = -(-n // R)
        recent_table[request, last - blocks.recent : last] = free[used : used + blocks.recent]
        used += blocks.recent
    generator = torch.Generator(device=buffer.device).manual_seed(seed)
    sealed_table, recent_table = sealed_table.to(buffer.device), recent_table.to(buffer.device)
    sealed_cache = pool[:, : g.rows_per_block * g.row_elements].unflatten(
        1, (g.pages_per_block, g.page_group_size, g.page_size_rows, g.row_elements)
    )
    page = g.num_kv_heads * R * g.row_elements
    shape = (g.num_kv_heads, R, g.row_elements)
    return [
        Pool(
            g,
            layer,
            list(num_tokens),
            sealed_cache,
            pool[:, layer * page : (layer + 1) * page].unflatten(1, shape),
            sealed_table,
            recent_table,
            generator,
        )
        for layer in range(g.num_layers)
    ]
