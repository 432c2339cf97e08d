"""Who hands out the blocks of the three cache groups, frees them, and says which can be found.

Sealed and recent blocks reuse vLLM's prefix-cache lookup: sealed blocks hit left to right at block
size C, and a boundary counts only where the W raw tokens before it are still there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.single_type_kv_cache_manager import (
    CircularBufferManager,
    FullAttentionManager,
    SlidingWindowManager,
)
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.request import Request

from tangram.vllm_plugin.core.counts import SealedCounts, send_counts_with_statistics
from tangram.vllm_plugin.core.specs import QueryRingSpec, RecentSpec


class _FindsComputed:
    """Takes back what others could find of a step that is not run.

    vLLM lets others find a request's blocks when it plans the step that fills them. With
    priorities it may then take the request out of that step again, and its blocks stay to be found
    though nothing was written to them.
    """

    block_pool: BlockPool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._planned: dict[str, Request] = {}

    def cache_blocks(self, request: Request, *args: Any, **kwargs: Any) -> None:  # noqa: D102
        self._planned[request.request_id] = request
        super().cache_blocks(request, *args, **kwargs)  # type: ignore[misc]

    def pop_blocks_for_free(self, request_id: str) -> list:  # noqa: D102
        blocks: list = super().pop_blocks_for_free(request_id)  # type: ignore[misc]
        request = self._planned.pop(request_id, None)
        if request is not None:
            # A step counts as computed as soon as it is planned whole.
            computed = request.num_computed_tokens
            planned = [b for b in blocks if (b.block_hash_num_tokens or 0) > computed]
            self.block_pool.evict_blocks({block.block_id for block in planned})
        return blocks


class SealedManager(_FindsComputed, FullAttentionManager):
    """Hands out block j when the first (j+1)C tokens have room, and never one for a part of it."""

    supports_fine_grained_hash_lookup = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.counts = SealedCounts()
        send_counts_with_statistics()

    def _sealed_tokens(self, num_tokens: int) -> int:
        return num_tokens // self.block_size * self.block_size

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        """Blocks that `num_tokens` need beyond those already held."""
        return super().get_num_blocks_to_allocate(
            request_id, self._sealed_tokens(num_tokens), *args, **kwargs
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list:
        """Hand out the blocks of the chunks that `num_tokens` complete."""
        is_first = not self.req_to_blocks[request_id]
        blocks = super().allocate_new_blocks(
            request_id, self._sealed_tokens(num_tokens), num_tokens_main_model
        )
        self.counts.take(blocks, is_first)
        self.counts.chunks_sealed += len(blocks)
        return blocks

    def add_local_computed_blocks(  # noqa: D102
        self, request_id: str, new_computed_blocks: Sequence, *args: Any, **kwargs: Any
    ) -> None:
        super().add_local_computed_blocks(request_id, new_computed_blocks, *args, **kwargs)
        self.counts.take(new_computed_blocks, is_first=True)

    def pop_blocks_for_free(self, request_id: str) -> list:  # noqa: D102
        blocks = super().pop_blocks_for_free(request_id)
        self.counts.give_back(blocks)
        return blocks

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Let others find the blocks of the chunks that are complete.

        A chunk that a step of one token completes is found a step later: a decode step may seal
        after it has attended. Steps of more tokens seal before any request attends.
        """
        if num_tokens - request.num_computed_tokens == 1:
            num_tokens = request.num_computed_tokens
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    def _cache_partial_tail_block(self, request: Request, num_tokens: int) -> None:
        """A part of a chunk has no block that could be hit."""


class RecentManager(_FindsComputed, SlidingWindowManager):
    """Frees by chunk: what is raw ends W tokens before the last boundary, not W before the end.

    A history is resumed at a boundary whose last W tokens are cached raw. They take a block or
    more, as much as all that was sealed of the chunk. So inside a prompt they stay at few
    boundaries; in an answer they stay at every one, because the next turn resumes at the last.
    """

    kv_cache_spec: RecentSpec

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Tokens at the start that need no raw block any more."""
        return self.kv_cache_spec.shape.recent_start(num_computed_tokens)

    def get_num_blocks_to_allocate(
        self, *args: Any, apply_admission_cap: bool = False, **kwargs: Any
    ) -> int:
        """Blocks that a request needs; with the cap the most that it holds at once.

        vLLM caps the request's blocks before it takes off those that a hit leaves out, and counts
        none behind a hit that is longer than the cap.
        """
        needed = super().get_num_blocks_to_allocate(*args, **kwargs)
        cap = self.max_admission_blocks_per_request if apply_admission_cap else None
        return needed if cap is None else min(needed, cap)

    @classmethod
    def reachable_block_mask(
        cls,
        start_block: int,
        end_block: int,
        alignment_tokens: int | None,
        kv_cache_spec: KVCacheSpec,
        use_eagle: bool,
        retention_interval: int | None = None,
        reachable_boundaries: Sequence[int] = (),
        **kwargs: Any,
    ) -> list[bool] | None:
        """Which of some full blocks to cache; None for all.

        Args:
            start_block: index of the first of them in the request.
            end_block: index behind the last.
            alignment_tokens: C.
            kv_cache_spec: of this group.
            use_eagle: whether a draft model looks at hits.
            retention_interval: distance in tokens of boundaries to keep; None for every one.
            reachable_boundaries: further ones, first that at which the same prompt resumes.
            kwargs: as vLLM has it.
        """
        mask = super().reachable_block_mask(
            start_block,
            end_block,
            alignment_tokens,
            kv_cache_spec,
            use_eagle,
            retention_interval,
            reachable_boundaries,
            **kwargs,
        )
        if mask is None or not reachable_boundaries:
            return mask
        assert isinstance(kv_cache_spec, RecentSpec)
        shape = kv_cache_spec.shape
        chunk_blocks = shape.chunk_recent_blocks
        answer = shape.sealed_chunks(reachable_boundaries[0]) * chunk_blocks
        for block in range(max(start_block, answer), end_block):
            if chunk_blocks - block % chunk_blocks <= shape.window_recent_blocks:
                mask[block - start_block] = True
        return mask

    @classmethod
    def find_longest_cache_hit(  # noqa: D102
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        **kwargs: Any,
    ) -> tuple[tuple[list, ...], int]:
        assert isinstance(kv_cache_spec, RecentSpec)
        if kv_cache_spec.shape.window_size_tokens == 0:
            # Nothing raw is needed at a boundary, so no missing block can spoil a hit.
            length = max_length // alignment_tokens * alignment_tokens
            blocks = [block_pool.null_block] * (length // kv_cache_spec.block_size)
            return tuple(list(blocks) for _ in kv_cache_group_ids), length
        return super().find_longest_cache_hit(
            block_hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            drop_eagle_block,
            alignment_tokens,
            **kwargs,
        )


class QueryRingManager(CircularBufferManager):
    """Gives a request all blocks of its ring with its first tokens."""

    kv_cache_spec: QueryRingSpec

    def get_num_blocks_to_allocate(  # noqa: D102
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        held = len(self.req_to_blocks.get(request_id, ()))
        return self.kv_cache_spec.shape.ring_blocks - held

    def _claim_ring_block(self, request_id: str, record_for_zeroing: bool = True) -> list:
        held = self.req_to_blocks[request_id]
        if held:
            return []
        held.extend(self.block_pool.get_new_blocks(self.kv_cache_spec.shape.ring_blocks))
        return list(held)
