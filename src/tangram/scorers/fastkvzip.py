"""FastKVzip: published gates that say which tokens a repetition of the text would attend to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from tangram.errors import ScorerError
from tangram.scorers.gates import (
    Gate,
    GateScorer,
    GateSizes,
    check_shapes,
    load_tensors,
    projection,
)

_EPSILON = 1e-6
_HEADS_OF = "k_base"  # [kv_heads, 1, sinks, d]


@dataclass(frozen=True)
class FastKVzip(GateScorer):
    """How much of a softmax a token's own key would get beside learned sinks, mean over queries.

    The file is what `torch.save` wrote of {"module": [state dict of every layer]}.

    Source: arXiv 2601.17668.
    """

    name: ClassVar[str] = "fastkvzip"

    def read_layers(self, path: Path) -> list[Mapping[str, Tensor]]:
        """The state dicts."""
        found = load_tensors(self, path)
        layers = found.get("module") if isinstance(found, Mapping) else None
        if not isinstance(layers, list) or not all(isinstance(one, Mapping) for one in layers):
            raise self.file_error(
                'expected {"module": [state dict of every layer]}: give the published file'
            )
        return layers

    def make_gate(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Gate:
        """The gate of a layer."""
        return FastKVzipGate(tensors, dtype)


class FastKVzipGate(Gate):
    """See `FastKVzip`; H KV heads, each with G queries and one key of d elements.

    Args:
        tensors: q_proj.weight [H * G * d, hidden], q_proj.bias [H * G * d], k_proj.weight
            [H * d, hidden], q_norm.weight and k_norm.weight [d], k_base [H, 1, sinks, d] and
            b [H, 1, G].
        dtype: of hidden states.

    Raises:
        ScorerError: other names or shapes.
    """

    q_scale: Tensor
    k_scale: Tensor
    sinks: Tensor
    bias: Tensor

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        base, bias, weight = (tensors.get(n) for n in (_HEADS_OF, "b", "k_proj.weight"))
        dimensions = [t.dim() if isinstance(t, Tensor) else 0 for t in (base, bias, weight)]
        if base is None or bias is None or weight is None or dimensions != [4, 3, 2]:
            check_shapes(tensors, dict.fromkeys(_names(1, 1, 1, 1, 1), ()))
            raise ScorerError("k_base, b and k_proj.weight are no gate's")
        heads, _, sinks, size = base.shape
        group, hidden = bias.shape[-1], weight.shape[-1]
        check_shapes(tensors, _names(heads, group, size, max(1, sinks), hidden))
        self.sizes = GateSizes(hidden, heads)
        self.q_proj = projection(tensors["q_proj.weight"], tensors["q_proj.bias"], dtype)
        self.k_proj = projection(weight, None, dtype)
        for name, tensor in (
            ("q_scale", tensors["q_norm.weight"]),
            ("k_scale", tensors["k_norm.weight"]),
            ("sinks", base[:, 0].float() / size**0.5),
            ("bias", bias[:, 0]),
        ):
            self.register_buffer(name, tensor.detach().to("cpu", torch.float32).clone())
        self._size = size

    def forward(self, hidden: Tensor) -> Tensor:
        """Mean over a head's queries of exp(own) / (exp(own) + sum over sinks of exp(sink))."""
        heads = self.sizes.num_kv_heads
        query = self.q_proj(hidden).float().unflatten(-1, (heads, -1, self._size))
        query = _normalised(query) * self.q_scale  # [tokens, H, G, d]
        key = self.k_proj(hidden).float().unflatten(-1, (heads, self._size))
        key = _normalised(key) * self.k_scale  # [tokens, H, d]
        own = (query * key.unsqueeze(-2)).sum(dim=-1) / self._size**0.5 + self.bias
        sink = torch.einsum("thgd,hsd->thgs", query, self.sinks)
        return (own - sink.logsumexp(dim=-1)).sigmoid().mean(dim=-1)


def _names(heads: int, group: int, size: int, sinks: int, hidden: int) -> dict[str, tuple]:
    return {
        "q_proj.weight": (heads * group * size, hidden),
        "q_proj.bias": (heads * group * size,),
        "k_proj.weight": (heads * size, hidden),
        "q_norm.weight": (size,),
        "k_norm.weight": (size,),
        _HEADS_OF: (heads, 1, sinks, size),
        "b": (heads, 1, group),
    }


def _normalised(states: Tensor) -> Tensor:
    """Divided by the root of the mean square."""
    return states * torch.rsqrt(states.square().mean(dim=-1, keepdim=True) + _EPSILON)
