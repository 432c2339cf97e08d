"""The layout of a compressed KV cache: where every head's rows lie in a block.

A sequence is cut into chunks of C tokens. Chunk j is positions [jC - W, (j+1)C - W), chunk 0 starts
at 0; it is sealed once the first (j+1)C tokens have been computed. A query at position p sees

    0              jC - W                       C * (p // C) - W            p
    |-- chunk 0 --|-- ... rows kept of chunks < p // C --|-- raw tokens --|
       sealed blocks, one a chunk, for all layers           recent blocks

A sealed block holds, for every head group of every layer, `pages` pages at a fixed offset. A page
is [heads of the group, P rows, K | V]. A recent block holds R raw tokens of all heads of all layers
and is as long as fits into a sealed block's bytes, because both are drawn from one pool. Where
scores are made with their tokens, a layer's part is [heads, R rows, K | V], then [heads, R] float32
scores, filled up to whole rows.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

from tangram.errors import BudgetError, ConfigurationError
from tangram.geometry.block import BlockShape, BlockSizes, check_chunk
from tangram.geometry.heads import HeadGroups


@dataclass(frozen=True)
class Geometry(BlockSizes):
    """Sizes, counts and offsets of the compressed cache of one model on one rank.

    Attributes:
        head_groups: which KV heads share pages, and the pages of each group.
        num_query_heads: query heads of a layer; only the query ring's size depends on it.
        head_size: elements of a key, and of a value.
        itemsize_bytes: bytes of one element of the cache.
        chunk_size_tokens: C, a multiple of P.
        window_size_tokens: W, the tokens before a boundary that stay raw; below C.
        n_sink_tokens: S, tokens at the start that are always among chunk 0's rows.
        page_size_rows: P.
        has_query_ring: whether the last W queries of every running request are kept.
        has_stored_scores: whether raw tokens have their scores beside them.

    Raises:
        ConfigurationError: sizes that do not fit each other; the message names the option.
        BudgetError: a group keeps more rows than a chunk has tokens, or fewer than the sinks.
    """

    head_groups: HeadGroups
    num_query_heads: int
    head_size: int
    itemsize_bytes: int
    chunk_size_tokens: int
    window_size_tokens: int
    n_sink_tokens: int
    page_size_rows: int = 16
    has_query_ring: bool = False
    has_stored_scores: bool = False

    def __post_init__(self) -> None:
        check_chunk(
            self.chunk_size_tokens,
            self.window_size_tokens,
            self.n_sink_tokens,
            self.page_size_rows,
        )
        C, S, P = self.chunk_size_tokens, self.n_sink_tokens, self.page_size_rows
        if self.has_query_ring and self.window_size_tokens == 0:
            raise ConfigurationError(
                "--compression-window-size is 0 and the scorer looks at the window's queries: "
                "give a window of at least 1, or another --compression-scorer"
            )
        if self.num_query_heads % self.num_kv_heads:
            raise ConfigurationError(
                f"{self.num_query_heads} query heads do not divide into "
                f"{self.num_kv_heads} KV heads"
            )
        for layer, pages in enumerate(self.head_groups.pages):
            if max(pages) * P > C or min(pages) * P < S:
                raise BudgetError(
                    f"layer {layer} keeps {min(pages) * P} to {max(pages) * P} rows of a chunk: "
                    f"every group needs at least the {S} of --compression-n-sink-tokens "
                    f"and at most the {C} of --compression-chunk-size"
                )

    # -- the model ---------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:  # type: ignore[override]
        """Attention layers."""
        return self.head_groups.num_layers

    @property
    def num_kv_heads(self) -> int:  # type: ignore[override]
        """KV heads of a layer."""
        return self.head_groups.num_kv_heads

    @property
    def page_group_size(self) -> int:  # type: ignore[override]
        """H_p, heads of a head group."""
        return self.head_groups.group_size

    # -- rows and pages ----------------------------------------------------------------------

    def budget_rows(self, layer: int, group: int) -> int:
        """Rows that every head of a group keeps of a chunk."""
        return self.head_groups.pages[layer][group] * self.page_size_rows

    def budget_share(self, layer: int, group: int) -> float:
        """Share of a chunk's tokens that every head of a group keeps."""
        return self.budget_rows(layer, group) / self.chunk_size_tokens

    def kept_rows(self, layer: int, group: int, chunk: int) -> int:
        """Rows in use of a head's budget: all of it, unless chunk 0 has fewer tokens."""
        start, stop = self.chunk_range(chunk)
        return min(self.budget_rows(layer, group), stop - start)

    def first_row(self, layer: int, group: int, chunk: int) -> int:
        """Row of a head's pages where its kept rows begin; they always end at the last row.

        So a head's rows over all its chunks are one run: only chunk 0 can begin late.
        """
        return self.budget_rows(layer, group) - self.kept_rows(layer, group, chunk)

    @cached_property
    def page_offsets(self) -> tuple[tuple[int, ...], ...]:
        """[layers][groups], first page of every head group inside a sealed block."""
        offsets, next_page = [], 0
        for pages in self.head_groups.pages:
            layer = []
            for count in pages:
                layer.append(next_page)
                next_page += count
            offsets.append(tuple(layer))
        return tuple(offsets)

    @cached_property
    def pages_per_block(self) -> int:  # type: ignore[override]
        """Pages of a sealed block: those of all groups of all layers."""
        return sum(sum(pages) for pages in self.head_groups.pages)

    def chunk_rows(self, chunk: int) -> int:
        """Rows in use of a chunk's sealed block, over all heads and layers."""
        return self.page_group_size * sum(
            self.kept_rows(layer, group, chunk)
            for layer, pages in enumerate(self.head_groups.pages)
            for group in range(len(pages))
        )

    def retained_rows(self, num_sealed: int, num_first: int) -> int:
        """Rows in use of sealed blocks, `num_first` of which hold a sequence's chunk 0."""
        return num_first * self.chunk_rows(0) + (num_sealed - num_first) * self.chunk_rows(1)

    @cached_property
    def block_shape(self) -> BlockShape:
        """The sizes of a block, without where a rank's heads lie in it."""
        return BlockShape(**{f.name: getattr(self, f.name) for f in fields(BlockShape)})

    def replace_budgets(self, head_groups: HeadGroups) -> Geometry:
        """The layout with other budgets of the same size: a block takes the same bytes.

        All else that a running engine has decided by the layout stays as it is.

        Raises:
            BudgetError: other layers, heads, heads of a group, or pages in all.
        """
        made = replace(self, head_groups=head_groups)
        if made.block_shape != self.block_shape:
            mine, theirs = (
                (g.num_layers, g.num_kv_heads, g.page_group_size, g.pages_per_block)
                for g in (self, made)
            )
            raise BudgetError(
                f"budgets of {theirs} layers, KV heads, heads of a group and pages in all cannot "
                f"replace budgets of {mine}: blocks would change their size; start another engine"
            )
        return made

    # -- identity ----------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """A JSON object from which `from_json` makes an equal geometry."""
        plain = asdict(self)
        heads, pages = self.head_groups.to_lists()
        plain["head_groups"] = {"heads": heads, "pages": pages}
        if not self.has_stored_scores:  # so that other layouts keep their digest
            del plain["has_stored_scores"]
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Geometry:
        """The geometry that `to_json` described."""
        known = {f.name for f in fields(cls)} - {"head_groups"}
        return cls(
            head_groups=HeadGroups.from_lists(**plain["head_groups"]),
            **{name: value for name, value in plain.items() if name in known},
        )

    @cached_property
    def digest(self) -> str:
        """Twelve hex digits that differ when anything of the layout does."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]
