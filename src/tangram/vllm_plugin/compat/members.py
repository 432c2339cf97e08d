"""The members of every class of vLLM that is subclassed, as they were reviewed.

A member that vLLM adds may be one that compression has to override, and one that it drops may be
one that compression overrides for nothing. Neither fails by itself, so both are told by name.

After a review of what is told, renew the list: put what
`python -m tangram.vllm_plugin.compat.members` prints in the place of `MEMBERS`.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable
from typing import Any

from tangram.vllm_plugin.compat.hook import Hook, behaves, find
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

MEMBERS = {
    "vllm.entrypoints.common.offline:OfflineInferenceMixin": """
        _add_chat_requests _add_completion_requests _add_request _adjust_params_for_parsing
        _lora_request_to_seq _params_to_seq _preprocess_chat _preprocess_chat_one
        _preprocess_cmpl _preprocess_cmpl_one _priority_to_seq _render_and_add_requests
        _render_and_run_requests _resolve_mm_lora _run_chat _run_completion _run_engine
        chat_template llm_engine model_config renderer request_counter
    """,
    "vllm.entrypoints.generate.beam_search.offline:BeamSearchOfflineMixin": """
        _beam_search_step _build_beam_sampling_params _init_beam_search_structured_output
        beam_search
    """,
    "vllm.entrypoints.llm:LLM": """
        apply_model chat collective_rpc enqueue enqueue_chat from_engine_args generate
        get_default_sampling_params get_metrics get_tokenizer get_world_size
        release_kv_cache_memory reset_mm_cache reset_prefix_cache sleep start_profile
        stop_profile wait_for_completion wake_up
    """,
    "vllm.entrypoints.pooling.offline:PoolingOfflineMixin": """
        _run_tiling_engine _verify_pooling_task chat_template classify embed encode
        runner_type score supported_tasks
    """,
    "vllm.entrypoints.rl.offline:RLOfflineMixin": """
        finish_weight_update get_weight_version init_weight_transfer_engine
        shutdown_weight_transfer_engine start_draft_weight_update start_weight_update
        update_weight_version update_weights
    """,
    "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase": """
        bind_kv_cache get_attn_backend get_kv_cache_spec impl is_draft_layer supports_dcp
    """,
    "vllm.v1.attention.backend:AttentionBackend": """
        customize_spec forward_includes_kv_cache_update full_cls_name get_builder_cls
        get_impl_cls get_name get_preferred_block_size get_supported_head_sizes
        get_supported_kernel_block_sizes is_mla is_sparse is_ssm supported_dtypes
        supported_kv_cache_dtypes supported_kv_cache_layouts supports_alibi_sqrt
        supports_attn_type supports_batch_invariance supports_block_size
        supports_combination supports_compute_capability supports_dcp
        supports_device_cpu_query_lens_mismatch supports_dtype supports_head_size
        supports_kv_cache_dtype supports_kv_connector supports_mm_prefix supports_non_causal
        supports_non_causal_dcp supports_pcp supports_per_head_quant_scales supports_rswa
        supports_sink supports_sliding_window validate_configuration
    """,
    "vllm.v1.attention.backend:AttentionImpl": """
        do_qk_norm_mrope_kvcache_update do_qk_norm_rope_kvcache_update
        do_rope_and_kv_cache_update forward fused_output_quant_supported
        fused_qk_norm_mrope_kvcache_supported fused_qk_norm_rope_kvcache_supported
        fused_rope_kvcache_supported kv_cache_dtype kv_quant_mode
    """,
    "vllm.v1.attention.backend:AttentionImplBase": """
        can_return_lse_for_decode dcp_rank dcp_world_size get_impl_variants head_size
        is_sparse lse_base_on_e need_to_return_lse_for_decode num_heads pcp_rank
        pcp_world_size prepare_for_batch process_weights_after_loading scale supports_dcp
        supports_dense_mha_prefill supports_mtp_with_cp_non_trivial_interleave_size
        supports_pcp supports_quant_query_input total_cp_rank total_cp_world_size
    """,
    "vllm.v1.attention.backend:AttentionMetadataBuilder": """
        _cudagraph_support _init_reorder_batch_threshold build build_for_cudagraph_capture
        build_for_drafting get_cudagraph_support get_varlen_cudagraph_max_query_len
        reorder_batch_threshold requires_block_table_width
        supports_draft_decode_metadata_update supports_update_block_table update_block_table
        update_draft_decode_metadata
    """,
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler": """
        _update_after_schedule _update_request_with_output
    """,
    "vllm.v1.core.sched.interface:SchedulerInterface": """
        add_request finish_requests get_ec_connector get_grammar_bitmask get_kv_cache_usage
        get_kv_connector get_kv_event_publisher_config get_num_unfinished_requests
        get_request_counts has_finished_requests has_requests has_unfinished_requests
        make_stats pause_state reset_encoder_cache reset_prefix_cache schedule
        set_pause_state shutdown update_draft_token_ids update_draft_token_ids_in_output
        update_from_output
    """,
    "vllm.v1.core.sched.request_queue:FCFSRequestQueue": """
        add_request peek_request pop_request prepend_request prepend_requests remove_request
        remove_requests
    """,
    "vllm.v1.core.sched.request_queue:RequestQueue": """
        add_request peek_request pop_request prepend_request prepend_requests remove_request
        remove_requests
    """,
    "vllm.v1.core.sched.scheduler:Scheduler": """
        _allocate_encoder_inputs _build_kv_connector_meta _connector_finished
        _drain_deferred_frees _ec_transfer_pending _enqueue_waiting_request _free_blocks
        _free_cow_retained_blocks _free_encoder_input _free_encoder_inputs _free_request
        _free_request_blocks _get_local_prefix_cache_hit _get_new_block_ids_to_zero
        _handle_blocked_waiting_request _handle_failed_recving _handle_invalid_blocks
        _handle_stopped_request _holds_kv_blocks _inflight_prefill_reserved_blocks
        _is_blocked_waiting_status _load_restores_replay_window _make_cached_request_data
        _make_scheduled_encoder_input_stats _mamba_block_aligned_split _mark_prefix_replay
        _preempt_request _reject_on_encoder_cache_embed_mismatch
        _request_blocks_can_be_freed _request_remaining_blocks _reserve_prefill_lookahead
        _set_kv_fetch_stage _try_schedule_encoder_inputs _update_after_schedule
        _update_from_kv_xfer_finished _update_request_as_session _update_request_with_output
        _update_requests_with_invalid_blocks _update_waiting_for_remote_kv add_request
        finish_requests get_ec_connector get_grammar_bitmask get_kv_cache_usage
        get_kv_connector get_kv_event_publisher_config get_num_unfinished_requests
        get_request_counts has_finished_requests has_requests make_spec_decoding_stats
        make_stats pause_state reset_connector_cache reset_encoder_cache reset_prefix_cache
        schedule set_pause_state shutdown update_draft_token_ids
        update_draft_token_ids_in_output update_from_output
    """,
    "vllm.v1.core.single_type_kv_cache_manager:CircularBufferManager": """
        _claim_ring_block add_local_computed_blocks allocate_external_computed_blocks
        allocate_new_blocks cache_blocks find_longest_cache_hit get_num_blocks_to_allocate
        get_num_skipped_tokens remove_skipped_blocks supports_fine_grained_hash_lookup
    """,
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager": """
        _cache_partial_tail_block cache_blocks find_longest_cache_hit
        supports_fine_grained_hash_lookup
    """,
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager": """
        _apply_cow _get_num_evictable_blocks _has_partial_local_hit _remove_blocks_in_range
        add_local_computed_blocks allocate_external_computed_blocks allocate_new_blocks
        cache_blocks finalize_partial_tail_offload find_longest_cache_hit free
        get_num_blocks_to_allocate get_num_skipped_tokens has_positionally_stable_blocks
        new_step_starts pop_blocks_for_free reachable_block_mask records_new_block_ids
        remove_skipped_blocks retains_longer_hit supports_fine_grained_hash_lookup
        take_new_block_ids take_pending_boundary_state_offloads take_pending_cow_copies
    """,
    "vllm.v1.core.single_type_kv_cache_manager:SlidingWindowManager": """
        _contiguous_blocks_for_hit find_longest_cache_hit get_num_skipped_tokens
        reachable_block_mask
    """,
    "vllm.v1.kv_cache_interface:AttentionSpec": """
        dcp_sharded dtype head_size head_size_v kv_quant_mode max_num_blocks_per_req
        max_tp_shards num_head_slots num_heads num_kv_heads page_size_bytes page_size_padded
        real_page_size_bytes state_content_bytes state_content_size_bytes tokens_per_state
        unpadded_page_size_bytes
    """,
    "vllm.v1.kv_cache_interface:CircularBufferSpec": """
        block_table_token_alignment is_uniform_with_collection max_memory_usage_bytes
        max_num_blocks_per_req prefix_cacheable uses_slot_mapping
    """,
    "vllm.v1.kv_cache_interface:FullAttentionSpec": """
        attention_chunk_size max_memory_usage_bytes merge merge_window_sizes non_causal
        sliding_window
    """,
    "vllm.v1.kv_cache_interface:KVCacheSpec": """
        block_size block_stride_alignment block_table_token_alignment
        copy_with_new_block_size dcp_sharded get_block_stride_alignment
        get_num_kernel_states has_layer_views is_uniform_with_collection
        max_memory_usage_bytes max_num_blocks_per_req merge num_heads num_states
        page_size_bytes prefix_cacheable prefix_replay_tokens state_content_size_bytes
        tokens_per_state uses_slot_mapping
    """,
    "vllm.v1.kv_cache_interface:SlidingWindowSpec": """
        extra_retained_tokens is_uniform_with_collection max_admission_blocks_per_request
        max_memory_usage_bytes sliding_window
    """,
    "vllm.v1.metrics.loggers:AggregateStatLoggerBase": """
        record_admission_rejection
    """,
    "vllm.v1.metrics.loggers:StatLoggerBase": """
        log log_engine_initialized record record_sleep_state
    """,
}


def own_members(cls: Any) -> set[str]:
    """Methods, properties, attributes and fields that a class defines itself, but no dunders."""
    names = {*vars(cls), *inspect.get_annotations(cls)} - {"_abc_impl"}
    return {name for name in names if not name.startswith("__")}


def collect(subclassed: Iterable[str]) -> dict[str, str]:
    """Members, in the form of `MEMBERS`, of these classes and of their bases that are vLLM's."""
    bases = {base for where in subclassed for base in find(where).__mro__}
    found = {
        f"{base.__module__}:{base.__qualname__}": " ".join(sorted(own_members(base)))
        for base in bases
        if base.__module__.split(".")[0] == "vllm"
    }
    return dict(sorted(found.items()))


