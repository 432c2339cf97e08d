"""The members of every class of vLLM that is subclassed, as they were reviewed.

A member that vLLM adds may be one that compression has to override, and one that it drops may be
one that compression overrides for nothing. Neither fails by itself, so both are told by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from tangram.vllm_plugin.compat.hook import Hook, behaves, find
from tangram.vllm_plugin.compat.reviewed import reviewed
from tangram.vllm_plugin.compat.version import SUPPORTED_VLLM

SUBCLASSED = (
    "vllm:LLM",
    "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase",
    "vllm.v1.attention.backend:AttentionBackend",
    "vllm.v1.attention.backend:AttentionImpl",
    "vllm.v1.attention.backend:AttentionMetadataBuilder",
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler",
    "vllm.v1.core.sched.request_queue:FCFSRequestQueue",
    "vllm.v1.core.sched.scheduler:Scheduler",
    "vllm.v1.core.single_type_kv_cache_manager:CircularBufferManager",
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager",
    "vllm.v1.core.single_type_kv_cache_manager:SlidingWindowManager",
    "vllm.v1.kv_cache_interface:CircularBufferSpec",
    "vllm.v1.kv_cache_interface:FullAttentionSpec",
    "vllm.v1.kv_cache_interface:SlidingWindowSpec",
    "vllm.v1.metrics.loggers:AggregateStatLoggerBase",
)


def own_members(cls: Any) -> set[str]:
    """Methods, properties, attributes and fields that a class defines itself, but no dunders."""
    names = {*vars(cls), *inspect.get_annotations(cls)} - {"_abc_impl"}
    return {name for name in names if not name.startswith("__")}


def bases(cls: Any) -> Iterator[str]:
    """A class and those under it that are vLLM's, as `module:attribute`."""
    for base in cls.__mro__:
        if base.__module__.split(".")[0] == "vllm":
            yield f"{base.__module__}:{base.__qualname__}"


def _difference(where: str, reviews: list[frozenset[str]]) -> str | None:
    """What a class has that no supported release has, and lacks that all of them have."""
    cls = find(where)
    found = own_members(cls)
    told = []
    if new := sorted(found.difference(*reviews)):
        told.append(
            f"{cls.__name__} has new members {', '.join(new)}: review whether compression must "
            "override any"
        )
    if gone := sorted(frozenset.intersection(*reviews) - found):
        told.append(f"{cls.__name__} has no members {', '.join(gone)} any more")
    if others := sorted(base for base in bases(cls) if base not in _REVIEWS):
        told.append(f"{cls.__name__} has new bases {', '.join(others)}")
    return "; ".join(told) or None


def _hook(where: str, reviews: list[frozenset[str]]) -> Hook:
    return behaves(
        f"members of {where.partition(':')[2]}",
        where,
        f"they were reviewed in vLLM {SUPPORTED_VLLM}: install such a release if this one differs",
        lambda: _difference(where, reviews),
        upstream="further members",
        until="as long as the plugin subclasses it",
    )


def _reviews() -> dict[str, list[frozenset[str]]]:
    """By class of vLLM, its members in every supported release that has it."""
    releases = reviewed().values()
    classes = sorted({cls for release in releases for cls in release.members})
    return {cls: [r.members[cls] for r in releases if cls in r.members] for cls in classes}


_REVIEWS = _reviews()
HOOKS = tuple(_hook(where, reviews) for where, reviews in _REVIEWS.items())
