"""The layout of a compressed KV cache: every size, count and offset is computed here.

A sequence is cut into chunks of C tokens. Chunk j is positions [jC - W, (j+1)C - W), chunk 0 starts
at 0; it is sealed once the first (j+1)C tokens have been computed. A query at position p sees

    0              jC - W                       C * (p // C) - W            p
    |-- chunk 0 --|-- ... rows kept of chunks < p // C --|-- raw tokens --|
       sealed blocks, one a chunk, for all layers           recent blocks

A sealed block holds, for every head group of every layer, `pages` pages at a fixed offset. A page
is [heads of the group, P rows, K | V]. A recent block holds R raw tokens of all heads of all layers
and is as long as fits into a sealed block's bytes, because both are drawn from one pool.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from tangram.errors import BudgetError, ConfigurationError
from tangram.geometry.heads import HeadGroups


class TokenRange(NamedTuple):
    """Positions [start, stop) of a sequence."""

    start: int
    stop: int


class BlockCount(NamedTuple):
    """Blocks of the pool, by what they hold."""

    sealed: int
    recent: int
    query_ring: int

    @property
    def total(self) -> int:
        """Blocks of all kinds."""
        return sum(self)


RETENTION_TOKENS = 4096
"""Wanted distance of the boundaries inside a prompt at which others may resume it."""


def _largest_divisor(of: int, at_most: int) -> int:
    """The largest divisor of `of` that is not above `at_most`, and 1 if none is."""
    return max((d for d in range(1, min(of, at_most) + 1) if of % d == 0), default=1)


def check_chunk(
    chunk_size_tokens: int, window_size_tokens: int, n_sink_tokens: int, page_size_rows: int
) -> None:
    """Raise ConfigurationError, naming the option, if C, W, S and P do not fit each other."""
    C, W, S, P = chunk_size_tokens, window_size_tokens, n_sink_tokens, page_size_rows
    if C < P or C % P:
        raise ConfigurationError(
            f"--compression-chunk-size is {C}: it must be a multiple of the page size, {P} rows"
        )
    if not 0 <= W < C:
        raise ConfigurationError(
            f"--compression-window-size is {W}: it must be at least 0 and below "
            f"--compression-chunk-size, {C}"
        )
    if not 0 <= S <= C - W:
        raise ConfigurationError(
            f"--compression-n-sink-tokens is {S}: it must be at least 0 and fit the first "
            f"chunk, which has {C - W} tokens"
        )


@dataclass(frozen=True)
class Geometry:
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
    def num_layers(self) -> int:
        """Attention layers."""
        return self.head_groups.num_layers

    @property
    def num_kv_heads(self) -> int:
        """KV heads of a layer."""
        return self.head_groups.num_kv_heads

    @property
    def page_group_size(self) -> int:
        """H_p, heads of a head group."""
        return self.head_groups.group_size

    @property
    def queries_per_kv_head(self) -> int:
        """Query heads that read one KV head."""
        return self.num_query_heads // self.num_kv_heads

    @property
    def row_elements(self) -> int:
        """Elements of a row: one token's K and V of one head."""
        return 2 * self.head_size

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.row_elements * self.itemsize_bytes

    # -- positions ---------------------------------------------------------------------------

    def sealed_chunks(self, num_tokens: int) -> int:
        """Chunks that are sealed once `num_tokens` are computed, and that the next query sees."""
        return num_tokens // self.chunk_size_tokens

    def chunk_range(self, chunk: int) -> TokenRange:
        """Positions of a chunk; chunk 0 is W tokens shorter than the others."""
        C, W = self.chunk_size_tokens, self.window_size_tokens
        return TokenRange(max(0, chunk * C - W), (chunk + 1) * C - W)

    def recent_start(self, num_tokens: int) -> int:
        """First position that is still raw once `num_tokens` are computed."""
        C = self.chunk_size_tokens
        return max(0, num_tokens // C * C - self.window_size_tokens)

    @property
    def max_recent_tokens(self) -> int:
        """Most tokens of a request at rest that are raw: a chunk but for one token, and the window.

        After n tokens the first raw position is at most so many before n, for every n.
        """
        return self.chunk_size_tokens - 1 + self.window_size_tokens

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
    def pages_per_block(self) -> int:
        """Pages of a sealed block: those of all groups of all layers."""
        return sum(sum(pages) for pages in self.head_groups.pages)

    @property
    def page_rows(self) -> int:
        """Rows of a page over its heads."""
        return self.page_group_size * self.page_size_rows

    @property
    def rows_per_block(self) -> int:
        """Rows of a sealed block, over all heads and layers."""
        return self.pages_per_block * self.page_rows

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

    def page_table(self, layer: int, group: int, block_ids: Sequence[int]) -> np.ndarray:
        """Pages of a head group, derived from the blocks of its chunks.

        Args:
            layer: attention layer.
            group: head group of the layer.
            block_ids: [chunks], the sealed block of every chunk, in order.

        Returns:
            [chunks * pages] int64, page numbers when the pool is seen as one array of pages.
        """
        blocks = np.asarray(block_ids, dtype=np.int64).reshape(-1, 1)
        pages = np.arange(self.head_groups.pages[layer][group], dtype=np.int64)
        table = blocks * self.pages_per_block + self.page_offsets[layer][group] + pages
        return table.reshape(-1)

    # -- blocks ------------------------------------------------------------------------------

    @property
    def head_page_bytes(self) -> int:
        """Bytes of one head's part of a page, P rows side by side."""
        return self.page_size_rows * self.row_bytes

    @property
    def sealed_block_bytes(self) -> int:
        """Bytes of one sealed chunk of all layers."""
        return self.rows_per_block * self.row_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one raw token of all layers."""
        return self.num_layers * self.num_kv_heads * self.row_bytes

    @cached_property
    def recent_block_tokens(self) -> int:
        """R, the longest recent block that divides C and fits into a sealed block's bytes."""
        return _largest_divisor(self.chunk_size_tokens, self.sealed_block_bytes // self.token_bytes)

    @property
    def retention_interval_tokens(self) -> int:
        """Distance of the boundaries inside a prompt whose raw window stays cached."""
        C = self.chunk_size_tokens
        return max(1, RETENTION_TOKENS // C) * C

    @property
    def chunk_recent_blocks(self) -> int:
        """Recent blocks that a chunk's tokens take."""
        return self.chunk_size_tokens // self.recent_block_tokens

    @property
    def window_recent_blocks(self) -> int:
        """Recent blocks before a boundary that its raw window lies in."""
        return -(-self.window_size_tokens // self.recent_block_tokens)

    @property
    def recent_block_bytes(self) -> int:
        """Bytes of one recent block of all layers."""
        return self.recent_block_tokens * self.token_bytes

    @property
    def query_bytes(self) -> int:
        """Bytes of one token's queries of all layers."""
        return self.num_layers * self.num_query_heads * self.head_size * self.itemsize_bytes

    @cached_property
    def ring_block_tokens(self) -> int:
        """Queries in one block of the query ring: divides W, fits into a sealed block's bytes."""
        fit = self.sealed_block_bytes // self.query_bytes
        return _largest_divisor(self.window_size_tokens, fit) if self.has_query_ring else 0

    @property
    def ring_blocks(self) -> int:
        """Blocks of a running request's query ring."""
        return self.window_size_tokens // self.ring_block_tokens if self.has_query_ring else 0

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of the pool: its widest use."""
        ring = self.ring_block_tokens * self.query_bytes
        return max(self.sealed_block_bytes, self.recent_block_bytes, ring)

    def blocks_held(self, num_tokens: int, num_computed_tokens: int | None = None) -> BlockCount:
        """Blocks of a request, known before it runs.

        Args:
            num_tokens: tokens that have room: those computed and those that the running step adds.
            num_computed_tokens: tokens computed before that step; all of them when absent, as for
                a request at rest.
        """
        computed = num_tokens if num_computed_tokens is None else num_computed_tokens
        R = self.recent_block_tokens
        recent = -(-num_tokens // R) - self.recent_start(computed) // R
        return BlockCount(self.sealed_chunks(num_tokens), recent, self.ring_blocks)

    def max_recent_blocks(self, max_step_tokens: int, max_model_len: int) -> int:
        """Most recent blocks that a request can hold while a step of that many tokens runs."""
        tokens = self.max_recent_tokens + max_step_tokens
        return -(-min(tokens, max_model_len) // self.recent_block_tokens) + 1

    def held_bytes(self, num_tokens: int) -> int:
        """Bytes of the pool that a request of `num_tokens` holds at rest."""
        return self.pool_bytes(self.blocks_held(num_tokens).total)

    def rows_bytes(self, num_rows: int) -> int:
        """Bytes of rows."""
        return num_rows * self.row_bytes

    def pool_bytes(self, num_blocks: int) -> int:
        """Bytes of blocks of the pool, whatever they hold."""
        return num_blocks * self.block_bytes

    def full_bytes(self, num_tokens: int) -> int:
        """Bytes that the same tokens take uncompressed."""
        return num_tokens * self.token_bytes

    def replace_budgets(self, head_groups: HeadGroups) -> Geometry:
        """The layout with other budgets of the same size: a block takes the same bytes.

        All else that a running engine has decided by the layout stays as it is.

        Raises:
            BudgetError: other layers, heads, heads of a group, or pages in all.
        """
        made = replace(self, head_groups=head_groups)
        mine, theirs = (
            (g.num_layers, g.num_kv_heads, g.page_group_size, g.pages_per_block)
            for g in (self, made)
        )
        if mine != theirs:
            raise BudgetError(
                f"budgets of {theirs} layers, KV heads, heads of a group and pages in all cannot "
                f"replace budgets of {mine}: blocks would change their size; start another engine"
            )
        return made

    def saved_bytes(self, blocks: BlockCount, num_tail_tokens: int) -> int:
        """Bytes that requests save against the same tokens uncompressed, shared blocks once.

        Args:
            blocks: blocks of the pool that the requests hold.
            num_tail_tokens: their tokens past their last boundaries. Every sealed block stands for
                C tokens more.

        Returns:
            May be negative: a short request saves nothing and holds whole blocks.
        """
        tokens = blocks.sealed * self.chunk_size_tokens + num_tail_tokens
        return self.full_bytes(tokens) - self.pool_bytes(blocks.total)

    # -- identity ----------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """A JSON object from which `from_json` makes an equal geometry."""
        plain = asdict(self)
        heads, pages = self.head_groups.to_lists()
        plain["head_groups"] = {"heads": heads, "pages": pages}
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
