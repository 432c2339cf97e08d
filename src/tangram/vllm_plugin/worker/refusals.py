"""Layers and models that compression does not serve, seen only when the model is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tangram.errors import refuse
from tangram.geometry import LayerMap
from tangram.vllm_plugin.core.specs import QueryRingSpec, RecentSpec, SealedSpec

_STOCK = "serve the model without --enable-compression"
_ANY_VALUE = {"block_size", "dcp_sharded", "max_tp_shards"}
"""Fields of a layer's spec that say nothing of what it computes: how blocks are cut and dealt."""


def refuse_spec(spec: FullAttentionSpec, served: RecentSpec) -> None:
    """Raise UnsupportedError for a layer of full attention that is not served as it asks.

    Every field that is not understood here has to be at its default, so that what a later vLLM adds
    is refused by name.

    Args:
        spec: what the layer asks for.
        served: what it would get.
    """
    expected = {name: getattr(served, name) for name in ("num_kv_heads", "head_size", "dtype")}
    expected["head_size_v"] = served.head_size
    for field in fields(spec):
        if field.name in _ANY_VALUE:
            continue
        value = getattr(spec, field.name)
        refuse(
            value != expected.get(field.name, field.default),
            f"attention layers whose cache has {field.name} {value}",
            _STOCK,
        )


def refuse_layer(**unsupported: Any) -> None:
    """Raise UnsupportedError for a property of an attention layer, named as vLLM names it."""
    for name, value in unsupported.items():
        refuse(value, f"attention layers with {name}", _STOCK)


def refuse_heads(found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise UnsupportedError if a layer's heads are not those that the plan is made for.

    Args:
        found: query heads, KV heads and elements of a head of the layer.
        expected: the same by the model's config.
    """
    refuse(
        found != expected,
        f"attention layers with {found} query heads, KV heads and elements of a head, where the "
        f"model's config says {expected}",
        _STOCK,
    )


def refuse_selection(reasons: Sequence[str]) -> None:
    """Raise UnsupportedError for what vLLM asks of an attention backend and this one lacks."""
    refuse(
        reasons,
        f"what vLLM asks of the attention backend ({', '.join(reasons)})",
        "leave out the option or environment variable that asks for it, or serve the model without "
        "--enable-compression",
    )


def refuse_uncompressed(specs: Mapping[str, object], expected: LayerMap) -> None:
    """Raise UnsupportedError if layers of the model, once it is made, are not those of the plan.

    Args:
        specs: of every layer that has a cache, by its name.
        expected: layers of the model that the plan compresses.
    """
    ours = SealedSpec | RecentSpec | QueryRingSpec
    others = [name for name, spec in specs.items() if not isinstance(spec, ours)]
    refuse(
        others,
        f"a model whose layers choose their attention backend themselves ({len(others)} of them, "
        f"{', '.join(others[:1])} the first)",
        _STOCK,
    )
    layers = {extract_layer_index(n) for n, spec in specs.items() if isinstance(spec, RecentSpec)}
    refuse(
        layers != set(expected.compressed),
        f"a model in which only {len(layers)} of {len(expected)} layers have attention",
        _STOCK,
    )
