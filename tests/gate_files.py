"""Files of gates with random weights, laid out as published ones are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def fastkvzip_layer(
    hidden: int = 24, heads: int = 2, group: int = 3, size: int = 8, sinks: int = 5
) -> dict[str, Tensor]:
    """The state dict of one layer's gate."""
    return {
        "q_proj.weight": torch.randn(heads * group * size, hidden) / hidden**0.5,
        "q_proj.bias": torch.randn(heads * group * size) / 4,
        "k_proj.weight": torch.randn(heads * size, hidden) / hidden**0.5,
        "q_norm.weight": torch.rand(size) + 0.5,
        "k_norm.weight": torch.rand(size) + 0.5,
        "k_base": torch.randn(heads, 1, sinks, size),
        "b": torch.randn(heads, 1, group),
    }


def linear_layer(hidden: int = 24, heads: int = 2) -> dict[str, Tensor]:
    """The state dict of one layer's linear KVzap."""
    return {"weight": torch.randn(heads, hidden) / hidden**0.5, "bias": torch.randn(heads)}


def mlp_layer(hidden: int = 24, heads: int = 2, inner: int = 7) -> dict[str, Tensor]:
    """The state dict of one layer's KVzap of two layers."""
    return {
        "0.weight": torch.randn(inner, hidden) / hidden**0.5,
        "0.bias": torch.randn(inner),
        "2.weight": torch.randn(heads, inner) / inner**0.5,
        "2.bias": torch.randn(heads),
    }


def write_fastkvzip(path: Path, layers: int = 3, seed: int = 0, **sizes: int) -> Path:
    """A file of FastKVzip."""
    torch.manual_seed(seed)
    torch.save({"module": [fastkvzip_layer(**sizes) for _ in range(layers)]}, path)
    return path


def kvzap_state(
    make: Callable[..., dict[str, Tensor]], layers: int = 3, seed: int = 0, **sizes: int
) -> dict[str, Tensor]:
    """The state dict of KVzap's gates of all layers."""
    torch.manual_seed(seed)
    return {
        f"layers.{layer}.{name}": tensor
        for layer in range(layers)
        for name, tensor in make(**sizes).items()
    }


def write_gates(scorer: str, path: Path, **sizes: int) -> Path:
    """A file of a scorer's gates: by its registry name."""
    if scorer == "fastkvzip":
        return write_fastkvzip(path, **sizes)
    torch.save(kvzap_state(mlp_layer, **sizes), path)
    return path
