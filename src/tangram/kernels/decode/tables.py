"""What decode attention knows ahead of time: where a layer's heads lie, and how much each reads.

The unit of work is P rows of the heads that one program serves together, a head set: heads of a
group that lie side by side in a page. So a unit is the same bytes everywhere. A request of n
tokens, with k = (n - 1) // C sealed chunks before its query, takes of head set s

    k * pages[s] - skipped[s] + raw(n) units,  where skipped counts for k > 0 alone

and of all head sets a sum that is linear in k and raw(n): budgets are constants. The units of a
layer, request by request and head set by head set, are one line, of which every program takes an
equal part (`kernel.py`). Only the lengths are read on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from tangram.geometry import Geometry

MAX_QUERY_HEADS = 16
"""Query heads of a program: lines of a matrix instruction."""
TILE_BYTES = 32768
"""Rows that a program takes at once."""
PROGRAMS_PER_SM = 2
"""Programs for every multiprocessor: all run at once. What was fastest on an H200."""
LEAST_REQUESTS = 64
"""That the launch which finds shares is compiled for; then powers of two."""
START_COLUMNS = 32
"""Integers that tell a program where it starts."""


class Column(IntEnum):
    """What a line about a head set says; `kernel.py` reads the columns in this order.

    A head's rows over all its chunks are one virtual sequence: row x of it lies in chunk
    x // BUDGET, and there in page x % BUDGET // P. Its raw tokens follow.
    """

    MEMBER = 0  # of the head group, the set's first head
    FIRST_PAGE = 1  # of the head group in a block
    BUDGET = 2  # rows of a head in a chunk
    RECIPROCAL = 3  # ceil(2**32 / BUDGET): the high half of its product with x is x // BUDGET
    FIRST_ROW = 4  # where chunk 0's rows begin
    PAGES_BEFORE = 5  # pages of a chunk of all head sets before this one
    SKIPPED_BEFORE = 6  # units of chunk 0 without a row in use, of all head sets before this one
    FIRST_HEAD = 7  # the KV heads of the set, one a column from here on


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


@dataclass(frozen=True)
class DecodeTables:
    """The head sets of all layers; made once, never written again, the same for every batch.

    Attributes:
        head_sets: [layers, head sets + 1, columns + heads of a set] int32; a layer's last line has
            the sums over all of them.
        geometry: the layout.
        heads_per_program: KV heads of a head set.
        max_rows: rows of a virtual sequence up to which RECIPROCAL divides exactly.
    """

    head_sets: Tensor
    geometry: Geometry
    heads_per_program: int
    max_rows: int

    @property
    def num_head_sets(self) -> int:
        """Head sets of a layer."""
        return self.head_sets.shape[1] - 1

    @property
    def lines(self) -> int:
        """Query heads of a head set."""
        return self.heads_per_program * self.geometry.queries_per_kv_head

    @classmethod
    def of(
        cls,
        geometry: Geometry,
        device: torch.device | str,
        heads_per_program: int | None = None,
    ) -> DecodeTables:
        """The tables of a layout; as many heads as fit are served together, when not said."""
        g = geometry
        heads = heads_per_program or default_heads_per_program(g)
        layers = [_head_sets(g, layer, heads) for layer in range(g.num_layers)]
        budgets = {pages * g.page_size_rows for layer in g.head_groups.pages for pages in layer}
        return cls(
            head_sets=torch.tensor(layers, dtype=torch.int32, device=device),
            geometry=g,
            heads_per_program=heads,
            max_rows=min(map(_exact_below, {g.recent_block_tokens, *budgets})),
        )


def reciprocal(rows: int) -> int:
    """ceil(2**32 / rows): the high half of its product with x is x // rows, unless x is huge."""
    return -(-(1 << 32) // rows)


def _exact_below(rows: int) -> int:
    """The x below which (x * reciprocal) >> 32 is x // rows."""
    excess = reciprocal(rows) * rows - (1 << 32)
    return min((1 << 31) - 1, (1 << 32) // excess) if excess else (1 << 31) - 1


def _head_sets(geometry: Geometry, layer: int, heads_per_program: int) -> list[list[int]]:
    g, P = geometry, geometry.page_size_rows
    lines, pages_before, skipped_before = [], 0, 0
    for group, pages in enumerate(g.head_groups.pages[layer]):
        budget, first_row = g.budget_rows(layer, group), g.first_row(layer, group, 0)
        where = g.page_offsets[layer][group], budget, reciprocal(budget), first_row
        for member in range(0, g.page_group_size, heads_per_program):
            heads = g.head_groups.heads[layer][group][member : member + heads_per_program]
            lines.append([member, *where, pages_before, skipped_before, *heads])
            pages_before += pages
            skipped_before += first_row // P
    nothing = [0] * Column.PAGES_BEFORE
    return [*lines, [*nothing, pages_before, skipped_before, *[0] * heads_per_program]]


@dataclass(frozen=True)
class DecodeWorkspace:
    """Where a step's programs are told their shares and leave parts of results.

    Attributes:
        starts: [layers, programs, START_COLUMNS] int32: request in which a program's part begins,
            its length in tokens, units of that head set before it, units of the part, index of the
            head set, and then the line of the head set.
        cut: [layers, programs, 4] int32: of the head set that a program begins and does not end,
            request, index, which of the program's two parts it is, and how many programs share it;
            -1 in front where there is none.
        partial_out: [programs, 2, lines, head_size] float32: what a program found for the head set
            that it begins with, and for the one that it ends in; of one layer after the other.
        lse_log2: [programs, 2, lines] float32, base-2 log-sum-exp.
    """

    starts: Tensor
    cut: Tensor
    partial_out: Tensor
    lse_log2: Tensor

    @property
    def num_programs(self) -> int:
        """Programs of a launch."""
        return self.cut.shape[1]

    @classmethod
    def allocate(
        cls, tables: DecodeTables, num_programs: int, lines: int | None = None
    ) -> DecodeWorkspace:
        """Room for launches of that many programs, on the tables' device.

        Args:
            tables: of all layers.
            num_programs: of a launch.
            lines: query rows of a program, if not the query heads of a head set.
        """
        g, device = tables.geometry, tables.head_sets.device
        integers: Any = {"dtype": torch.int32, "device": device}
        parts = num_programs, 2, tables.lines if lines is None else lines
        return cls(
            starts=torch.zeros(g.num_layers, num_programs, START_COLUMNS, **integers),
            cut=torch.full((g.num_layers, num_programs, 4), -1, **integers),
            partial_out=torch.empty(*parts, g.head_size, device=device),
            lse_log2=torch.empty(parts, device=device),
        )
