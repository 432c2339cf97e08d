"""Making vLLM's configuration for compression: refuse, plan, and set what follows from the plan."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tangram.errors import ConfigurationError
from tangram.geometry import Geometry
from tangram.plan.compression_plan import CompressionPlan, make_plan, with_scorer
from tangram.plan.options import CONFIG_KEY, NO_PROFILE, CompressionOptions, flag
from tangram.plan.supported import WORKER_EXTENSION_PATH
from tangram.profile import ModelIdentity
from tangram.vllm_plugin.core.admission import ADMITS_BY_HISTORY
from tangram.vllm_plugin.drift.board import name_engine
from tangram.vllm_plugin.frontend.auto_profile import resolve_profile
from tangram.vllm_plugin.frontend.hooks import require_hooks
from tangram.vllm_plugin.frontend.metrics import add_logger_to_frontend
from tangram.vllm_plugin.frontend.refusals import (
    refuse_arguments,
    refuse_configuration,
    refuse_model,
    refuse_shape,
    shape_of,
)

logger = logging.getLogger("vllm.tangram")

MOSTLY_FLOOR = 0.5
"""Part of the pages that no rule deals out above which a larger chunk is advised."""

MUCH_FOR_PROFILING = 16 << 30
"""Bytes that may be held for a moment at start without a word."""


def configure(
    args: EngineArgs, options: CompressionOptions, create: Callable[[], VllmConfig]
) -> VllmConfig:
    """vLLM's configuration with compression on.

    Args:
        args: the engine's arguments; its fields that the plan decides are set.
        options: what the user asked for.
        create: vLLM's own way from `args` to the configuration.

    Raises:
        ConfigurationError: options that cannot be served, or not together; see `refusals`.
        RuntimeError: a vLLM that is not what the plugin relies on; see `hooks`.
    """
    require_hooks()
    refuse_arguments(args)
    args.worker_extension_cls = WORKER_EXTENSION_PATH
    args.attention_config.backend = AttentionBackendEnum.CUSTOM
    config = create()
    refuse_model(config)
    refuse_configuration(config)

    model = ModelIdentity.from_config(config.model_config.hf_config.to_dict())
    shape = shape_of(config.model_config, config.parallel_config)
    refuse_shape(shape, model)
    dtype = kv_cache_dtype_str_to_dtype(config.cache_config.cache_dtype, config.model_config)
    options = _told_scorer(resolve_profile(options, args, model, dtype.itemsize))
    plan = make_plan(options, model, dtype.itemsize, shape)
    config.additional_config = {
        **config.additional_config,
        CONFIG_KEY: {**_compiled(options), "plan": plan.to_json()},
    }
    config.cache_config.block_size = plan.geometry.recent_block_tokens
    config.cache_config.prefix_cache_retention_interval = _retention_interval(
        args.prefix_cache_retention_interval, plan.geometry
    )
    _set_scheduler(config, options)
    add_logger_to_frontend()
    if plan.drift_sample:
        name_engine()
    _announce(options, plan, config.model_config.max_model_len)
    _warn_of_profiling(config, plan.geometry)
    return config


def _told_scorer(options: CompressionOptions) -> CompressionOptions:
    """The options with the scorer that `auto` stands for, which the log names."""
    served = with_scorer(options)
    if options.is_auto:
        has_profile = (options.compression_profile or NO_PROFILE).lower() != NO_PROFILE
        logger.info(
            "--compression-scorer auto: %s, %s",
            served.compression_scorer,
            "the scorer of the profile" if has_profile else "which needs no profile",
        )
    return served


def _compiled(options: CompressionOptions) -> dict[str, Any]:
    """The options, but the order of admission: vLLM keeps what it compiles by a hash of these."""
    plain = options.to_mapping()
    del plain["compression_admission"]
    return plain


def _set_scheduler(config: VllmConfig, options: CompressionOptions) -> None:
    """Have requests with a cached history admitted first, where nobody asked for another order."""
    scheduler = config.scheduler_config
    if not options.compression_admission:
        reason = f"by {flag('compression_admission', False)}"
    elif scheduler.scheduler_cls is not None:
        reason = "--scheduler-cls decides"
    elif scheduler.policy != "fcfs":
        reason = "--scheduling-policy decides"
    elif not config.cache_config.enable_prefix_caching:
        reason = "nothing is cached"
    else:
        scheduler.scheduler_cls = ADMITS_BY_HISTORY
        logger.info("waiting requests: those whose history is cached go first")
        return
    logger.info("waiting requests: their history does not count, %s", reason)


def _warn_of_profiling(config: VllmConfig, geometry: Geometry) -> None:
    """vLLM captures graphs once before the cache has its size, on a block a request."""
    sizes, scheduler = config.compilation_config, config.scheduler_config
    blocks = min(scheduler.max_num_seqs, sizes.max_cudagraph_capture_size or 0)
    held = blocks * geometry.block_bytes
    if held > MUCH_FOR_PROFILING:
        logger.warning(
            "for a moment at start, %d blocks of %d MiB are held beside the weights, %.1f GiB, to "
            "see what CUDA graphs take: where that does not fit give less --max-num-seqs, "
            "--max-cudagraph-capture-size or --compression-chunk-size",
            blocks,
            geometry.block_bytes >> 20,
            held / (1 << 30),
        )


def _retention_interval(given: int | None, geometry: Geometry) -> int | None:
    """Distance of the boundaries inside a prompt that stay resumable; None for every one."""
    default, chunk = geometry.retention_interval_tokens, geometry.chunk_size_tokens
    if given == 0:  # vLLM's own default, under which an answer could not be resumed
        return default
    if given is not None and given % chunk:
        raise ConfigurationError(
            f"--prefix-cache-retention-interval {given} is not a multiple of "
            f"{flag('compression_chunk_size')} {chunk}: give one that is, or leave it out for "
            f"{default}"
        )
    return given


def _announce(options: CompressionOptions, plan: CompressionPlan, max_model_len: int) -> None:
    """Tell what is served, and warn of options under which compression gives less than it could."""
    geometry = plan.geometry
    logger.info(
        "KV cache compression: ratio %g, %s, scorer %s, chunks of %d tokens, window %d, "
        "%d heads a page, sealed block %d KiB, recent block %d tokens, layout %s",
        options.compression_ratio,
        plan.budgets_title,
        plan.scorer_title,
        geometry.chunk_size_tokens,
        geometry.window_size_tokens,
        geometry.page_group_size,
        geometry.sealed_block_bytes >> 10,
        geometry.recent_block_tokens,
        geometry.digest,
    )
    if plan.level != "uniform" and plan.floor_share > MOSTLY_FLOOR:
        logger.warning(
            "%.0f %% of what is kept are pages that every head has to have of each chunk, whatever "
            "it needs: a --compression-chunk-size above %d leaves more to the heads that need it",
            100 * plan.floor_share,
            geometry.chunk_size_tokens,
        )
    if plan.level != "uniform" and geometry.num_kv_heads == geometry.page_group_size > 1:
        logger.warning(
            "all %d KV heads of a layer share a budget: with a --page-group-size below %d those "
            "that need more get more",
            geometry.num_kv_heads,
            geometry.num_kv_heads,
        )
    if max_model_len <= geometry.chunk_size_tokens:
        logger.warning(
            "nothing will be compressed: no request of at most %d tokens (--max-model-len) has a "
            "whole chunk of %d (--compression-chunk-size) before its last token",
            max_model_len,
            geometry.chunk_size_tokens,
        )
