"""What attention of a small step needs besides the cache: its tiles, and who attends to what.

A tile is some consecutive queries of one request that lie in one chunk. It sees the sealed chunks
before that one, and raw tokens up to its last query: what a query at that position sees. So a tile
of end e takes of every KV head as many units (P rows) as a decoding request of e tokens, and the
line of units is cut into equal parts by what cuts decode's (`tangram.kernels.decode`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tangram.geometry import Geometry
from tangram.kernels.decode.tables import DecodeTables, DecodeWorkspace
from tangram.kernels.prefill.tables import Blocks, choose_blocks
from tangram.kernels.sizes import power_of_two, shared_bytes

TILE_COLUMNS = ("request", "first_query", "num_queries", "position")
MAX_STEP_TOKENS = 512
"""Tokens up to which a step is small. Larger ones take the device longer than the host takes to
launch them, and FlashAttention less time for the sealed part."""
PROGRAMS_PER_SM = 1
"""A program's tile fills a multiprocessor's registers: two took 10 to 50 % longer on an H200."""
LEAST_TILES, LEAST_REQUESTS = 64, 128
"""That the cut of a step is compiled for; then powers of two."""


@dataclass(frozen=True)
class ExtendTables:
    """The KV heads of all layers; made once, never written again, the same for every step.

    Attributes:
        heads: every KV head as a head set of its own.
        blocks: sizes of the kernel's tiles.
    """

    heads: DecodeTables
    blocks: Blocks

    @classmethod
    def of(
        cls, geometry: Geometry, device: torch.device | str, blocks: Blocks | None = None
    ) -> ExtendTables:
        """The tables of a layout; the blocks that were fastest, when none are given."""
        if blocks is None:
            memory = shared_bytes(torch.device(device))
            blocks = choose_blocks(geometry.head_size, geometry.itemsize_bytes, memory)
        return cls(DecodeTables.of(geometry, device, heads_per_program=1), blocks)

    @property
    def geometry(self) -> Geometry:
        """The layout."""
        return self.heads.geometry

    @property
    def queries_per_tile(self) -> int:
        """Most queries of a tile; each has a row for every query head of a KV head."""
        return self.blocks.queries_per_tile(self.geometry.queries_per_kv_head)


@dataclass(frozen=True)
class ExtendWorkspace:
    """Where a step is cut, and where programs leave parts of results.

    Attributes:
        tiles: [tiles, 4] int32: row of the batch, index of the first query in the step's flat
            order, number of queries, position of the first one.
        ends: [tiles] int32, position after a tile's last query; 0 behind the last tile.
        decode_lens: [requests] int32, tokens of the requests that compute a single one in the step,
            and not the first one after a chunk; 0 for others.
        parts: the programs' shares and partial results.
    """

    tiles: Tensor
    ends: Tensor
    decode_lens: Tensor
    parts: DecodeWorkspace

    @classmethod
    def allocate(
        cls, tables: ExtendTables, num_programs: int, max_tokens: int, max_requests: int
    ) -> ExtendWorkspace:
        """Room for steps of so many tokens and requests, on the tables' device."""
        integers: Any = {"dtype": torch.int32, "device": tables.heads.head_sets.device}
        most = num_tiles(max_tokens)
        return cls(
            tiles=torch.zeros(most, len(TILE_COLUMNS), **integers),
            ends=torch.zeros(most, **integers),
            decode_lens=torch.zeros(max_requests, **integers),
            parts=DecodeWorkspace.allocate(tables.heads, num_programs, tables.blocks.query_rows),
        )


def num_tiles(tokens: int) -> int:
    """Tiles that a step of so many tokens can have, rounded up: a tile has one query at least."""
    return max(LEAST_TILES, power_of_two(tokens))