def render(members: dict[str, str]) -> str:
    """The source of `MEMBERS`."""
    lines = ["MEMBERS = {"]
    for where, names in members.items():
        lines.append(f'    "{where}": """')
        lines += textwrap.wrap(names, 92, initial_indent=" " * 8, subsequent_indent=" " * 8)
        lines.append('    """,')
    return "\n".join([*lines, "}"])


def _difference(where: str, reviewed: str) -> str | None:
    cls = find(where)
    found, known = own_members(cls), set(reviewed.split())
    told = []
    if new := sorted(found - known):
        told.append(
            f"{cls.__name__} has new members {', '.join(new)}: review whether compression must "
            "override any"
        )
    if gone := sorted(known - found):
        told.append(f"{cls.__name__} has no members {', '.join(gone)} any more")
    return "; ".join(told) or None


def _hook(where: str, reviewed: str) -> Hook:
    return behaves(
        f"members of {where.partition(':')[2]}",
        where,
        f"they were reviewed in vLLM {SUPPORTED_VLLM}: install that release if this one differs",
        lambda: _difference(where, reviewed),
        upstream="further members",
        until="as long as the plugin subclasses it",
    )


HOOKS = tuple(_hook(where, reviewed) for where, reviewed in MEMBERS.items())

if __name__ == "__main__":
    print(render(collect(SUBCLASSED)))
