"""The cache groups of a compressed model: what their blocks hold.

group    vLLM's family     a block holds                          freed
sealed   full attention    the kept rows of one chunk             with the request
recent   sliding window    R raw tokens of all heads and layers   when their chunk is sealed
ring     circular buffer   queries of the observation window      with the request
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import (
    CircularBufferSpec,
    FullAttentionSpec,
    KVCacheSpec,
    SlidingWindowSpec,
)

from tangram.geometry import BlockShape


class _WithShape:
    """What the three specs share: a field beyond their family's, which a merge must keep."""

    shape: BlockShape

    @classmethod
    def of(cls, shape: BlockShape, dtype: Any) -> Any:
        """The spec of a block; as long as a chunk, so that it does not coarsen cache hits."""
        make: Any = cls
        return make(
            block_size=shape.chunk_size_tokens,
            num_kv_heads=1,
            head_size=shape.head_size,
            dtype=dtype,
            shape=shape,
        )

    # The families' own `merge` makes a new object from a fixed list of fields.
    merge: Any = classmethod(KVCacheSpec.merge.__func__)


@dataclass(frozen=True, kw_only=True)
class SealedSpec(_WithShape, FullAttentionSpec):
    """One block is one sealed chunk of all layers: `rows_per_block` rows [K | V]."""

    shape: BlockShape

    @classmethod
    def of(cls, shape: BlockShape, dtype: Any) -> Any:
        """The spec of a block, as wide as a recent one where scores widen that.

        Raw tokens of all layers are then one group: vLLM would deal them to several rather than let
        them widen a block.
        """
        spec = super().of(shape, dtype)
        return (
            replace(spec, page_size_padded=shape.block_bytes) if shape.has_stored_scores else spec
        )

    def get_num_kernel_states(self, kernel_block_size: int) -> int:
        """Rows of a block, which is never split."""
        assert kernel_block_size == self.block_size
        return self.shape.rows_per_block

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of the sealed blocks of a request of the longest length."""
        longest = vllm_config.model_config.max_model_len
        return self.shape.sealed_chunks(longest) * self.page_size_bytes


@dataclass(frozen=True, kw_only=True)
class RecentSpec(_WithShape, SlidingWindowSpec):
    """Raw tokens of one layer, held until their chunk is sealed, W of them one chunk longer."""

    shape: BlockShape

    @classmethod
    def of(cls, shape: BlockShape, dtype: Any) -> RecentSpec:
        """The spec of one layer."""
        return cls(
            block_size=shape.recent_block_tokens,
            num_kv_heads=shape.num_kv_heads,
            head_size=shape.head_size,
            dtype=dtype,
            sliding_window=shape.window_size_tokens + 1,
            # Scores lie where vLLM would pad: rows keep their shape and strides.
            page_size_padded=shape.recent_layer_bytes if shape.has_stored_scores else None,
            shape=shape,
        )

    @property
    def num_retained_tokens(self) -> int:
        """Computed tokens before the next one whose blocks stay in the block table.

        Not every release of vLLM asks for it. Where one does, its model runner V2 nulls the entries
        of older tokens. Its own number is that of a sliding window, and a chunk's raw tokens go
        further back.
        """
        return self.shape.max_recent_tokens

    def max_admission_blocks_per_request(
        self, max_in_flight_tokens: int, max_model_len: int
    ) -> int:
        """Most blocks that a request holds at once."""
        return self.shape.max_recent_blocks(max_in_flight_tokens, max_model_len)


@dataclass(frozen=True, kw_only=True)
class QueryRingSpec(_WithShape, CircularBufferSpec):
    """Blocks of one running request that hold its last W queries of all layers."""

    shape: BlockShape

    @property
    def state_content_size_bytes(self) -> int:
        """Bytes of one token's queries of all layers."""
        return self.shape.query_bytes

    def get_num_kernel_states(self, kernel_block_size: int) -> int:
        """Queries in a block."""
        return self.shape.ring_block_tokens

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of a request's ring."""
        return self.shape.ring_blocks * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Width of the block table.

        Model runner V1 computes a slot mapping for every group, over all positions, and would read
        past a narrower row.
        """
        return max(self.shape.ring_blocks, cdiv(max_len, self.block_size))
