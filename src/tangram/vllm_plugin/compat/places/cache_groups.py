"""Cache groups: their specs, the managers of their blocks, and the pool."""

from types import SimpleNamespace

from tangram.vllm_plugin.compat.hook import Hook, behaves, find, has, takes, uses

_MANAGERS = "vllm.v1.core.single_type_kv_cache_manager"
_SPECS = "vllm.v1.kv_cache_interface"
_FULL = f"{_MANAGERS}:FullAttentionManager"
_SLIDING = f"{_MANAGERS}:SlidingWindowManager"
_RING = f"{_MANAGERS}:CircularBufferManager"
_GROUPS = "as long as compressed caches are cache groups of vLLM's"
_FAMILIES = "caps and lookups that a spec decides itself, rather than its family"
_NO_FAMILIES = "a manager can be made without a family of vLLM's"
_HITS = "another prefix-cache lookup"
_RETENTION = "another way to say which blocks stay cached"
_PLANNING = "vllm.v1.core.kv_cache_planning"
_PLANNED_BEFORE = "vllm.v1.core.kv_cache_utils:get_kv_cache_configs"
_COUNTED = "vLLM counts the blocks that requests hold, by group"


def _frees_skipped_blocks() -> str | None:
    """Blocks of skipped tokens, and no others, are freed."""
    removed: list[tuple[str, int, int]] = []
    manager = SimpleNamespace(
        get_num_skipped_tokens=lambda num_computed_tokens: num_computed_tokens - 1,
        req_to_blocks={"request": [object()] * 5},
        block_size=4,
        _remove_blocks_in_range=lambda *range_: removed.append(range_),
    )
    find(f"{_SLIDING}.remove_skipped_blocks")(manager, "request", 10)
    return None if removed == [("request", 0, 2)] else f"frees {removed}, expected blocks 0 to 2"


_SPEC_HOOKS = (
    takes(
        "spec registry",
        "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.register",
        "sealed, recent and ring blocks get managers",
        "kvcache_spec_cls manager_class",
        upstream="roles of groups, for which managers can be registered too",
        until=_GROUPS,
    ),
    has(
        "vLLM's own specs first",
        "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry",
        "vLLM registers its own only while the registry is empty",
        "_ensure_registered",
        upstream="a registry that knows vLLM's own specs from the start",
        until="vLLM's own specs are there whoever registers first",
    ),
    has(
        "families of specs",
        _SPECS,
        "grouping, caps and lookups go by a spec's family",
        "AttentionSpec CircularBufferSpec FullAttentionSpec KVCacheSpec SlidingWindowSpec",
        upstream=_FAMILIES,
        until=_NO_FAMILIES,
    ),
    has(
        "fields of specs",
        f"{_SPECS}:SlidingWindowSpec",
        "what a block holds, and how many bytes",
        "block_size dtype head_size num_kv_heads page_size_bytes sliding_window",
        upstream="fields that move or get other names",
        until=_GROUPS,
    ),
    takes(
        "merging specs, by its function",
        f"{_SPECS}:KVCacheSpec.merge",
        "the families' own drops what a subclass adds",
        "specs",
        upstream="families that merge by copying",
        until="vLLM's families keep a subclass's fields",
    ),
    takes(
        "rows of a block",
        f"{_SPECS}:AttentionSpec.get_num_kernel_states",
        "a sealed block is never split, and has other rows than tokens",
        "kernel_block_size",
        upstream="blocks whose shape a backend decides",
        until="a backend decides the shape of its cache",
    ),
    has(
        "bytes of a state",
        f"{_SPECS}:AttentionSpec",
        "a token of the query ring holds queries of all layers",
        "state_content_size_bytes",
        upstream="blocks whose shape a backend decides",
        until="a backend decides the shape of its cache",
    ),
    takes(
        "memory of a request",
        f"{_SPECS}:KVCacheSpec.max_memory_usage_bytes",
        "the longest request is checked by what it takes compressed",
        "vllm_config",
        upstream="sizes by blocks rather than bytes",
        until=_GROUPS,
    ),
    takes(
        "width of the block table",
        f"{_SPECS}:CircularBufferSpec.max_num_blocks_per_req",
        "runner V1 reads slots of the query ring over all positions",
        "vllm_config max_len",
        upstream="model runner V1 goes, or heeds uses_slot_mapping",
        until="runner V1 heeds uses_slot_mapping, or is gone",
    ),
    takes(
        "rounding up",
        "vllm.utils.math_utils:cdiv",
        "width of the block table",
        "a b",
        upstream="functions that move",
        until="runner V1 heeds uses_slot_mapping, or is gone",
    ),
    takes(
        "admission cap",
        f"{_SPECS}:SlidingWindowSpec.max_admission_blocks_per_request",
        "a long prompt needs few recent blocks at once",
        "max_in_flight_tokens max_model_len",
        upstream="room of a request that a manager says itself",
        until=_NO_FAMILIES,
    ),
    uses(
        "admission cap, asked for",
        f"{_MANAGERS}:get_manager_for_kv_cache_spec",
        "without it a prompt longer than the pool waits for ever",
        "max_admission_blocks_per_request",
        upstream=_FAMILIES,
        until=_NO_FAMILIES,
    ),
)

