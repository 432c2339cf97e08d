"""Every place of vLLM that the plugin relies on, each with a check that it is as expected.

Most of these are no promised interface. A release of vLLM that changes one must be found out here,
by name, and not by a wrong answer: `tangram doctor` lists them, `require_hooks` raises.

Checks import, look at signatures and fields, and where a signature says too little, run the piece
on a tiny layout. None of them needs a model or starts an engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from tangram.vllm_plugin.compat import checks as checks
from tangram.vllm_plugin.compat.checks import (
    MANAGERS,
    SPECS,
    SUPPORTED_VLLM,
    Hook,
    has,
    takes,
    uses,
)

_ARGS = "vllm.engine.arg_utils:EngineArgs"
_ATTENTION = "vllm.v1.attention.backend:"


@dataclass(frozen=True)
class HookResult:
    """What the check of one hook found; `difference` is None when all is as expected."""

    name: str
    where: str
    reason: str
    difference: str | None

    @property
    def ok(self) -> bool:
        """Whether the hook is as the plugin expects it."""
        return self.difference is None


def check_hooks() -> list[HookResult]:
    """Check every hook in this process; a hook that is gone is a result, not an error."""
    return [HookResult(h.name, h.where, h.reason, _run(h)) for h in _HOOKS]


def require_hooks() -> None:
    """Raise RuntimeError that names every hook that differs, and the version that is supported."""
    differing = [result for result in check_hooks() if not result.ok]
    if differing:
        listed = "; ".join(f"{r.name} ({r.where}): {r.difference}" for r in differing)
        raise RuntimeError(
            f"this vLLM is not what KV cache compression relies on: {listed}. Install vLLM "
            f"{SUPPORTED_VLLM} (tangram-kv[gpu] or tangram-kv[cpu])"
        )


def describe_platform() -> str:
    """The platform that vLLM serves on, as it names it: `cpu`, `cuda (NVIDIA H200)`."""
    platform = import_module("vllm.platforms").current_platform
    kind = str(platform.device_type)
    if not kind:
        return "none that vLLM knows"
    try:
        name = str(platform.get_device_name())
    except Exception as error:  # a driver that does not answer
        return f"{kind} ({type(error).__name__}: {error})"
    return kind if name == kind else f"{kind} ({name})"


def _run(hook: Hook) -> str | None:
    try:
        return hook.difference()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


_HOOKS = (
    Hook(
        "version", "vllm:__version__", "the release that all this was checked with", checks.version
    ),
    # Flags and configuration.
    takes("flags", f"{_ARGS}.add_cli_args", "adds the compression flags", "parser"),
    uses(
        "plugins before flags",
        "vllm.engine.arg_utils:AsyncEngineArgs.add_cli_args",
        "the plugin must be loaded before the parser is made",
        "load_general_plugins",
    ),
    takes("flags to arguments", f"{_ARGS}.from_cli_args", "keeps the flags' values", "args"),
    takes(
        "arguments to configuration",
        f"{_ARGS}.create_engine_config",
        "every way to start passes here: refuses, plans, sets the configuration",
        "usage_context headless",
    ),
    has(
        "engine arguments",
        _ARGS,
        "looked at to refuse what compression cannot serve",
        "additional_config attention_backend attention_config block_size "
        "decode_context_parallel_size disable_hybrid_kv_cache_manager enable_dbo kv_cache_dtype "
        "kv_offloading_size kv_transfer_config pipeline_parallel_size "
        "prefill_context_parallel_size prefix_cache_retention_interval speculative_config "
        "tensor_parallel_size ubatch_size worker_extension_cls",
    ),
    has(
        "additional configuration",
        "vllm.config:VllmConfig",
        "carries the plan to every process",
        "additional_config compilation_config",
    ),
    has(
        "cache configuration",
        "vllm.config:CacheConfig",
        "at which boundaries of a prompt the raw window stays cached",
        "block_size cache_dtype prefix_cache_retention_interval",
    ),
    has(
        "layers by name",
        "vllm.config:CompilationConfig",
        "the sealed pages are a layer of their own in it",
        "static_forward_context",
    ),
    takes(
        "cache dtype",
        "vllm.utils.torch_utils:kv_cache_dtype_str_to_dtype",
        "the bytes of a row",
        "kv_cache_dtype model_config",
    ),
    # Attention backend.
    takes(
        "choice of the backend",
        "vllm.platforms:current_platform.get_attn_backend_cls",
        "puts the compressed backend in where the configuration asks for it",
        "selected_backend attn_selector_config",
    ),
    takes(
        "what is asked of a backend",
        f"{_ATTENTION}AttentionBackend.validate_configuration",
        "refuses what the compressed backend lacks",
        "kv_cache_dtype device_capability use_non_causal use_batch_invariant",
    ),
    has(
        "backend's registry name",
        "vllm.v1.attention.backends.registry:AttentionBackendEnum",
        "the name under which a backend from outside is chosen",
        "CUSTOM",
    ),
    takes(
        "spec of a layer",
        f"{_ATTENTION}AttentionBackend.customize_spec",
        "a layer's cache becomes that of its recent tokens",
        "spec",
    ),
    uses(
        "spec of a layer, asked for",
        "vllm.v1.worker.utils:customize_attention_spec",
        "the runner takes the backend's spec",
        "customize_spec",
    ),
    has(
        "cache layouts",
        f"{_ATTENTION}AttentionBackend",
        "the backend asks for its layout, and says that no connector knows it",
        "supported_kv_cache_layouts supports_kv_connector get_supported_kernel_block_sizes",
    ),
    Hook(
        "blocks outermost",
        "vllm.v1.kv_cache_layout:KVCacheLayout.BLHNC",
        "a sealed block spans all layers",
        checks.block_outermost,
    ),
    Hook(
        "abstract methods",
        f"{_ATTENTION}AttentionBackend",
        "the plugin's classes must have all that vLLM's ask for",
        checks.complete_classes,
    ),
    takes(
        "metadata builder",
        f"{_ATTENTION}AttentionMetadataBuilder.build",
        "cuts a step at chunk boundaries",
        "common_prefix_len common_attn_metadata fast_build",
    ),
    has(
        "common metadata",
        f"{_ATTENTION}CommonAttentionMetadata",
        "what a step computes, and where its tokens lie",
        "query_start_loc_cpu seq_lens seq_lens_cpu_upper_bound num_reqs num_actual_tokens "
        "block_table_tensor slot_mapping",
    ),
    has(
        "forward context",
        "vllm.forward_context:ForwardContext",
        "a layer finds the sealed pages and their block table there",
        "attn_metadata no_compile_layers",
    ),
    Hook(
        "names of cache layers",
        "vllm.v1.worker.utils:bind_kv_cache",
        "orders layers by the one integer in their name",
        checks.layer_names,
    ),
    # Cache groups.
    takes(
        "spec registry",
        "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.register",
        "sealed, recent and ring blocks get managers",
        "kvcache_spec_cls manager_class",
    ),
    Hook(
        "managers of specs",
        "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry._ensure_registered",
        "the plugin's specs and vLLM's own keep their managers",
        checks.managers,
    ),
    Hook(
        "merging specs",
        f"{SPECS}KVCacheSpec.merge",
        "layers of one group must keep the layout",
        checks.merged,
    ),
    Hook(
        "bytes of a block",
        f"{SPECS}KVCacheSpec.page_size_bytes",
        "the pool holds as many blocks as geometry says",
        checks.page_sizes,
    ),
    takes(
        "admission cap",
        f"{SPECS}SlidingWindowSpec.max_admission_blocks_per_request",
        "a long prompt needs few recent blocks at once",
        "max_in_flight_tokens max_model_len",
    ),
    uses(
        "admission cap, asked for",
        f"{MANAGERS}get_manager_for_kv_cache_spec",
        "without it a prompt longer than the pool waits for ever",
        "max_admission_blocks_per_request",
    ),
    takes(
        "sealed blocks needed",
        f"{MANAGERS}FullAttentionManager.get_num_blocks_to_allocate",
        "counts whole chunks",
        "request_id num_tokens",
    ),
    takes(
        "raw blocks needed",
        f"{MANAGERS}SlidingWindowManager.get_num_blocks_to_allocate",
        "behind a long hit a prompt needs as many as without",
        "apply_admission_cap",
    ),
    takes(
        "sealed blocks handed out",
        f"{MANAGERS}FullAttentionManager.allocate_new_blocks",
        "hands out a block when its chunk completes",
        "request_id num_tokens num_tokens_main_model",
    ),
    takes(
        "partial tail blocks",
        f"{MANAGERS}FullAttentionManager._cache_partial_tail_block",
        "a part of a chunk must not be hit",
        "request num_tokens",
    ),
    has(
        "fine-grained lookup",
        f"{MANAGERS}FullAttentionManager",
        "hits come in whole chunks",
        "supports_fine_grained_hash_lookup",
    ),
    Hook(
        "freeing recent blocks",
        f"{MANAGERS}SlidingWindowManager.remove_skipped_blocks",
        "raw tokens are freed when their chunk is sealed",
        checks.frees_skipped_blocks,
    ),
    takes(
        "prefix-cache lookup",
        f"{MANAGERS}SlidingWindowManager.find_longest_cache_hit",
        "a boundary counts where the window before it is still there",
        "block_hashes max_length kv_cache_group_ids block_pool kv_cache_spec drop_eagle_block "
        "alignment_tokens",
    ),
    takes(
        "what stays cached",
        f"{MANAGERS}SlidingWindowManager.reachable_block_mask",
        "the next turn resumes at the last boundary of an answer",
        "start_block end_block alignment_tokens kv_cache_spec use_eagle retention_interval "
        "reachable_boundaries",
    ),
    uses(
        "where the same prompt resumes",
        f"{MANAGERS}SingleTypeKVCacheManager.cache_blocks",
        "what lies behind it is an answer",
        "reachable_block_mask",
    ),
    takes(
        "query ring blocks",
        f"{MANAGERS}CircularBufferManager._claim_ring_block",
        "a running request keeps its last queries",
        "request_id record_for_zeroing",
    ),
    takes(
        "sealed blocks hit",
        f"{MANAGERS}FullAttentionManager.add_local_computed_blocks",
        "counts the sealed blocks that are held",
        "request_id new_computed_blocks",
    ),
    takes(
        "sealed blocks given back",
        f"{MANAGERS}FullAttentionManager.pop_blocks_for_free",
        "counts the sealed blocks that are held",
        "request_id",
    ),
    takes(
        "blocks that are no longer found",
        "vllm.v1.core.block_pool:BlockPool.evict_blocks",
        "a step that is not run leaves nothing to be found",
        "block_ids",
    ),
    has(
        "tokens up to a block's end",
        "vllm.v1.core.kv_cache_utils:KVCacheBlock",
        "which blocks a step that is not run would have filled",
        "block_hash_num_tokens",
    ),
    # Metrics.
    takes(
        "scheduler's statistics",
        "vllm.v1.core.sched.scheduler:Scheduler.make_stats",
        "sends the counts of the cache to the frontend",
        "kv_connector_stats",
    ),
    has(
        "statistics of a step",
        "vllm.v1.metrics.stats:SchedulerStats",
        "the counts travel in the field of KV connectors, which compression refuses",
        "kv_connector_stats",
    ),
    takes(
        "loggers of statistics",
        "vllm.v1.metrics.loggers:StatLoggerManager.__init__",
        "adds the metrics of compression to vLLM's own",
        "vllm_config engine_idxs custom_stat_loggers enable_default_loggers client_count",
    ),
    # The worker.
    has(
        "worker extension",
        "vllm.config:ParallelConfig",
        "loads the plugin in the worker, or fails there",
        "worker_extension_cls",
    ),
    has(
        "data-parallel ranks",
        "vllm.config:ParallelConfig",
        "tells the drift of one engine from another's",
        "data_parallel_index",
    ),
    takes(
        "caches of a model's layers",
        "vllm.v1.worker.gpu_worker:Worker.get_kv_cache_spec",
        "proves that every layer is compressed",
        "self",
    ),
    takes(
        "calls to workers",
        "vllm:LLM.collective_rpc",
        "proves that the layout is served",
        "method",
    ),
)
