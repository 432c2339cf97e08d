"""What compression does not serve, asked of vLLM's own objects: refused at start.

The list, with its sentences and remedies, is `plan.supported`'s; here is how vLLM answers it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm.config import ModelConfig, ParallelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs

from tangram.errors import refuse
from tangram.plan import supported
from tangram.plan.model_facts import ModelFacts
from tangram.plan.model_shape import ModelShape
from tangram.profile import ModelIdentity


def refuse_arguments(args: EngineArgs) -> None:
    """Raise UnsupportedError for arguments that would fail, or mislead, further on.

    Looked at before vLLM makes its configuration, so that the message is about compression and not
    about a consequence of it.
    """
    attention = args.attention_config
    chosen = {
        "backend": attention.backend and attention.backend.name,
        "backend_per_kind": attention.backend_per_kind,
    }
    supported.refuse_options({**vars(args), "attention_config": chosen})


def refuse_model(config: VllmConfig) -> None:
    """Raise UnsupportedError for a model that compression cannot serve yet."""
    cache, scheme = config.cache_config.cache_dtype, ""
    if getattr(config.quant_config, "kv_cache_scheme", None):
        scheme = "kv_cache_scheme of the checkpoint"
    elif cache not in supported.CACHE_DTYPES:
        scheme = f"{cache} by the checkpoint"
    facts = facts_of(config.model_config, {"kv_cache_dtype": cache})
    facts = replace(facts, quantised_cache=facts.quantised_cache or scheme)
    supported.refuse_model(config.model_config.model, facts)


def refuse_configuration(config: VllmConfig) -> None:
    """Raise UnsupportedError for what only the finished configuration shows."""
    events = config.kv_events_config
    supported.refuse_options(
        {
            "kv_events_config": events
            and {"enable_kv_cache_events": events.enable_kv_cache_events},
            "speculative_config": config.speculative_config,
            "kv_transfer_config": config.kv_transfer_config,
            "kv_cache_dtype": config.cache_config.cache_dtype,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "disable_hybrid_kv_cache_manager": (
                config.scheduler_config.disable_hybrid_kv_cache_manager
            ),
        }
    )


def facts_of(model: ModelConfig, engine: dict[str, Any]) -> ModelFacts:
    """What vLLM knows of a model, and beyond that what its config tells.

    Args:
        model: vLLM's configuration of it.
        engine: arguments of the engine, as far as the facts depend on them.
    """
    config = model.hf_config.to_dict()
    if model.hf_text_config is not model.hf_config:
        config["text_config"] = model.hf_text_config.to_dict()
    told = ModelFacts.from_config(config, engine)
    other_layers, ahead = told.other_layers, told.attends_ahead
    if model.is_hybrid or model.is_attention_free:
        other_layers = other_layers or tuple(model.architectures)
    if model.is_mm_prefix_lm:
        ahead = (*ahead, "within images")
    return replace(
        told,
        generates_text=model.runner_type == "generate",
        is_encoder_decoder=model.is_encoder_decoder,
        uses_mla=model.use_mla,
        other_layers=other_layers,
        sliding_window=model.get_sliding_window(),
        attends_ahead=ahead,
        attention_bias=told.attention_bias or (("alibi",) if model.uses_alibi else ()),
    )


def shape_of(model: ModelConfig, parallel: ParallelConfig) -> ModelShape:
    """Layers and heads as vLLM counts them.

    Args:
        model: vLLM's configuration of the model.
        parallel: of the engine, which is not parallel.
    """
    return ModelShape(
        num_layers=model.get_num_layers(parallel),
        num_kv_heads=model.get_total_num_kv_heads(),
        num_query_heads=model.get_num_attention_heads(parallel),
        head_size=model.get_head_size(),
    )


def refuse_shape(shape: ModelShape, identity: ModelIdentity) -> None:
    """Raise UnsupportedError if vLLM counts other layers or heads than the model's config gives.

    Args:
        shape: as vLLM counts.
        identity: by the config, as profiles know it.
    """
    described = ModelShape.of(identity)
    refuse(
        shape != described,
        f"a model that vLLM serves with {shape}, where its config gives {described}",
        "correct config.json or --hf-overrides, or serve it without --enable-compression",
    )
