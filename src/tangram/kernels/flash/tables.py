"""What FlashAttention is told: the segments that see sealed rows, as sequences, and their pages.

All queries of a segment see the same sealed rows, without a mask. So a segment and a KV head make a
sequence of their own, whose keys are the head's rows over all sealed chunks. Sequences are listed
by head, in the order of the layer's head table, and then by segment, most sealed chunks first: the
heaviest begin, and those that share a head's rows run together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tangram.geometry import Geometry
from tangram.kernels.segments import Segments
from tangram.kernels.sizes import power_of_two

SEGMENT_COLUMNS = ("request", "first_query", "num_queries", "sealed_chunks", "first_gathered")

MIN_PAIRS = 1 << 26
"""Pairs of a query head's query and a sealed row, in a layer of mean budgets, from which on
FlashAttention's rate is worth a gather of the queries and two launches more. On an H200 the device
gains from half as many on, but the host takes 0.2 to 0.3 ms a layer for the call, which shows in
steps that are shorter than that: see docs/performance.md."""


def fits(geometry: Geometry) -> bool:
    """Whether a head's rows are whole pages, and every page begins a whole number of them apart.

    A head that keeps more than chunk 0 has begins C - W rows before the end of its pages there:
    in the middle of one, unless P divides that.
    """
    g = geometry
    first_chunk_tokens = g.chunk_size_tokens - g.window_size_tokens
    return first_chunk_tokens % g.page_size_rows == 0 and g.block_bytes % g.head_page_bytes == 0


def sealed_pairs(geometry: Geometry, segments: Segments) -> int:
    """Pairs of a query and a sealed row that it sees, over the query heads of a mean layer."""
    chunks = segments.position // geometry.chunk_size_tokens
    rows = geometry.rows_per_block * geometry.queries_per_kv_head
    return int((segments.num_queries * chunks).sum()) * rows // geometry.num_layers


MAX_PAGE_NUMBERS = 1 << 26
"""That a step's page table may have, a quarter of a GiB: vLLM does not know of it when it gives the
memory that is left to the cache."""


def page_numbers(geometry: Geometry, segments: Segments) -> int:
    """Of a step's page table: every sequence has room for as many as the longest."""
    chunks = segments.position // geometry.chunk_size_tokens
    sequences = int(np.count_nonzero(chunks)) * geometry.num_kv_heads
    return sequences * _max_pages(geometry, chunks)


def _max_pages(geometry: Geometry, chunks: np.ndarray) -> int:
    """That a sequence can have, in any layer, of segments that see so many sealed chunks."""
    return int(chunks.max(initial=0)) * max(map(max, geometry.head_groups.pages))


@dataclass(frozen=True)
class SealedStep:
    """The segments of a step that see sealed rows; the same for all layers.

    Their queries are gathered: for every KV head, those of one segment after the other.

    Attributes:
        first_gathered: [all segments of the step] int64 on the host, where a segment's queries
            begin among a head's; -1 where it sees no sealed row.
        segments: [segments, 5] int32 on the device, most sealed chunks first: row of the batch,
            first query in the step's flat order, number of queries, sealed chunks, first_gathered.
        starts: [kv_heads * segments + 1] int32 on the device, where the queries of every sequence
            begin, and where the last one's end.
        num_queries: of all these segments.
        max_queries: of one of them.
        max_pages: that a sequence can have, in any layer.
    """

    first_gathered: np.ndarray
    segments: Tensor
    starts: Tensor
    num_queries: int
    max_queries: int
    max_pages: int

    @classmethod
    def make(cls, geometry: Geometry, segments: Segments, device: torch.device | str) -> SealedStep:
        """The step's, of which at least one segment sees a sealed chunk."""
        g = geometry
        chunks = segments.position // g.chunk_size_tokens
        order = np.argsort(-chunks, kind="stable")[: np.count_nonzero(chunks)]
        counts = segments.num_queries[order]
        total = int(counts.sum())
        begin = np.cumsum(counts) - counts
        first_gathered = np.full(len(segments), -1)
        first_gathered[order] = begin
        starts = (np.arange(g.num_kv_heads)[:, None] * total + begin).reshape(-1)
        lines = (segments.request, segments.first_query, segments.num_queries, chunks)
        table = np.stack([*(line[order] for line in lines), begin], axis=1)
        return cls(
            first_gathered=first_gathered,
            segments=_upload(table, device),
            starts=_upload(np.append(starts, g.num_kv_heads * total), device),
            num_queries=total,
            max_queries=int(counts.max()),
            max_pages=_max_pages(g, chunks),
        )


def _upload(array: np.ndarray, device: torch.device | str) -> Tensor:
    return torch.from_numpy(array.astype(np.int32)).to(device, non_blocking=True)


class SealedWorkspace:
    """Buffers that layers and steps use in turn; one call at a time. They grow, and never shrink.

    Args:
        device: where they lie.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = device
        self._held: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}

    def give(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """A contiguous tensor of that shape, with whatever it holds."""
        last = self._last.get(name)
        if last is not None and last.dtype == dtype and last.shape == shape:
            return last  # as in the layer before
        count = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < count or held.dtype != dtype:
            self._held.pop(name, None)
            self._last.pop(name, None)
            del held, last
            # Contexts grow from step to step: the next power of two serves many of them.
            size = power_of_two(count)
            held = self._held[name] = torch.empty(size, dtype=dtype, device=self._device)
        self._last[name] = held[:count].view(shape)
        return self._last[name]


def head_pages(sealed_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the sealed cache as FlashAttention's pages: P rows of one head.

    Args:
        sealed_cache: [blocks, pages_per_block, H_p, P, 2 * head_size], rows [K | V] side by side;
            outer strides are whole numbers of head pages, as `fits` says.

    Returns:
        Two views [head pages, P, 1, head_size]. Page (b, p, m) of the cache is the one at
        b * stride(0) + p * stride(1) + m * stride(2), in head pages: `page_strides`.
    """
    blocks, pages, members, page_rows, row = sealed_cache.shape
    block, page, member = page_strides(sealed_cache)
    count = 1 + block * (blocks - 1) + page * (pages - 1) + member * (members - 1)
    assert count < 1 << 31, "page numbers are 32 bits long"
    shape, strides = (count, page_rows, 1, row // 2), (page_rows * row, row, row, 1)
    begin = sealed_cache.storage_offset()
    keys = sealed_cache.as_strided(shape, strides)
    return keys, sealed_cache.as_strided(shape, strides, begin + row // 2)


def page_strides(sealed_cache: Tensor) -> tuple[int, int, int]:
    """Head pages from one block, page and member of the sealed cache to the next."""
    page_rows, row = sealed_cache.shape[3:]
    block, page, member, *inner = sealed_cache.stride()
    assert inner == [row, 1], sealed_cache.stride()
    size = page_rows * row
    assert block % size == page % size == member % size == 0, "pages lie apart: see `fits`"
    return block // size, page // size, member // size
