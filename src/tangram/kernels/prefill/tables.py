"""What the kernel is told: how a step is cut into tiles, and where every head's rows lie.

Both tables list the heaviest work first. The kernel starts its programs in the order of the tables,
so the lightest ones fill the gaps at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tangram.geometry import Geometry
from tangram.kernels.segments import Segments
from tangram.kernels.sizes import SMALL_SHARED_BYTES

TILE_COLUMNS = (
    "request", "first_query", "num_queries", "position", "sealed_chunks", "raw_start",
    "first_gathered",
)  # fmt: skip
HEAD_COLUMNS = ("kv_head", "first_page", "budget_pages", "member", "first_row", "divisor")


@dataclass(frozen=True)
class Blocks:
    """How large the kernel's tiles are, and what runs one.

    Attributes:
        query_rows: rows of a tile of queries; a row is one query of one query head.
        key_rows: rows that are attended to at once.
        warps: of 32 threads.
        stages: depth of the software pipeline that fetches keys and values.
    """

    query_rows: int
    key_rows: int
    warps: int
    stages: int

    def queries_per_tile(self, queries_per_kv_head: int) -> int:
        """Queries of a tile: it holds those of all query heads that read one KV head."""
        return self.query_rows // queries_per_kv_head


def choose_blocks(head_size: int, itemsize_bytes: int, shared_bytes: int) -> Blocks:
    """The fastest tiles measured on an H200 for a head size, in two-byte types.

    Float32 takes tiles that fit the same memory; it serves tests only. Large heads take smaller
    ones where a block of threads has little shared memory.
    """
    if itemsize_bytes > 2:
        return Blocks(query_rows=64, key_rows=32, warps=8, stages=1)
    if head_size > 128 and shared_bytes <= SMALL_SHARED_BYTES:
        return Blocks(query_rows=64, key_rows=32, warps=4, stages=2)
    if head_size > 128:
        return Blocks(query_rows=128, key_rows=64, warps=8, stages=2)
    return Blocks(query_rows=128, key_rows=64, warps=8 if head_size > 64 else 4, stages=3)


def make_tiles(
    segments: Segments,
    geometry: Geometry,
    blocks: Blocks,
    first_gathered: np.ndarray | None = None,
) -> np.ndarray:
    """Cut every segment into tiles of queries; a tile with more rows to see comes first.

    Args:
        segments: the step, cut at multiples of C.
        geometry: the layout.
        blocks: the tiles' sizes, the same as the kernel's.
        first_gathered: [segments], of a `SealedStep`, where another kernel attends to the sealed
            rows first.

    Returns:
        [tiles, 7] int32: row of the batch, index of the first query in the step's flat order,
        number of queries, position of the first query, sealed chunks that all of them see,
        the first raw position that they see, and the first query's index among a head's gathered
        ones; -1 where the tile has its sealed rows still to see.
    """
    per_tile = blocks.queries_per_tile(geometry.queries_per_kv_head)
    C = geometry.chunk_size_tokens
    counts = -(-segments.num_queries // per_tile)
    owner = np.repeat(np.arange(len(segments)), counts)
    skipped = per_tile * (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts))
    position = segments.position[owner] + skipped
    sealed = position // C
    tiles = np.empty((len(owner), len(TILE_COLUMNS)), dtype=np.int32)
    tiles[:, 0] = segments.request[owner]
    tiles[:, 1] = segments.first_query[owner] + skipped
    tiles[:, 2] = np.minimum(segments.num_queries[owner] - skipped, per_tile)
    tiles[:, 3] = position
    tiles[:, 4] = sealed
    raw_start = np.maximum(0, sealed * C - geometry.window_size_tokens)
    tiles[:, 5] = raw_start
    gathered = np.full(len(owner), -1) if first_gathered is None else first_gathered[owner]
    is_gathered = gathered >= 0
    tiles[:, 6] = np.where(is_gathered, gathered + skipped, -1)
    to_see = position - np.where(is_gathered, raw_start, 0)
    return tiles[np.argsort(-to_see, kind="stable")]


def make_head_table(geometry: Geometry, layer: int) -> np.ndarray:
    """Where the rows of a layer's KV heads lie in a sealed block; the largest budget comes first.

    Returns:
        [kv_heads, 6] int32: KV head, first page of its head group, pages that it keeps of a chunk,
        its place in the pages of its group, the row where its rows of chunk 0 begin, and the bits
        of an unsigned number that replaces a division: for n below 2**24, n // pages is
        (2 * n * divisor) >> 32.
    """
    g = geometry
    table = [
        (head, offset, pages, member, g.first_row(layer, group, 0), -(-(2**31) // pages))
        for group, (heads, pages, offset) in enumerate(
            zip(
                g.head_groups.heads[layer],
                g.head_groups.pages[layer],
                g.page_offsets[layer],
                strict=True,
            )
        )
        for member, head in enumerate(heads)
    ]
    table.sort(key=lambda row: -row[2])
    return np.array(table, dtype=np.int64).astype(np.uint32).view(np.int32)
