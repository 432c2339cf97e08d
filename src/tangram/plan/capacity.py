"""What fits in the memory of the KV cache, compressed and not."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from tangram.errors import ConfigurationError
from tangram.geometry import Geometry
from tangram.plan.compression_plan import CompressionPlan

GIB = 1 << 30
FULL_BLOCK_TOKENS = 16
"""Tokens in a block of vLLM's own paged cache."""


def figures(plan: CompressionPlan, memory_bytes: int, contexts: Sequence[int]) -> dict[str, Any]:
    """Everything that follows from a plan and the memory of the KV cache.

    Args:
        plan: what would be served.
        memory_bytes: memory of the KV cache.
        contexts: tokens of a request, prompt and answer together.

    Returns:
        A JSON object. A request counts with the most that it holds at any time while it decodes
        up to the context; the step of a prefill holds that step's raw tokens more.

    Raises:
        ConfigurationError: the memory does not hold two blocks.
    """
    layout = plan.geometry
    full_block_bytes = FULL_BLOCK_TOKENS * layout.token_bytes
    # One block is vLLM's null block.
    blocks = memory_bytes // layout.block_bytes - 1
    full_blocks = memory_bytes // full_block_bytes - 1
    if min(blocks, full_blocks) < 1:
        needed = 2 * max(layout.block_bytes, full_block_bytes)
        raise ConfigurationError(
            f"--gpu-memory is {memory_bytes / GIB:g} GiB, which does not hold two blocks of the "
            f"cache: give {needed / GIB:.3f} or more"
        )
    requests = []
    for context in contexts:
        held, full_held = most_blocks(layout, context), -(-context // FULL_BLOCK_TOKENS)
        requests.append(
            {
                "context_tokens": context,
                "full_bytes": full_held * full_block_bytes,
                "compressed_bytes": held * layout.block_bytes,
                "full_requests": full_blocks // full_held,
                "compressed_requests": blocks // held,
                "gain": full_held * full_block_bytes / (held * layout.block_bytes),
            }
        )
    rows = [layout.budget_rows(layer, group) for layer, group in _groups(layout)]
    return {
        "scorer": plan.scorer_name,
        "scorer_parameters": dict(plan.scorer_parameters),
        "level": plan.level,
        "interpolated": plan.interpolated,
        "profile": plan.profile_path,
        "layout": layout.digest,
        "chunk_size_tokens": layout.chunk_size_tokens,
        "window_size_tokens": layout.window_size_tokens,
        "page_group_size": layout.page_group_size,
        "kv_cache_memory_bytes": memory_bytes,
        "full": {
            "bytes_per_token": layout.token_bytes,
            "block_tokens": FULL_BLOCK_TOKENS,
            "block_bytes": full_block_bytes,
            "blocks": full_blocks,
        },
        "compressed": {
            "bytes_per_token": layout.block_bytes / layout.chunk_size_tokens,
            "block_bytes": layout.block_bytes,
            "sealed_block_bytes": layout.sealed_block_bytes,
            "sealed_block_tokens": layout.chunk_size_tokens,
            "recent_block_bytes": layout.recent_block_bytes,
            "recent_block_tokens": layout.recent_block_tokens,
            "query_ring_blocks": layout.ring_blocks,
            "blocks": blocks,
        },
        "budget_rows": {
            "min": min(rows),
            "median": statistics.median(rows),
            "max": max(rows),
            "mean": statistics.fmean(rows),
        },
        "requests": requests,
    }


def head_skew(layout: Geometry) -> dict[str, float]:
    """Rows of the head that keeps most over the mean of its layer.

    So long a GPU would wait, were every head one thread block's work. Decode attention deals out
    rows in equal parts instead.

    Returns:
        The mean over the layers, and the worst layer.
    """
    skews = [max(pages) * len(pages) / sum(pages) for pages in layout.head_groups.pages]
    return {"mean": statistics.fmean(skews), "worst": max(skews)}


def most_blocks(layout: Geometry, context: int) -> int:
    """Most blocks that a request holds while it decodes, token by token, up to a length."""
    lengths = range(max(1, context - layout.chunk_size_tokens + 1), context + 1)
    return max(layout.blocks_held(length, length - 1).total for length in lengths)


def _groups(layout: Geometry) -> list[tuple[int, int]]:
    pages = layout.head_groups.pages
    return [(layer, group) for layer in range(len(pages)) for group in range(len(pages[layer]))]
