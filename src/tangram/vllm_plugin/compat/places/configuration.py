"""Flags, arguments and configuration of an engine."""

from tangram.vllm_plugin.compat.hook import Hook, behaves, has, takes, uses
from tangram.vllm_plugin.compat.version import version_difference

_ARGS = "vllm.engine.arg_utils:EngineArgs"
_FIELDS = "fields that move or get other names"
_READ = "as long as the plugin reads them"
_OPTIONS = "a hook for a plugin's own options"

HOOKS: tuple[Hook, ...] = (
    behaves(
        "version",
        "vllm:__version__",
        "the release that all this was checked with",
        version_difference,
        upstream="a stable interface for cache groups and backends from outside",
        until="as long as most of these places are no promised interface",
    ),
    takes(
        "flags",
        f"{_ARGS}.add_cli_args",
        "adds the compression flags",
        "parser",
        upstream=_OPTIONS,
        until="vLLM lets plugins add flags",
    ),
    takes(
        "options of a server",
        "vllm.entrypoints.common.cli_args:make_arg_parser",
        "misspelled options are told by the names in this file, before vLLM is loaded",
        "parser",
        before="vllm.entrypoints.launchers.cli_args:make_arg_parser",
        upstream="a list of options that is read without loading vLLM",
        until="as long as loading vLLM takes seconds",
    ),
    takes(
        "command of a server",
        "vllm.entrypoints.cli.main:main",
        "tangram serve runs its module",
        "",
        upstream="a CPU wheel whose own command starts",
        until="as long as a server is started by vLLM's command",
    ),
    uses(
        "plugins before flags",
        "vllm.engine.arg_utils:AsyncEngineArgs.add_cli_args",
        "the plugin must be loaded before the parser is made",
        "load_general_plugins",
        upstream=_OPTIONS,
        until="vLLM lets plugins add flags",
    ),
    takes(
        "flags to arguments",
        f"{_ARGS}.from_cli_args",
        "keeps the flags' values",
        "args",
        upstream=_OPTIONS,
        until="vLLM carries the values of a plugin's flags",
    ),
    takes(
        "arguments to configuration",
        f"{_ARGS}.create_engine_config",
        "every way to start passes here: refuses, plans, sets the configuration",
        "usage_context headless",
        upstream="a hook that lets a plugin change the configuration",
        until="vLLM calls plugins when it has made the configuration",
    ),
    has(
        "engine arguments",
        _ARGS,
        "looked at to refuse what compression cannot serve",
        "additional_config attention_backend attention_config block_size "
        "decode_context_parallel_size disable_hybrid_kv_cache_manager enable_dbo kv_cache_dtype "
        "kv_offloading_size kv_transfer_config model pipeline_parallel_size "
        "prefill_context_parallel_size prefix_cache_retention_interval spec_method "
        "speculative_config tensor_parallel_size ubatch_size worker_extension_cls",
        upstream="further arguments that compression cannot serve",
        until=_READ,
    ),
    has(
        "arguments of calibration",
        _ARGS,
        "a profile is calibrated from the same weights and tokenizer as are served",
        "code_revision config_format download_dir dtype hf_config_path hf_overrides hf_token "
        "load_format model_impl model_loader_extra_config quantization revision "
        "skip_tokenizer_init tokenizer tokenizer_mode tokenizer_revision trust_remote_code",
        upstream="further arguments that decide which weights are loaded",
        until=_READ,
    ),
    has(
        "parts of the configuration",
        "vllm.config",
        "what a plan is made from and for; the model that is being built",
        "CUDAGraphMode VllmConfig get_current_vllm_config get_current_vllm_config_or_none "
        "get_layers_from_vllm_config",
        upstream="functions that move",
        until="as long as specs and backends are given no configuration",
    ),
    has(
        "additional configuration",
        "vllm.config:VllmConfig",
        "carries the plan to every process",
        "additional_config attention_config cache_config compilation_config kv_events_config "
        "kv_transfer_config model_config parallel_config quant_config scheduler_config "
        "speculative_config",
        upstream=_FIELDS,
        until=_READ,
    ),
    has(
        "KV events",
        "vllm.config:KVEventsConfig",
        "refused while they are on",
        "enable_kv_cache_events",
        upstream="events that say at which boundaries a prompt can be resumed",
        until="a router can be told where a prompt can be resumed",
    ),
    has(
        "cache configuration",
        "vllm.config:CacheConfig",
        "at which boundaries of a prompt the raw window stays cached",
        "block_size cache_dtype num_gpu_blocks prefix_cache_retention_interval",
        upstream="another way to say which blocks of a prompt stay cached",
        until=_READ,
    ),
    has(
        "layers by name",
        "vllm.config:CompilationConfig",
        "the sealed pages are a layer of their own in it",
        "static_forward_context",
        upstream="caches that belong to no layer",
        until="vLLM lets a backend have a cache of its own",
    ),
    has(
        "graphs",
        "vllm.config:CompilationConfig",
        "sizes of decode steps that are captured, and whether any is",
        "cudagraph_capture_sizes cudagraph_mode max_cudagraph_capture_size",
        upstream=_FIELDS,
        until=_READ,
    ),
    has(
        "no graphs",
        "vllm.config:CUDAGraphMode",
        "budgets are swapped only where no graph keeps the old tables",
        "NONE",
        upstream="further modes",
        until="as long as budgets are swapped in a running engine",
    ),
    has(
        "model configuration",
        "vllm.config:ModelConfig",
        "which network is served, and whether it can be compressed",
        "architectures dtype get_sliding_window hf_config hf_text_config is_attention_free "
        "is_encoder_decoder is_hybrid is_mm_prefix_lm max_model_len model runner_type "
        "served_model_name use_mla uses_alibi",
        upstream="further kinds of attention that a model may have",
        until=_READ,
    ),
    has(
        "layers and heads",
        "vllm.config:ModelConfig",
        "the plan's sizes are those that vLLM serves",
        "get_head_size get_num_attention_heads get_num_layers get_total_num_kv_heads",
        upstream="layers that differ in their heads",
        until=_READ,
    ),
    has(
        "limits of a step",
        "vllm.config:SchedulerConfig",
        "how much room a step needs, and whether cache groups are on",
        "disable_hybrid_kv_cache_manager max_num_batched_tokens max_num_seqs",
        upstream=_FIELDS,
        until=_READ,
    ),
    has(
        "choice of attention",
        "vllm.config:AttentionConfig",
        "asks for the compressed backend, and heeds a FlashAttention version",
        "backend backend_per_kind flash_attn_version",
        upstream=_FIELDS,
        until=_READ,
    ),
    has(
        "worker extension",
        "vllm.config:ParallelConfig",
        "loads the plugin in the worker, or fails there",
        "worker_extension_cls",
        upstream="plugins that fail to load end the process",
        until="vLLM stops where a plugin that is needed is missing",
    ),
    has(
        "data-parallel ranks",
        "vllm.config:ParallelConfig",
        "tells the drift of one engine from another's; engines that keep step sample larger steps",
        "data_parallel_index data_parallel_size",
        upstream=_FIELDS,
        until=_READ,
    ),
    has(
        "environment variables",
        "vllm.envs",
        "refuses batch-invariant mode; decides in which process an engine runs",
        "VLLM_BATCH_INVARIANT VLLM_ENABLE_V1_MULTIPROCESSING",
        upstream="an argument that takes a variable's place",
        until=_READ,
    ),
    takes(
        "cache dtype",
        "vllm.utils.torch_utils:kv_cache_dtype_str_to_dtype",
        "the bytes of a row",
        "kv_cache_dtype model_config",
        upstream="the dtype as a field of the configuration",
        until=_READ,
    ),
    has(
        "platform",
        "vllm.platforms:current_platform",
        "what an engine runs on",
        "device_type get_device_capability get_device_name is_cpu",
        upstream="names of a platform that change",
        until=_READ,
    ),
)
