"""How the rows of a decode step are cut into work of like size: pure integers, known at start.

Budgets are constants, so the share of every head group is too, at any length of the sequences. A
group whose heads keep four times the rows gets four times the thread blocks.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from typing import NamedTuple

from tangram.geometry import Geometry

MAX_QUERY_HEADS = 16
"""Query heads of a thread block: lines of a matrix instruction."""
TILE_BYTES = 32768
"""Rows that a thread block takes at once."""
THREAD_BLOCKS_PER_SM = 2
"""Of a batch, for every multiprocessor: all start at once, and more in turn only start again. What
was fastest on an H200."""
MAX_SPLITS = 512
"""Most parts that one head's rows are cut into."""


class Balance(NamedTuple):
    """Largest over mean load of the thread blocks, 1 at best.

    Attributes:
        split_map: of the split map.
        equal: when every head is cut into the same number of parts.
    """

    split_map: float
    equal: float


@dataclass(frozen=True)
class SplitMap:
    """The cut of one layer for one batch size.

    Attributes:
        layer: attention layer.
        batch_size: requests of the batch, padded ones included.
        budget_rows: [groups], rows that each head of a group keeps of a chunk.
        heads_per_group: H_p.
        heads_per_program: heads of a group that one thread block serves.
        splits: [groups], parts that the rows of each head of a group are cut into.
    """

    layer: int
    batch_size: int
    budget_rows: tuple[int, ...]
    heads_per_group: int
    heads_per_program: int
    splits: tuple[int, ...]

    @property
    def thread_blocks(self) -> int:
        """Thread blocks of the whole batch."""
        programs = self.heads_per_group // self.heads_per_program
        return self.batch_size * programs * sum(self.splits)

    def evenly(self, parts: int | None = None) -> SplitMap:
        """What it would be without budgets: every head cut into the same number of parts.

        Args:
            parts: that number; as many as there are thread blocks for, when absent.
        """
        count = len(self.splits)
        parts = parts or max(1, sum(self.splits) // count)
        return replace(self, splits=(parts,) * count)

    def balance(self) -> Balance:
        """How even the sealed rows lie over the thread blocks, and how even without the map."""
        return Balance(self._load(), self.evenly()._load())

    def _load(self) -> float:
        loads = [rows / parts for rows, parts in zip(self.budget_rows, self.splits, strict=True)]
        return max(loads) * sum(self.splits) / sum(self.budget_rows)


def default_heads_per_program(geometry: Geometry) -> int:
    """As many heads of a group as have 16 query heads together and whose page fits a tile."""
    head_page_bytes = geometry.page_size_rows * geometry.row_bytes
    heads = 1
    while (
        geometry.page_group_size % (2 * heads) == 0
        and 2 * heads * geometry.queries_per_kv_head <= MAX_QUERY_HEADS
        and 2 * heads * head_page_bytes <= TILE_BYTES
    ):
        heads *= 2
    return heads


def make_split_map(
    geometry: Geometry,
    layer: int,
    batch_size: int,
    thread_blocks: int,
    heads_per_program: int | None = None,
) -> SplitMap:
    """Cut the rows of a layer into about `thread_blocks` parts of like size.

    Group g should get weight_g / (total / thread_blocks) thread blocks, its weight being its heads
    times their rows. Rounding each on its own can leave one block with half as much again, so
    blocks are dealt one by one, each to the group whose blocks have the most to do: no other cut
    with as many blocks has a smaller largest load.

    Args:
        geometry: the layout.
        layer: attention layer.
        batch_size: requests of the batch; all heads of a group and all requests are cut alike.
        thread_blocks: of the whole batch; more where every head needs one.
        heads_per_program: as many as fit, when absent.

    Source: docs/design.md section 7.
    """
    rows = [geometry.budget_rows(layer, g) for g in range(len(geometry.page_offsets[layer]))]
    splits = [1] * len(rows)
    heads_per_program = heads_per_program or default_heads_per_program(geometry)
    budget = thread_blocks * heads_per_program // (batch_size * geometry.page_group_size)
    heap = [(-float(count), group) for group, count in enumerate(rows)]
    heapq.heapify(heap)
    while sum(splits) < budget and heap:
        _, group = heapq.heappop(heap)
        splits[group] += 1
        if splits[group] < MAX_SPLITS:
            heapq.heappush(heap, (-rows[group] / splits[group], group))
    return SplitMap(
        layer=layer,
        batch_size=batch_size,
        budget_rows=tuple(rows),
        heads_per_group=geometry.page_group_size,
        heads_per_program=heads_per_program,
        splits=tuple(splits),
    )
