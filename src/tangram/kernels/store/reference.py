"""Storing keys and values in plain torch, any device."""

from __future__ import annotations

import torch
from torch import Tensor


def store(
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    recent_cache: Tensor,
    scores: Tensor | None = None,
    score_cache: Tensor | None = None,
) -> None:
    """See `tangram.kernels.store.store`."""
    tokens = torch.nonzero(slot_mapping >= 0).squeeze(1)
    slots = slot_mapping[tokens]
    rows = torch.cat([key[tokens], value[tokens]], dim=-1).to(recent_cache.dtype)
    R = recent_cache.shape[2]
    recent_cache[slots // R, :, slots % R] = rows
    if score_cache is not None:
        assert scores is not None
        score_cache[slots // R, :, slots % R] = scores[tokens]
