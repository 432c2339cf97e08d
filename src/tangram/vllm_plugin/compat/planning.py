"""Cache groups as vLLM's engine core plans them, wherever the release at hand does it."""

from __future__ import annotations

from typing import Any

from tangram.vllm_plugin.compat.hook import find_moved


def plan_caches(config: Any, specs: list[dict[str, Any]], available_bytes: list[int]) -> list[Any]:
    """What every worker's cache consists of.

    Args:
        config: vLLM's configuration.
        specs: of every worker, the cache specs of its layers by their names.
        available_bytes: memory of every worker for its cache.
    """
    planning = find_moved("vllm.v1.core.kv_cache_planning", "vllm.v1.core.kv_cache_utils")
    # Since 0.33 the groups are made first, and by another function.
    make_groups = getattr(planning, "get_global_kv_cache_groups", None)
    groups = () if make_groups is None else (make_groups(config, specs),)
    planned: list[Any] = planning.get_kv_cache_configs(config, specs, available_bytes, *groups)
    return planned
