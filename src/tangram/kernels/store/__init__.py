"""Writing a step's keys and values to recent blocks."""

from __future__ import annotations

from torch import Tensor

from tangram.kernels.store import reference

__all__ = ["store"]


def store(
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    recent_cache: Tensor,
    scores: Tensor | None = None,
    score_cache: Tensor | None = None,
) -> None:
    """Write the keys and values of a step, and scores, to the recent blocks of one layer.

    On a GPU this is one launch without host synchronisation or allocation, fit for a CUDA graph.

    Args:
        key: [tokens or more, kv_heads, head_size], after RoPE.
        value: the same shape.
        slot_mapping: [tokens] int64, block * R + offset in the block; negative for padding.
        recent_cache: [blocks, kv_heads, R, 2 * head_size], rows [K | V].
        scores: [tokens or more, kv_heads] float32, that were made with the tokens, if any were.
        score_cache: [blocks, kv_heads, R] float32, where they go.
    """
    if recent_cache.device.type == "cpu":
        reference.store(key, value, slot_mapping, recent_cache, scores, score_cache)
    else:
        from tangram.kernels.store import kernel

        kernel.store(key, value, slot_mapping, recent_cache, scores, score_cache)