_MANAGER_HOOKS = (
    has(
        "families of managers",
        _MANAGERS,
        "the managers of sealed, recent and ring blocks go on from them",
        "CircularBufferManager FullAttentionManager SlidingWindowManager",
        upstream=_FAMILIES,
        until=_NO_FAMILIES,
    ),
    has(
        "parts of a manager",
        f"{_MANAGERS}:SingleTypeKVCacheManager",
        "which blocks a request holds",
        "block_pool block_size kv_cache_group_id kv_cache_spec max_admission_blocks_per_request "
        "req_to_blocks",
        upstream="fields that move or get other names",
        until=_GROUPS,
    ),
    takes(
        "making a manager",
        f"{_MANAGERS}:SingleTypeKVCacheManager.__init__",
        "a manager counts what it hands out",
        "kv_cache_spec block_pool",
        upstream="managers that are made otherwise",
        until=_GROUPS,
    ),
    takes(
        "sealed blocks needed",
        f"{_FULL}.get_num_blocks_to_allocate",
        "counts whole chunks",
        "request_id num_tokens",
        upstream="groups whose blocks come when they are full",
        until=_GROUPS,
    ),
    takes(
        "raw blocks needed",
        f"{_SLIDING}.get_num_blocks_to_allocate",
        "behind a long hit a prompt needs as many as without",
        "apply_admission_cap",
        upstream="a cap that is taken after the blocks that a hit leaves out",
        until="vLLM caps what a request needs behind a hit",
    ),
    takes(
        "ring blocks needed",
        f"{_RING}.get_num_blocks_to_allocate",
        "a ring may have several blocks",
        "request_id num_tokens new_computed_blocks",
        upstream="rings of several blocks",
        until="vLLM's rings have several blocks",
    ),
    takes(
        "sealed blocks handed out",
        f"{_FULL}.allocate_new_blocks",
        "hands out a block when its chunk completes",
        "request_id num_tokens num_tokens_main_model",
        upstream="groups whose blocks come when they are full",
        until=_GROUPS,
    ),
    takes(
        "partial tail blocks",
        f"{_FULL}._cache_partial_tail_block",
        "a part of a chunk must not be hit",
        "request num_tokens",
        upstream="a switch of a spec for partial blocks",
        until="a spec can turn partial blocks off",
    ),
    has(
        "fine-grained lookup",
        _FULL,
        "hits come in whole chunks",
        "supports_fine_grained_hash_lookup",
        upstream=_HITS,
        until=_GROUPS,
    ),
    takes(
        "skipped tokens",
        f"{_SLIDING}.get_num_skipped_tokens",
        "raw tokens are freed by chunk and not by token",
        "num_computed_tokens",
        upstream="what is freed goes by a number of the spec",
        until=_GROUPS,
    ),
    behaves(
        "freeing recent blocks",
        f"{_SLIDING}.remove_skipped_blocks",
        "raw tokens are freed when their chunk is sealed",
        _frees_skipped_blocks,
        upstream="what is freed goes by a number of the spec",
        until=_GROUPS,
    ),
    takes(
        "prefix-cache lookup",
        f"{_SLIDING}.find_longest_cache_hit",
        "a boundary counts where the window before it is still there",
        "block_hashes max_length kv_cache_group_ids block_pool kv_cache_spec drop_eagle_block "
        "alignment_tokens",
        upstream=_HITS,
        until=_GROUPS,
    ),
    takes(
        "what stays cached",
        f"{_SLIDING}.reachable_block_mask",
        "the next turn resumes at the last boundary of an answer",
        "start_block end_block alignment_tokens kv_cache_spec use_eagle retention_interval "
        "reachable_boundaries",
        upstream=_RETENTION,
        until="vLLM keeps the boundaries of an answer by itself",
    ),
    uses(
        "where the same prompt resumes",
        f"{_MANAGERS}:SingleTypeKVCacheManager.cache_blocks",
        "what lies behind it is an answer",
        "reachable_block_mask",
        upstream=_RETENTION,
        until="vLLM keeps the boundaries of an answer by itself",
    ),
    takes(
        "blocks that others can find",
        f"{_MANAGERS}:SingleTypeKVCacheManager.cache_blocks",
        "a chunk that one token completes is found a step later",
        "request num_tokens",
        upstream="blocks that are found once the step that fills them has run",
        until="vLLM lets others find a block when it is written",
    ),
    takes(
        "query ring blocks",
        f"{_RING}._claim_ring_block",
        "a running request keeps its last queries",
        "request_id record_for_zeroing",
        upstream="rings of several blocks",
        until="vLLM's rings have several blocks",
    ),
    takes(
        "sealed blocks hit",
        f"{_FULL}.add_local_computed_blocks",
        "counts the sealed blocks that are held",
        "request_id new_computed_blocks",
        upstream="statistics of blocks by group",
        until=_COUNTED,
    ),
    takes(
        "blocks given back",
        f"{_MANAGERS}:SingleTypeKVCacheManager.pop_blocks_for_free",
        "takes back what a step that is not run would have filled, and counts the rest",
        "request_id",
        upstream="statistics of blocks by group",
        until=_COUNTED,
    ),
)

