"""Combinations that compression does not serve: refused at start, never served uncompressed."""

from __future__ import annotations

from vllm import envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tangram.errors import refuse

WORKER_EXTENSION_PATH = "tangram.vllm_plugin.worker.extension.CompressionWorkerExtension"

_FULL_ATTENTION = {"attention", "full_attention"}


def refuse_arguments(args: EngineArgs) -> None:
    """Raise UnsupportedError for arguments that would fail, or mislead, further on.

    Looked at before vLLM makes its configuration, so that the message is about compression and not
    about a consequence of it.
    """
    refuse(
        args.speculative_config or getattr(args, "spec_method", None),
        "speculative decoding (--speculative-config)",
        "leave it out, or serve without --enable-compression",
    )
    for name in ("tensor_parallel_size", "pipeline_parallel_size",
                 "decode_context_parallel_size", "prefill_context_parallel_size"):  # fmt: skip
        size = getattr(args, name)
        flag = "--" + name.replace("_", "-")
        refuse(size > 1, f"{flag} {size} yet", f"use {flag} 1")
    refuse(
        args.kv_transfer_config or args.kv_offloading_size,
        "KV connectors and offloading (--kv-transfer-config, --kv-offloading-size)",
        "leave them out",
    )
    refuse(
        args.kv_cache_dtype not in ("auto", "float16", "bfloat16"),
        f"a quantised KV cache (--kv-cache-dtype {args.kv_cache_dtype})",
        "use --kv-cache-dtype auto",
    )
    refuse(
        args.enable_dbo or args.ubatch_size > 1,
        "steps cut into microbatches (--enable-dbo, --ubatch-size)",
        "leave them out",
    )
    refuse(
        args.disable_hybrid_kv_cache_manager,
        "--disable-hybrid-kv-cache-manager",
        "leave it out: sealed and recent blocks are two cache groups",
    )
    refuse(
        args.block_size is not None,
        f"--block-size {args.block_size}",
        "leave it out: the chunk size and the budgets decide it",
    )
    refuse(
        args.attention_backend
        or args.attention_config.backend not in (None, AttentionBackendEnum.CUSTOM)
        or args.attention_config.backend_per_kind,
        "another attention backend (--attention-backend, or backend_per_kind of "
        "--attention-config)",
        "leave it out: compression brings its own",
    )
    refuse(
        args.worker_extension_cls not in ("", WORKER_EXTENSION_PATH),
        f"--worker-extension-cls {args.worker_extension_cls}",
        "leave it out: compression brings its own",
    )
    refuse(
        envs.VLLM_BATCH_INVARIANT,
        "batch-invariant mode (the environment variable VLLM_BATCH_INVARIANT)",
        "unset it, or serve without --enable-compression",
    )


def refuse_model(config: VllmConfig) -> None:
    """Raise UnsupportedError for a model that compression cannot serve yet."""
    model = config.model_config
    name = f"the model {model.model!r}"
    refuse(model.runner_type != "generate", f"{name}, which does not generate text", "use another")
    refuse(model.is_encoder_decoder, f"{name}, an encoder-decoder", "use a decoder-only model")
    refuse(model.use_mla, f"{name}, which uses MLA", "use a model with plain attention")
    refuse(
        model.is_hybrid or model.is_attention_free,
        f"{name}, which has layers other than attention, yet",
        "serve it without --enable-compression",
    )
    text = model.hf_text_config
    layer_types = set(getattr(text, "layer_types", None) or ())
    refuse(
        model.get_sliding_window() is not None
        or not layer_types <= _FULL_ATTENTION
        or getattr(text, "attention_chunk_size", None)
        or model.rswa_window,
        f"{name}, which has sliding-window or local attention layers, yet",
        "serve it without --enable-compression, or with --disable-sliding-window where the "
        "context fits the window",
    )
    refuse(
        getattr(text, "num_kv_shared_layers", 0) or model.is_mm_prefix_lm,
        f"{name}, which shares KV between layers or attends to images both ways",
        "serve it without --enable-compression",
    )


def refuse_configuration(config: VllmConfig) -> None:
    """Raise UnsupportedError for what only the finished configuration shows."""
    refuse(config.speculative_config, "speculative decoding", "leave --speculative-config out")
    refuse(config.kv_transfer_config, "KV connectors", "leave --kv-transfer-config out")
    model, dtype = config.model_config, config.cache_config.cache_dtype
    # Some formats are known only to the layers, which take "auto" for the checkpoint's.
    scheme = getattr(config.quant_config, "kv_cache_scheme", None)
    refuse(
        dtype not in ("auto", "float16", "bfloat16") or (dtype == "auto" and scheme),
        f"the quantised KV cache ({dtype}) of this checkpoint",
        "give --dtype and --kv-cache-dtype the same type, bfloat16 or float16: the cache then does "
        "without the checkpoint's scales",
    )
    refuse(
        kv_cache_dtype_str_to_dtype(dtype, model) != model.dtype,
        f"--kv-cache-dtype {dtype} with a model in {str(model.dtype).removeprefix('torch.')}",
        "use --kv-cache-dtype auto: queries, keys and values have one type",
    )
    refuse(
        config.scheduler_config.disable_hybrid_kv_cache_manager,
        "a configuration that turns the hybrid KV cache manager off",
        "leave out the option that does",
    )
