"""Checks that vLLM takes the plugin's specs and managers as they are meant."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from tangram.geometry import Geometry
from tangram.plan.compression_plan import make_plan
from tangram.plan.options import CompressionOptions
from tangram.profile import ModelIdentity
from tangram.vllm_plugin.compat.hook import Hook, behaves
from tangram.vllm_plugin.core.managers import QueryRingManager, RecentManager, SealedManager
from tangram.vllm_plugin.core.specs import QueryRingSpec, RecentSpec, SealedSpec


@functools.cache
def _layout() -> Geometry:
    """A small layout: 2 layers, 4 KV heads of 64."""
    model = ModelIdentity(
        architecture="Sample",
        num_layers=2,
        num_kv_heads=4,
        num_query_heads=8,
        head_size=64,
        hidden_size=512,
        vocab_size=100,
    )
    options = CompressionOptions(compression_ratio=0.25, compression_scorer="snap_kv")
    return make_plan(options, model, itemsize_bytes=2).geometry


def _our_specs() -> list[Any]:
    shape = _layout().block_shape
    return [spec.of(shape, torch.float16) for spec in (SealedSpec, RecentSpec, QueryRingSpec)]


def _managers() -> str | None:
    """Specs of the plugin and vLLM's own have their managers side by side."""
    plain = FullAttentionSpec(block_size=16, num_kv_heads=4, head_size=64, dtype=torch.float16)
    found = [KVCacheSpecRegistry.get_manager_class(spec) for spec in (*_our_specs(), plain)]
    expected = [SealedManager, RecentManager, QueryRingManager, FullAttentionManager]
    names = [getattr(cls, "__name__", "None") for cls in found]
    return None if found == expected else f"gives {names}"


def _merged() -> str | None:
    """A group of layers keeps the layout."""
    for spec in _our_specs():
        if type(spec).merge([spec, spec]) != spec:
            return f"changes a {type(spec).__name__}"
    return None


def _page_sizes() -> str | None:
    """Blocks are as large as geometry says."""
    layout, (sealed, recent, ring) = _layout(), _our_specs()
    found = [sealed.page_size_bytes, recent.page_size_bytes * layout.num_layers]
    found.append(ring.page_size_bytes)
    expected = [layout.sealed_block_bytes, layout.recent_block_bytes]
    expected.append(layout.ring_block_tokens * layout.query_bytes)
    scored = replace(layout, has_stored_scores=True)
    wide, raw = (s.of(scored.block_shape, torch.float16) for s in (SealedSpec, RecentSpec))
    found += [wide.page_size_bytes, raw.page_size_bytes * layout.num_layers]
    expected += [scored.block_bytes, scored.recent_block_bytes]
    return None if found == expected else f"gives {found} bytes, expected {expected}"


def _retained() -> str | None:
    """The entries of all tokens that a next token may read raw stay in the block table."""
    layout, (_, recent, _) = _layout(), _our_specs()
    found, expected = recent.num_retained_tokens, layout.chunk_size_tokens - 1
    expected += layout.window_size_tokens
    return None if found == expected else f"keeps {found} tokens, expected {expected}"


HOOKS: tuple[Hook, ...] = (
    behaves(
        "managers of specs",
        "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.get_manager_class",
        "the plugin's specs and vLLM's own keep their managers",
        _managers,
        upstream="a registry that knows vLLM's own specs from the start",
        until="as long as compressed caches are cache groups of vLLM's",
    ),
    behaves(
        "merging specs",
        "vllm.v1.kv_cache_interface:KVCacheSpec.merge",
        "layers of one group must keep the layout",
        _merged,
        upstream="families that merge by copying",
        until="vLLM's families keep a subclass's fields",
    ),
    behaves(
        "bytes of a block",
        "vllm.v1.kv_cache_interface:KVCacheSpec.page_size_bytes",
        "the pool holds as many blocks as geometry says",
        _page_sizes,
        upstream="padding, or blocks of several sizes in one pool",
        until="as long as all groups draw on one pool",
    ),
    behaves(
        "raw tokens in the block table",
        "vllm.v1.kv_cache_interface:SlidingWindowSpec",
        "model runner V2 of 0.33 reads the null block for tokens that a spec does not retain",
        _retained,
        names="num_retained_tokens",
        upstream="entries that a group's manager takes out itself",
        until="as long as compressed caches are cache groups of vLLM's",
    ),
)