_POOL_HOOKS = (
    takes(
        "blocks that are no longer found",
        "vllm.v1.core.block_pool:BlockPool.evict_blocks",
        "a step that is not run leaves nothing to be found",
        "block_ids",
        upstream="blocks that are found once the step that fills them has run",
        until="vLLM lets others find a block when it is written",
    ),
    takes(
        "blocks of the pool",
        "vllm.v1.core.block_pool:BlockPool.get_new_blocks",
        "the blocks of a query ring",
        "num_blocks",
        upstream="rings of several blocks",
        until="vLLM's rings have several blocks",
    ),
    has(
        "the pool",
        "vllm.v1.core.block_pool:BlockPool",
        "how many blocks are free or cached, and the block that stands for none",
        "blocks get_num_free_blocks null_block num_gpu_blocks",
        upstream="pools of one group each",
        until=_GROUPS,
    ),
    has(
        "tokens up to a block's end",
        "vllm.v1.core.kv_cache_utils:KVCacheBlock",
        "which blocks a step that is not run would have filled, and which are cached",
        "block_hash block_hash_num_tokens block_id ref_cnt",
        upstream="blocks that are found once the step that fills them has run",
        until="vLLM lets others find a block when it is written",
    ),
    takes(
        "group of a cached block",
        "vllm.v1.core.kv_cache_utils:make_block_hash_with_group_id",
        "which cached blocks are sealed: their keys end in their group",
        "block_hash group_id",
        upstream="statistics of blocks by group",
        until=_COUNTED,
    ),
    has(
        "a request",
        "vllm.v1.request:Request",
        "how many tokens of it are computed",
        "num_computed_tokens request_id",
        upstream="tokens that count as computed when their step has run",
        until=_GROUPS,
    ),
    has(
        "manager of all groups",
        "vllm.v1.core.kv_cache_manager:KVCacheManager",
        "finds the managers' counts",
        "block_pool coordinator",
        upstream="statistics of blocks by group",
        until=_COUNTED,
    ),
    has(
        "managers of the groups",
        "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator",
        "finds the managers' counts",
        "single_type_managers",
        upstream="statistics of blocks by group",
        until=_COUNTED,
    ),
)

_PLANNING_HOOKS = (
    takes(
        "caches that are planned",
        f"{_PLANNING}:get_kv_cache_configs",
        "an engine without a model has the pool that a served one would have",
        "vllm_config kv_cache_specs available_memory",
        before=_PLANNED_BEFORE,
        upstream="functions that move",
        until="as long as schedules are played without an engine",
    ),
    takes(
        "groups of the whole model",
        f"{_PLANNING}:get_global_kv_cache_groups",
        "groups are made before caches are planned; 0.32 does it in one",
        "vllm_config kv_cache_specs",
        before=_PLANNED_BEFORE,
        upstream="functions that move",
        until="as long as schedules are played without an engine",
    ),
    takes(
        "block tables of a step",
        "vllm.v1.worker.gpu.block_table:BlockTables.gather_block_tables",
        "model runner V2 of 0.33 nulls entries of tokens that a spec does not retain",
        "idx_mapping num_reqs_padded",
        upstream="entries that a group's manager takes out itself",
        until=_GROUPS,
    ),
)

HOOKS: tuple[Hook, ...] = (*_SPEC_HOOKS, *_MANAGER_HOOKS, *_POOL_HOOKS, *_PLANNING_HOOKS)
