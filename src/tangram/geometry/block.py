"""A block of the compressed cache: its sizes, and how many of them a request holds.

All of it follows from sizes that every rank of a model has in common; which heads share pages, and
how many, is a rank's own (`Geometry`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from tangram.errors import ConfigurationError


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


SCORE_BYTES = 4
"""Bytes of a score that lies beside its token, a float32."""

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
            f"--compression-chunk-size is {C}: it must be a multiple of the page size, {P} rows, "
            "and above 0"
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


class BlockSizes:
    """What follows from the fields of `BlockShape`, for whatever has them."""

    num_layers: int
    num_kv_heads: int
    num_query_heads: int
    head_size: int
    itemsize_bytes: int
    chunk_size_tokens: int
    window_size_tokens: int
    page_size_rows: int
    page_group_size: int
    pages_per_block: int
    has_query_ring: bool
    has_stored_scores: bool

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

    # -- bytes -------------------------------------------------------------------------------

    @property
    def page_rows(self) -> int:
        """Rows of a page over its heads."""
        return self.page_group_size * self.page_size_rows

    @property
    def rows_per_block(self) -> int:
        """Rows of a sealed block, over all heads and layers."""
        return self.pages_per_block * self.page_rows

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
        """R, the longest recent block that divides C and whose rows fit into a sealed one's bytes.

        Scores may go beyond: blocks of the pool that are a hundredth wider cost less than recent
        blocks that are half as long.
        """
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
    def recent_layer_bytes(self) -> int:
        """Bytes of one layer's part of a recent block: rows, and the scores behind them."""
        rows = self.recent_block_tokens * self.num_kv_heads
        if self.has_stored_scores:
            # Whole rows, so that those of the next layer begin where kernels expect rows.
            rows += -(-rows * SCORE_BYTES // self.row_bytes)
        return rows * self.row_bytes

    @property
    def recent_block_bytes(self) -> int:
        """Bytes of one recent block of all layers."""
        return self.num_layers * self.recent_layer_bytes

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

    def rows_bytes(self, num_rows: int) -> int:
        """Bytes of rows."""
        return num_rows * self.row_bytes

    def pool_bytes(self, num_blocks: int) -> int:
        """Bytes of blocks of the pool, whatever they hold."""
        return num_blocks * self.block_bytes

    def full_bytes(self, num_tokens: int) -> int:
        """Bytes that the same tokens take uncompressed."""
        return num_tokens * self.token_bytes

    # -- requests ----------------------------------------------------------------------------

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


@dataclass(frozen=True)
class BlockShape(BlockSizes):
    """Sizes of a block: what the cache groups of all ranks must agree on.

    Attributes:
        num_layers: attention layers that are compressed.
        num_kv_heads: KV heads of a layer.
        num_query_heads: query heads of a layer; only the query ring's size depends on it.
        head_size: elements of a key, and of a value.
        itemsize_bytes: bytes of one element of the cache.
        chunk_size_tokens: C.
        window_size_tokens: W.
        page_size_rows: P.
        page_group_size: H_p.
        pages_per_block: pages of all groups of all layers.
        has_query_ring: whether the last W queries of every running request are kept.
        has_stored_scores: whether raw tokens have their scores beside them.
    """

    num_layers: int
    num_kv_heads: int
    num_query_heads: int
    head_size: int
    itemsize_bytes: int
    chunk_size_tokens: int
    window_size_tokens: int
    page_size_rows: int
    page_group_size: int
    pages_per_block: int
    has_query_ring: bool
    has_stored_scores: bool
