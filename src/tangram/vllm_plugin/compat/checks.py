"""What a hook of vLLM is made of, and the checks that run a piece of it on a tiny layout.

vLLM's attributes are looked up by name inside the checks, so that one which is gone is a finding.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from types import CodeType, SimpleNamespace
from typing import Any

from tangram.geometry import Geometry

SUPPORTED_VLLM = "0.32"
MANAGERS = "vllm.v1.core.single_type_kv_cache_manager:"
SPECS = "vllm.v1.kv_cache_interface:"


@dataclass(frozen=True)
class Hook:
    """One thing of vLLM that the plugin relies on.

    Attributes:
        name: what it is, in a few words.
        where: `module:attribute` in vLLM.
        reason: what the plugin needs it for.
        difference: returns what differs from the expected, or None; whatever it raises counts as
            a difference too.
    """

    name: str
    where: str
    reason: str
    difference: Callable[[], str | None]


# -- what a hook is made of ------------------------------------------------------------------


def _get(where: str) -> Any:
    module, _, attributes = where.partition(":")
    return functools.reduce(getattr, attributes.split("."), import_module(module))


def _code_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code_names(constant)


def takes(name: str, where: str, reason: str, parameters: str) -> Hook:
    """A callable that has these parameters, whatever else it has."""

    def difference() -> str | None:
        found = list(inspect.signature(_get(where)).parameters)
        missing = [p for p in parameters.split() if p not in found]
        return f"takes ({', '.join(found)}), lacks {', '.join(missing)}" if missing else None

    return Hook(name, where, reason, difference)


def has(name: str, where: str, reason: str, names: str) -> Hook:
    """A class or dataclass with these attributes or fields."""

    def difference() -> str | None:
        owner = _get(where)
        known = {*dir(owner), *getattr(owner, "__dataclass_fields__", ())}
        missing = [n for n in names.split() if n not in known]
        return f"lacks {', '.join(missing)}" if missing else None

    return Hook(name, where, reason, difference)


def uses(name: str, where: str, reason: str, callee: str) -> Hook:
    """A function whose code refers to a name: that it calls the piece that the plugin replaces."""

    def difference() -> str | None:
        code = inspect.unwrap(_get(where)).__code__
        return None if callee in _code_names(code) else f"no longer uses {callee}"

    return Hook(name, where, reason, difference)


# -- behaviour -------------------------------------------------------------------------------


@functools.cache
def _layout() -> Geometry:
    """A small layout: 2 layers, 4 KV heads of 64."""
    from tangram.plan.compression_plan import make_plan
    from tangram.plan.options import CompressionOptions
    from tangram.profile import ModelIdentity

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
    import torch

    from tangram.vllm_plugin.core.specs import QueryRingSpec, RecentSpec, SealedSpec

    return [
        spec.of(_layout().block_shape, torch.float16)
        for spec in (SealedSpec, RecentSpec, QueryRingSpec)
    ]


def version() -> str | None:
    """The release is one that the hooks were checked with."""
    found = str(_get("vllm:__version__"))
    fits = found == SUPPORTED_VLLM or found.startswith(SUPPORTED_VLLM + ".")
    return None if fits else f"is {found}, expected {SUPPORTED_VLLM}"


def managers() -> str | None:
    """Specs of the plugin and vLLM's own have their managers side by side."""
    from tangram.vllm_plugin.core import managers

    ours = [managers.SealedManager, managers.RecentManager, managers.QueryRingManager]
    full = _our_specs()[1]
    plain = _get(SPECS + "FullAttentionSpec")(
        block_size=16, num_kv_heads=4, head_size=64, dtype=full.dtype
    )
    manager_of = _get("vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.get_manager_class")
    found = [manager_of(spec) for spec in (*_our_specs(), plain)]
    expected = [*ours, _get(MANAGERS + "FullAttentionManager")]
    return None if found == expected else f"gives {[cls.__name__ for cls in found]}"


def merged() -> str | None:
    """A group of layers keeps the layout."""
    for spec in _our_specs():
        if type(spec).merge([spec, spec]) != spec:
            return f"changes a {type(spec).__name__}"
    return None


def page_sizes() -> str | None:
    """Blocks are as large as geometry says."""
    layout, (sealed, recent, ring) = _layout(), _our_specs()
    found = [sealed.page_size_bytes, recent.page_size_bytes * layout.num_layers]
    found.append(ring.page_size_bytes)
    expected = [layout.sealed_block_bytes, layout.recent_block_bytes]
    expected.append(layout.ring_block_tokens * layout.query_bytes)
    return None if found == expected else f"gives {found} bytes, expected {expected}"


def frees_skipped_blocks() -> str | None:
    """Blocks of skipped tokens, and no others, are freed."""
    removed: list[tuple[str, int, int]] = []
    manager = SimpleNamespace(
        get_num_skipped_tokens=lambda num_computed_tokens: num_computed_tokens - 1,
        req_to_blocks={"request": [object()] * 5},
        block_size=4,
        _remove_blocks_in_range=lambda *range_: removed.append(range_),
    )
    _get(MANAGERS + "SlidingWindowManager.remove_skipped_blocks")(manager, "request", 10)
    return None if removed == [("request", 0, 2)] else f"frees {removed}, expected blocks 0 to 2"


def layer_names() -> str | None:
    """The plugin's cache layers have names that vLLM can order."""
    from tangram.vllm_plugin.worker.storage import RING_NAME, SEALED_NAME

    index_of = _get("vllm.v1.worker.utils:extract_layer_index")
    found = [index_of(name) for name in (SEALED_NAME, RING_NAME)]
    return None if found == [0, 0] else f"reads layers {found} in our names, expected [0, 0]"


def block_outermost() -> str | None:
    """The layout that the backend asks for has blocks outermost."""
    layout = _get("vllm.v1.kv_cache_layout:KVCacheLayout.BLHNC")
    return None if layout.is_block_outermost else f"is {layout.value}, blocks not outermost"


def complete_classes() -> str | None:
    """The plugin's classes leave no method of vLLM's abstract."""
    from tangram.vllm_plugin.worker import backend, storage

    for cls in (
        backend.CompressedAttentionBackend,
        backend.CompressedMetadataBuilder,
        backend.CompressedAttentionImpl,
        storage.SealedCache,
        storage.QueryRing,
    ):
        missing = sorted(getattr(cls, "__abstractmethods__", ()))
        if missing:
            return f"{cls.__name__} lacks {', '.join(missing)}"
    return None
