"""What decode attention knows ahead of time: where a layer's heads lie, and how much each reads.

The unit of work is P rows of the heads that one program serves together (`heads_per_program` of a
group, side by side in a page): the same bytes everywhere. A request of n tokens, with k = (n - 1)
// C sealed chunks before its query, takes of head set s

    k * pages[s] - skipped[s] + raw(n) units,  where skipped counts for k > 0 alone

and so of all head sets a sum that is linear in k and raw(n): budgets are constants. The units of a
layer, request by request and head set by head set, are one line, of which every program takes an
equal part (`kernel.py`); only the lengths are read on the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from tangram.geometry import Geometry

MAX_QUERY_HEADS = 16
"""Query heads of a program: lines of a matrix instruction."""
TILE_BYTES = 32768
"""Rows that a program takes at once."""
PROGRAMS_PER_SM = 2
"""Programs for every multiprocessor: all run at once. What was fastest on an H200."""


class Column(IntEnum):
    """What a line about a head set says; `kernel.py` reads the columns in this order.

    A head's rows over all its chunks are one virtual sequence: row x of it lies in chunk
    x // BUDGET, and there in page x % BUDGET // P. Its raw tokens follow.
    """

    RANK = 0  # of its first head, in the order of the groups
    MEMBER = 1  # of the head group, its first head
    FIRST_PAGE = 2  # of the head group in a block
    BUDGET = 3  # rows of the head in a chunk
    RECIPROCAL = 4  # ceil(2**32 / BUDGET): the high half of its product with x is x // BUDGET
    FIRST_ROW = 5  # where chunk 0's rows begin
    PAGES_BEFORE = 6  # pages of a chunk of all head sets before this one
    SKIPPED_BEFORE = 7  # units of chunk 0 without a row in use, of all head sets before this one


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
class DecodeTable:
    """One layer's head sets; made once, never written again, the same for every batch.

    Attributes:
        head_sets: [head sets + 1, columns] int32; the last line has the sums over all of them.
        order: [kv_heads] int32, heads in the order of the groups.
        geometry: the layout.
        layer: attention layer.
        heads_per_program: KV heads of a head set.
        max_rows: rows of a virtual sequence up to which RECIPROCAL divides exactly.
    """

    head_sets: Tensor
    order: Tensor
    geometry: Geometry
    layer: int
    heads_per_program: int
    max_rows: int

    @property
    def num_head_sets(self) -> int:
        """Head sets of the layer."""
        return len(self.head_sets) - 1

    @classmethod
    def of(
        cls,
        geometry: Geometry,
        layer: int,
        device: torch.device | str,
        heads_per_program: int | None = None,
    ) -> DecodeTable:
        """The table of a layer; as many heads as fit are served together, when not said."""
        heads = heads_per_program or default_heads_per_program(geometry)
        lines = _head_sets(geometry, layer, heads)
        order = [head for group in geometry.head_groups.heads[layer] for head in group]
        divisors = {geometry.recent_block_tokens, *(line[Column.BUDGET] for line in lines[:-1])}
        return cls(
            head_sets=torch.tensor(lines, dtype=torch.int32, device=device),
            order=torch.tensor(order, dtype=torch.int32, device=device),
            geometry=geometry,
            layer=layer,
            heads_per_program=heads,
            max_rows=min(map(_exact_below, divisors)),
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
        for member in range(0, g.page_group_size, heads_per_program):
            rank = group * g.page_group_size + member
            where = [rank, member, g.page_offsets[layer][group]]
            sizes = [budget, reciprocal(budget), first_row]
            lines.append([*where, *sizes, pages_before, skipped_before])
            pages_before += pages
            skipped_before += first_row // P
    return [*lines, [0, 0, 0, 1, 0, 0, pages_before, skipped_before]]


@dataclass(frozen=True)
class DecodeWorkspace:
    """Where a step's programs find their shares and leave parts of results; for all layers in turn.

    Attributes:
        prefix: [3, requests + 1] int32, running sums over the requests of sealed chunks, of
            requests that have some, and of units of raw tokens.
        partial_out: [programs, 2, lines, head_size] float32: what a program found for the head set
            that it begins with, and for the one that it ends in.
        lse_log2: [programs, 2, lines] float32, base-2 log-sum-exp.
        cut: [programs, 4] int32: of the head set that a program begins and does not end, request,
            rank of the first head, which of its two parts it is, and programs that share it; -1 in
            front where there is none.
    """

    prefix: Tensor
    partial_out: Tensor
    lse_log2: Tensor
    cut: Tensor

    @property
    def num_programs(self) -> int:
        """Programs of a launch."""
        return len(self.cut)

    @property
    def max_requests(self) -> int:
        """Most requests of a step."""
        return self.prefix.shape[1] - 1

    @classmethod
    def allocate(
        cls, tables: Iterable[DecodeTable], num_programs: int, max_requests: int
    ) -> DecodeWorkspace:
        """Room for launches of that many programs, on the tables' device."""
        every = list(tables)
        g, device = every[0].geometry, every[0].order.device
        lines = max(t.heads_per_program for t in every) * g.queries_per_kv_head
        return cls(
            prefix=torch.zeros(3, max_requests + 1, dtype=torch.int32, device=device),
            partial_out=torch.empty(num_programs, 2, lines, g.head_size, device=device),
            lse_log2=torch.empty(num_programs, 2, lines, device=device),
            cut=torch.empty(num_programs, 4, dtype=torch.int32, device=device),
        )
