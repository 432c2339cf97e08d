"""What compression serves: the one list of models and of vLLM's options that it refuses.

Every command asks it with what the config file says, before vLLM is loaded, and the engine with
what vLLM knows. What only the made layers show is refused in a worker.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tangram.errors import refuse
from tangram.plan.dtypes import ITEMSIZE_BYTES
from tangram.plan.model_facts import ModelFacts

WORKER_EXTENSION_PATH = "tangram.vllm_plugin.worker.extension.CompressionWorkerExtension"
"""What compression adds to vLLM's worker; another one takes its place."""

CACHE_DTYPES = ("auto", "float16", "bfloat16")
"""Values of --kv-cache-dtype that are served."""

_FULL_MODEL = "use a decoder-only model all of whose layers are full attention"
_STOCK = "serve it without --enable-compression"


@dataclass(frozen=True)
class Reason:
    """Something that is not served.

    Attributes:
        found: what there is of it; it is there unless that is empty.
        what: names it, and the option; `{}` stands for what was found.
        remedy: what to do.
    """

    found: Callable[[Any], object]
    what: str
    remedy: str


MODEL_REASONS: Mapping[str, Reason] = {
    "no text": Reason(
        lambda m: not m.generates_text,
        "does not generate text",
        "use a decoder-only model, without --runner and --convert",
    ),
    "encoder-decoder": Reason(
        lambda m: m.is_encoder_decoder, "is an encoder-decoder", "use a decoder-only model"
    ),
    "MLA": Reason(lambda m: m.uses_mla, "uses MLA", "use a model with plain attention"),
    "other layers": Reason(
        lambda m: ", ".join(m.other_layers),
        "has layers other than attention over all tokens ({})",
        f"{_FULL_MODEL}, or {_STOCK}",
    ),
    "attends ahead": Reason(
        lambda m: ", ".join(m.attends_ahead),
        "attends to later tokens too ({})",
        f"{_FULL_MODEL}, or {_STOCK}",
    ),
    "shared KV": Reason(
        lambda m: m.shared_layers,
        "shares KV between layers ({} of them)",
        f"{_FULL_MODEL}, or {_STOCK}",
    ),
    "local layers": Reason(
        lambda m: ", ".join(m.local_layers),
        "has sliding-window or local attention layers ({})",
        f"{_FULL_MODEL}, or {_STOCK}",
    ),
    "attention bias": Reason(
        lambda m: ", ".join(m.attention_bias),
        "changes attention's logits ({})",
        f"{_FULL_MODEL}, or {_STOCK}",
    ),
    "sliding window": Reason(
        lambda m: m.sliding_window,
        "has sliding-window layers (sliding_window {})",
        f"{_FULL_MODEL}, or serve this one with --disable-sliding-window (disable_sliding_window "
        "of the engine's arguments), which limits requests to the window",
    ),
    "quantised cache": Reason(
        # Some formats are known only to the layers, which take "auto" for the checkpoint's.
        lambda m: m.quantised_cache if m.kv_cache_dtype not in CACHE_DTYPES[1:] else "",
        "has a quantised KV cache ({})",
        "give --dtype and --kv-cache-dtype the same type, bfloat16 or float16: the cache then does "
        "without the checkpoint's scales",
    ),
}
"""Models that are not served; the first that is found is told."""


def refuse_model(name: str, facts: ModelFacts) -> None:
    """Raise UnsupportedError for a model that compression does not serve.

    Args:
        name: by which the user knows it.
        facts: what is known of it.
    """
    for reason in MODEL_REASONS.values():
        if found := reason.found(facts):
            refuse(True, f"the model {name!r}, which {reason.what.format(found)}", reason.remedy)


def _parallel(name: str) -> Reason:
    option = f"--{name.replace('_', '-')}"
    return Reason(
        lambda given: size if (size := given.get(name) or 1) > 1 else None,
        f"{option} {{}} yet",
        f"use {option} 1",
    )


