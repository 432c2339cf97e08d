"""Storing keys and values on a GPU: one program a token, all heads."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tangram.kernels.launch import remember_compiled
from tangram.kernels.sizes import power_of_two


@remember_compiled
@triton.jit
def _store_kernel(
    key_ptr,  # [tokens, heads, D]
    value_ptr,  # [tokens, heads, D]
    slot_ptr,  # [tokens] int64
    recent_ptr,  # [blocks, heads, R, 2 * D]
    score_ptr,  # [tokens, heads] float32
    kept_score_ptr,  # [blocks, heads, R] float32
    stride_key_token,
    stride_key_head,
    stride_value_token,
    stride_value_head,
    stride_block,
    stride_head,
    stride_row,
    stride_score_token,
    stride_score_block,
    HAS_SCORES: tl.constexpr,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    D_PAD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    if slot < 0:
        return
    head = tl.arange(0, HEADS_PAD)[:, None]
    element = tl.arange(0, D_PAD)[None, :]
    mask = (head < HEADS) & (element < D)
    source = token * stride_key_token + head * stride_key_head + element
    key = tl.load(key_ptr + source, mask=mask)
    source = token * stride_value_token + head * stride_value_head + element
    value = tl.load(value_ptr + source, mask=mask)
    # A pool can have more elements than 32 bits count.
    first = (slot // R) * stride_block + (slot % R) * stride_row
    target = recent_ptr + first + head * stride_head + element
    tl.store(target, key.to(recent_ptr.dtype.element_ty), mask=mask)
    tl.store(target + D, value.to(recent_ptr.dtype.element_ty), mask=mask)
    if HAS_SCORES:
        head = tl.arange(0, HEADS_PAD)
        score = tl.load(score_ptr + token * stride_score_token + head, mask=head < HEADS)
        kept = kept_score_ptr + (slot // R) * stride_score_block + slot % R
        tl.store(kept + head * R, score, mask=head < HEADS)


def store(
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    recent_cache: Tensor,
    scores: Tensor | None = None,
    score_cache: Tensor | None = None,
) -> None:
    """See `tangram.kernels.store.store`."""
    tokens = slot_mapping.shape[0]
    if tokens == 0:
        return
    _, heads, R, row = recent_cache.shape
    D = row // 2
    assert key.shape[1:] == value.shape[1:] == (heads, D), (key.shape, value.shape, D)
    assert key.stride(2) == value.stride(2) == recent_cache.stride(3) == 1
    assert key.shape[0] >= tokens and value.shape[0] >= tokens and slot_mapping.stride(0) == 1
    has_scores = scores is not None
    assert has_scores == (score_cache is not None)
    if scores is None or score_cache is None:  # what is there stands for what is not
        scores = score_cache = key
    else:
        assert scores.shape[0] >= tokens and scores.shape[1] == heads
        assert scores.dtype == score_cache.dtype == torch.float32
        assert scores.stride(1) == 1 and score_cache.stride()[1:] == (R, 1)
    _store_kernel[(tokens,)](
        key,
        value,
        slot_mapping,
        recent_cache,
        scores,
        score_cache,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        recent_cache.stride(0),
        recent_cache.stride(1),
        recent_cache.stride(2),
        scores.stride(0) if has_scores else 0,
        score_cache.stride(0) if has_scores else 0,
        HAS_SCORES=has_scores,
        HEADS=heads,
        R=R,
        D=D,
        HEADS_PAD=power_of_two(heads),
        D_PAD=power_of_two(D),
        num_warps=4,
    )
