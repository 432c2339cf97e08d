"""The attention backend: how it is chosen, and what it gives and is given."""

from tangram.vllm_plugin.compat.hook import Hook, behaves, find, has, takes, takes_by_source, uses

_ATTENTION = "vllm.v1.attention.backend"
_BACKEND = f"{_ATTENTION}:AttentionBackend"
_BUILDER = f"{_ATTENTION}:AttentionMetadataBuilder"
_IMPL = f"{_ATTENTION}:AttentionImpl"
_LAYER = "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase"
_OURS = "as long as compression is an attention backend"
_OWN_CACHE = "caches that belong to no layer"
_NO_OWN_CACHE = "vLLM lets a backend have a cache of its own"


def _block_outermost() -> str | None:
    """The layout that the backend asks for has blocks outermost."""
    layout = find("vllm.v1.kv_cache_layout:KVCacheLayout.BLHNC")
    return None if layout.is_block_outermost else f"is {layout.value}, blocks not outermost"


HOOKS: tuple[Hook, ...] = (
    takes(
        "choice of the backend",
        "vllm.platforms:current_platform.get_attn_backend_cls",
        "puts the compressed backend in where the configuration asks for it",
        "selected_backend attn_selector_config",
        upstream="registered backends that are heeded on every platform, under names of their own",
        until="the CPU platform heeds the backend that is asked for",
    ),
    has(
        "question for a backend",
        "vllm.v1.attention.selector:AttentionSelectorConfig",
        "is handed on to the backend as it is",
        "_asdict",
        upstream="a selector that asks every backend itself",
        until="the CPU platform heeds the backend that is asked for",
    ),
    takes(
        "what is asked of a backend",
        f"{_BACKEND}.validate_configuration",
        "refuses what the compressed backend lacks",
        "kv_cache_dtype device_capability use_non_causal use_batch_invariant",
        upstream="further features that are asked for",
        until=_OURS,
    ),
    has(
        "backend's registry name",
        "vllm.v1.attention.backends.registry:AttentionBackendEnum",
        "the name under which a backend from outside is chosen",
        "CUSTOM",
        upstream="backends from outside under names of their own",
        until="vLLM lets a backend from outside have a name of its own",
    ),
    has(
        "words of a backend",
        _ATTENTION,
        "what a backend answers with, and the specs that it is asked about",
        "AttentionBackend AttentionCGSupport AttentionImpl AttentionMetadataBuilder AttentionType "
        "CommonAttentionMetadata MultipleOf",
        upstream="names that move",
        until=_OURS,
    ),
    has(
        "decodes first",
        _BUILDER,
        "model runner V1 sorts a batch by it; V2 sorts every batch",
        "reorder_batch_threshold",
        upstream="runner V1 goes",
        until="vLLM has one model runner",
    ),
    has(
        "what a backend says of itself",
        _BACKEND,
        "types that it takes; its builder and implementation",
        "get_builder_cls get_impl_cls get_name supported_dtypes supported_kv_cache_dtypes",
        upstream="further members; those that are new are told by name",
        until=_OURS,
    ),
    takes(
        "spec of a layer",
        f"{_BACKEND}.customize_spec",
        "a layer's cache becomes that of its recent tokens",
        "spec",
        upstream="temporary by its own words (vLLM issue 42449): the backend is to make the spec",
        until="a backend makes a layer's spec itself",
    ),
    uses(
        "spec of a layer, asked for",
        "vllm.v1.worker.utils:customize_attention_spec",
        "the runner takes the backend's spec",
        "customize_spec",
        upstream="goes with customize_spec (vLLM issue 42449)",
        until="a backend makes a layer's spec itself",
    ),
    has(
        "cache layouts",
        _BACKEND,
        "the backend asks for its layout, and says that no connector knows it",
        "supported_kv_cache_layouts supports_kv_connector get_supported_kernel_block_sizes",
        upstream="other words for layouts; connectors that ask for more",
        until=_OURS,
    ),
    behaves(
        "blocks outermost",
        "vllm.v1.kv_cache_layout:KVCacheLayout.BLHNC.is_block_outermost",
        "a sealed block spans all layers",
        _block_outermost,
        upstream="layouts of other shapes, or packed by group",
        until="as long as one block holds a chunk of all layers",
    ),
    takes(
        "making a metadata builder",
        f"{_BUILDER}.__init__",
        "finds the sealed pages, and makes the kernels' tables",
        "kv_cache_spec layer_names vllm_config device",
        upstream="builders that are given more",
        until=_OURS,
    ),
    takes(
        "metadata builder",
        f"{_BUILDER}.build",
        "cuts a step at chunk boundaries",
        "common_prefix_len common_attn_metadata fast_build",
        upstream="common_prefix_len is kept for backends from outside alone, and always 0",
        until=_OURS,
    ),
    takes(
        "metadata of a captured step",
        f"{_BUILDER}.build_for_cudagraph_capture",
        "nothing of the host is in a graph",
        "common_attn_metadata",
        upstream="builders that are told in `build`",
        until=_OURS,
    ),
    takes(
        "captured steps",
        f"{_BUILDER}.get_cudagraph_support",
        "decode steps are captured where kernels serve them",
        "vllm_config kv_cache_spec",
        upstream="other words for what can be captured",
        until=_OURS,
    ),
    has(
        "kinds of captured steps",
        f"{_ATTENTION}:AttentionCGSupport",
        "one token a request, or none",
        "NEVER UNIFORM_SINGLE_TOKEN_DECODE",
        upstream="other words for what can be captured",
        until=_OURS,
    ),
    has(
        "kinds of attention",
        f"{_ATTENTION}:AttentionType",
        "any but a decoder's is refused",
        "DECODER",
        upstream="further kinds",
        until=_OURS,
    ),
    has(
        "common metadata",
        f"{_ATTENTION}:CommonAttentionMetadata",
        "what a step computes, and where its tokens lie",
        "query_start_loc query_start_loc_cpu seq_lens seq_lens_cpu_upper_bound num_reqs "
        "num_actual_tokens max_query_len block_table_tensor slot_mapping",
        upstream="num_actual_tokens is to be called num_tokens; lengths that only the device knows",
        until=_OURS,
    ),
    takes(
        "making an implementation",
        f"{_IMPL}.__init__",
        "refuses layers that compression lacks; the first one makes the caches",
        "num_heads head_size scale num_kv_heads alibi_slopes sliding_window kv_cache_dtype "
        "logits_soft_cap attn_type kv_sharing_target_layer_name",
        upstream="properties of a layer that an implementation may pass over",
        until=_OURS,
    ),
    takes(
        "one layer's forward",
        f"{_IMPL}.forward",
        "writes, seals and attends",
        "layer query key value kv_cache attn_metadata output output_scale output_block_scale",
        upstream="cache writes that vLLM takes out of forward",
        until=_OURS,
    ),
    has(
        "what an implementation says of itself",
        _IMPL,
        "sizes that vLLM reads",
        "head_size kv_cache_dtype num_heads scale",
        upstream="further members; those that are new are told by name",
        until=_OURS,
    ),
    has(
        "forward context",
        "vllm.forward_context",
        "a layer finds the sealed pages and their block table there",
        "ForwardContext get_forward_context",
        upstream=_OWN_CACHE,
        until=_NO_OWN_CACHE,
    ),
    has(
        "parts of the forward context",
        "vllm.forward_context:ForwardContext",
        "metadata and caches by a layer's name",
        "attn_metadata no_compile_layers",
        upstream="metadata by cache group rather than by layer",
        until=_NO_OWN_CACHE,
    ),
    takes(
        "layers of a kind",
        "vllm.config:get_layers_from_vllm_config",
        "the recent caches of all layers, whose addresses kernels keep",
        "vllm_config layer_type",
        upstream="functions that move",
        until="as long as one launch seals all layers",
    ),
    has(
        "attention layer",
        "vllm.model_executor.layers.attention:Attention",
        "its cache, its name and its heads",
        "head_size impl kv_cache layer_name",
        upstream="a layer that lets its implementation keep the cache",
        until=_OURS,
    ),
    has(
        "layer with a cache",
        _LAYER,
        "the sealed pages and the query ring get memory and metadata as layers do",
        "get_attn_backend get_kv_cache_spec kv_cache",
        upstream=_OWN_CACHE,
        until=_NO_OWN_CACHE,
    ),
    takes(
        "setting a layer's cache",
        f"{_LAYER}.bind_kv_cache",
        "kernels forget the addresses of the cache before",
        "kv_cache",
        upstream="other ways to give a layer its cache",
        until="as long as kernels keep addresses of caches",
    ),
    takes(
        "spec of the shared caches",
        f"{_LAYER}.get_kv_cache_spec",
        "gives the sealed pages and the query ring groups of their own",
        "vllm_config",
        upstream=_OWN_CACHE,
        until=_NO_OWN_CACHE,
    ),
    takes(
        "index of a layer",
        "vllm.model_executor.models.utils:extract_layer_index",
        "which layer's budgets apply",
        "layer_name",
        upstream="an index that a layer knows of itself",
        until="as long as a layer is known by its name alone",
    ),
    takes(
        "versions of FlashAttention",
        "vllm.v1.attention.backends.fa_utils:is_fa_version_supported",
        "large prefill steps read sealed rows with version 3",
        "fa_version",
        upstream="FlashAttention of another version, or from another package",
        until="as long as it is faster than the plugin's own kernel",
    ),
    takes_by_source(
        "FlashAttention",
        "vllm.vllm_flash_attn:flash_attn_varlen_func",
        "flash_attn_interface.py",
        "large prefill steps read sealed rows with it",
        "q k v cu_seqlens_q max_seqlen_q seqused_k max_seqlen_k block_table softmax_scale causal "
        "out return_softmax_lse num_splits fa_version",
        upstream="FlashAttention of another version, or from another package",
        until="as long as it is faster than the plugin's own kernel",
    ),
)