OPTION_REASONS: Mapping[str, Reason] = {
    "speculative decoding": Reason(
        lambda given: given.get("speculative_config") or given.get("spec_method"),
        "speculative decoding (--speculative-config, --spec-method)",
        "leave it out, or serve without --enable-compression",
    ),
    "tensor parallelism": _parallel("tensor_parallel_size"),
    "pipeline parallelism": _parallel("pipeline_parallel_size"),
    "decode context parallelism": _parallel("decode_context_parallel_size"),
    "prefill context parallelism": _parallel("prefill_context_parallel_size"),
    "KV connectors": Reason(
        lambda given: given.get("kv_transfer_config") or given.get("kv_offloading_size"),
        "KV connectors and offloading (--kv-transfer-config, --kv-offloading-size)",
        "leave them out",
    ),
    "KV events": Reason(
        # A router counts a block that it was told of behind all before it. What can be resumed is
        # no such chain: the raw window is cached at few boundaries, and leaves on its own.
        lambda given: (
            isinstance(events := given.get("kv_events_config"), Mapping)
            and events.get("enable_kv_cache_events")
        ),
        "KV events (--kv-events-config), which name chunks at whose end nothing can be resumed",
        "leave them out, and let a router keep a conversation where it began",
    ),
    "quantised cache": Reason(
        lambda given: (
            (dtype := str(given.get("kv_cache_dtype") or "auto")) not in CACHE_DTYPES and dtype
        ),
        "a quantised KV cache (--kv-cache-dtype {})",
        "use --kv-cache-dtype auto",
    ),
    "two types": Reason(
        lambda given: _two_types(given),
        "--kv-cache-dtype {0[0]} with a model in {0[1]}",
        "use --kv-cache-dtype auto: queries, keys and values have one type",
    ),
    "microbatches": Reason(
        lambda given: given.get("enable_dbo") or (given.get("ubatch_size") or 0) > 1,
        "steps cut into microbatches (--enable-dbo, --ubatch-size)",
        "leave them out",
    ),
    "no hybrid manager": Reason(
        lambda given: given.get("disable_hybrid_kv_cache_manager"),
        "a configuration without the hybrid KV cache manager (--disable-hybrid-kv-cache-manager)",
        "leave out the option that turns it off: sealed and recent blocks are two cache groups",
    ),
    "block size": Reason(
        lambda given: given.get("block_size"),
        "--block-size {}",
        "leave it out: the chunk size and the budgets decide it",
    ),
    "attention backend": Reason(
        lambda given: given.get("attention_backend") or _chosen_backend(given),
        "another attention backend (--attention-backend, or backend and backend_per_kind of "
        "--attention-config)",
        "leave it out: compression brings its own",
    ),
    "worker extension": Reason(
        lambda given: (path := given.get("worker_extension_cls")) != WORKER_EXTENSION_PATH and path,
        "--worker-extension-cls {}",
        "leave it out: compression brings its own",
    ),
    "batch invariance": Reason(
        lambda given: os.environ.get("VLLM_BATCH_INVARIANT", "0").strip() not in ("", "0"),
        "batch-invariant mode (the environment variable VLLM_BATCH_INVARIANT)",
        "unset it, or serve without --enable-compression",
    ),
}
"""Arguments of the engine that compression does not go with; the first that is found is told."""


def refuse_options(given: Mapping[str, Any], where: str = "") -> None:
    """Raise UnsupportedError for arguments of vLLM's engine that would fail, or mislead, later.

    Args:
        given: arguments under vLLM's names; what is absent or None is at its default.
        where: option by which they were given, to be named too; none where they are flags.
    """
    for reason in OPTION_REASONS.values():
        if found := reason.found(given):
            what = reason.what.format(found)
            refuse(True, f"{what} in {where}" if where else what, reason.remedy)


def _two_types(given: Mapping[str, Any]) -> tuple[str, str] | None:
    cache, model = str(given.get("kv_cache_dtype")), str(given.get("dtype"))
    if cache == model or cache not in ITEMSIZE_BYTES or model not in ITEMSIZE_BYTES:
        return None
    return cache, model


def _chosen_backend(given: Mapping[str, Any]) -> object:
    """A backend by `attention_config`, unless it is the one that compression sets itself."""
    config = given.get("attention_config")
    if not isinstance(config, Mapping):
        return None
    backend = config.get("backend")
    return config.get("backend_per_kind") or (backend and str(backend).upper() != "CUSTOM")
