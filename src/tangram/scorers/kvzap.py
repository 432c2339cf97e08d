"""KVzap: published small networks that predict the logarithm of KVzip's scores."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tangram.errors import ScorerError
from tangram.scorers.gates import (
    Gate,
    GateScorer,
    GateSizes,
    check_shapes,
    load_tensors,
    projection,
)

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class KVzap(GateScorer):
    """A linear layer, or two with a GELU between, of the hidden state: log scores.

    The file is a folder with model.safetensors, such a file itself, or a state dict that
    `torch.save` wrote: `layers.0.weight` and `layers.0.bias` for every layer, or
    `layers.0.0.weight`, `layers.0.0.bias`, `layers.0.2.weight` and `layers.0.2.bias`.

    Source: arXiv 2601.07891.
    """

    name: ClassVar[str] = "kvzap"

    def read_layers(self, path: Path) -> list[Mapping[str, Tensor]]:
        """The state dict, by layer."""
        found = load_tensors(self, path)
        names = found if isinstance(found, Mapping) else ()
        matches = [_LAYER.fullmatch(str(name)) for name in names]
        if not matches or not all(matches):
            raise self.file_error(
                "expected tensors layers.0.weight or layers.0.0.weight, and so on for every layer: "
                "give the published file"
            )
        layers: dict[int, dict[str, Tensor]] = {}
        for match, tensor in zip(matches, found.values(), strict=True):
            assert match is not None
            layers.setdefault(int(match[1]), {})[match[2]] = tensor
        if sorted(layers) != list(range(len(layers))):
            raise self.file_error(f"it has gates of the layers {sorted(layers)}: one is missing")
        return [layers[layer] for layer in range(len(layers))]

    def make_gate(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Gate:
        """The gate of a layer."""
        return KVzapGate(tensors, dtype)


class KVzapGate(Gate):
    """See `KVzap`. The last product, which makes the scores, is of float32.

    Args:
        tensors: weight [H, hidden] and bias [H], or 0.weight [m, hidden], 0.bias [m], 2.weight
            [H, m] and 2.bias [H].
        dtype: of hidden states.

    Raises:
        ScorerError: other names or shapes.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        first, last = ("0.", "2.") if "0.weight" in tensors else ("", "")
        weights = [tensors.get(f"{part}weight") for part in (first, last)]
        shapes = [tuple(w.shape) for w in weights if isinstance(w, Tensor) and w.dim() == 2]
        if len(shapes) < 2:
            raise ScorerError("expected matrices weight, or 0.weight and 2.weight")
        (middle, hidden), (heads, width) = shapes
        expected: dict[str, tuple[int, ...]] = {
            f"{last}weight": (heads, middle if first else width),
            f"{last}bias": (heads,),
        }
        if first:
            expected |= {f"{first}weight": (middle, hidden), f"{first}bias": (middle,)}
        check_shapes(tensors, expected)
        self.sizes = GateSizes(hidden, heads)
        self.inner: nn.Linear | None = None
        if first:
            self.inner = projection(tensors["0.weight"], tensors["0.bias"], dtype)
        last_weight, last_bias = tensors[f"{last}weight"], tensors[f"{last}bias"]
        self.last = projection(last_weight, last_bias, torch.float32)

    def forward(self, hidden: Tensor) -> Tensor:
        """The log scores."""
        inner = hidden if self.inner is None else F.gelu(self.inner(hidden))
        return self.last(inner.float())
