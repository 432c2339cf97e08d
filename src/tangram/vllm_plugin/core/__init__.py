"""What runs in the engine core: cache groups, their managers and counts.

The groups are registered when this room is entered, so that a process which receives one of the
specs, pickled or made by a layer, knows its manager.
"""

from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from tangram.vllm_plugin.core.managers import QueryRingManager, RecentManager, SealedManager
from tangram.vllm_plugin.core.specs import QueryRingSpec, RecentSpec, SealedSpec


def _register() -> None:
    # vLLM registers its own specs only while the registry is empty, so they have to come first.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(SealedSpec, SealedManager)
    KVCacheSpecRegistry.register(RecentSpec, RecentManager)
    KVCacheSpecRegistry.register(QueryRingSpec, QueryRingManager)


_register()
