"""Storing keys and values in plain torch, any device."""

from __future__ import annotations

import torch
from torch import Tensor


def store(key: Tensor, value: Tensor, slot_mapping: Tensor, recent_cache: Tensor) -> None:
    """See `tangram.kernels.store.store`."""
    tokens = torch.nonzero(slot_mapping >= 0).squeeze(1)
    slots = slot_mapping[tokens]
    rows = torch.cat([key[tokens], value[tokens]], dim=-1).to(recent_cache.dtype)
    R = recent_cache.shape[2]
    recent_cache[slots // R, :, slots % R] = rows
