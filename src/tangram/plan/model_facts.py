"""What compression asks of a model, read from its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from tangram.profile import text_config

FULL_ATTENTION = frozenset({"attention", "full_attention"})
"""Names of a layer that attends to all tokens."""

_LOCAL_ATTENTION = ("sliding", "chunked", "local")
_OTHER_LAYER_FIELDS = (
    "attn_layer_indices", "attn_layer_period", "block_types", "conv_L_cache", "full_attn_idxs",
    "hybrid_override_pattern", "layers_block_type", "linear_attn_config", "mamba_d_ssm",
    "mamba_d_state", "mamba_n_heads", "ssm_cfg", "ssm_state_size", "state_size",
)  # fmt: skip
_PATTERN_FIELDS = ("sliding_window_pattern", "_sliding_window_pattern")

_NOT_GENERATING = (
    "ClassificationModel", "EmbeddingModel", "ForAudioClassification", "ForImageClassification",
    "ForMaskedLM", "ForMultipleChoice", "ForNextSentencePrediction", "ForPreTraining",
    "ForQuestionAnswering", "ForRewardModeling", "ForSequenceClassification", "ForTextEncoding",
    "ForTokenClassification", "ForVideoClassification", "RewardModel",
)  # fmt: skip
"""Ends of the names of architectures that have no head for the next token."""
_ENCODERS = {"electra", "esm", "mpnet", "nystromformer"}
"""Model types of encoders, beside those that have "bert" in their names."""

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class ModelFacts:
    """What is asked of a model, as plain values; the defaults are those of one that is served.

    Attributes:
        generates_text: whether it goes on with a text, token by token.
        is_encoder_decoder: whether an encoder reads the prompt.
        uses_mla: whether its cache is MLA's.
        other_layers: what shows layers that are no attention over all tokens' keys and values.
        local_layers: what shows that some layers, or all in another way, attend locally.
        sliding_window: tokens that every layer attends to; None for all of them.
        shared_layers: layers that attend to another layer's cache.
        attends_ahead: what shows that tokens attend to later ones.
        attention_bias: what is done to attention's logits that kernels here do not do.
        quantised_cache: how the checkpoint quantises its KV cache; empty where it does not.
        kv_cache_dtype: the engine's option of that name.
    """

    generates_text: bool = True
    is_encoder_decoder: bool = False
    uses_mla: bool = False
    other_layers: tuple[str, ...] = ()
    local_layers: tuple[str, ...] = ()
    sliding_window: int | None = None
    shared_layers: int = 0
    attends_ahead: tuple[str, ...] = ()
    attention_bias: tuple[str, ...] = ()
    quantised_cache: str = ""
    kv_cache_dtype: str = "auto"

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], engine: Mapping[str, Any] = _NOTHING
    ) -> ModelFacts:
        """The facts that a config tells for certain; what it does not tell counts as served.

        Args:
            config: of Hugging Face, as a plain dict, or `served_config` of it.
            engine: arguments of vLLM's engine, under its names.
        """
        text = text_config(config)
        kinds = {str(kind) for kind in text.get("layer_types") or ()} - FULL_ATTENTION
        local = {kind for kind in kinds if any(word in kind for word in _LOCAL_ATTENTION)}
        window = None if text.get("use_sliding_window") is False else text.get("sliding_window")
        return cls(
            generates_text=_generates_text(config, engine),
            is_encoder_decoder=any(part.get("is_encoder_decoder") for part in (config, text)),
            uses_mla=bool(text.get("kv_lora_rank")),
            # Where they are named, a model of a hybrid family may have none but attention.
            other_layers=(
                tuple(sorted(kinds - local)) if text.get("layer_types") else _other_layers(text)
            ),
            local_layers=(*sorted(local), *_local_layers(config, text, window)),
            sliding_window=window or None,
            shared_layers=text.get("num_kv_shared_layers") or 0,
            attends_ahead=_attends_ahead(config, text),
            attention_bias=_attention_bias(text),
            quantised_cache=_quantised_cache(config, text),
            kv_cache_dtype=str(engine.get("kv_cache_dtype") or "auto"),
        )


def served_config(config: Mapping[str, Any], engine: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config as the engine will see it: with what its arguments change.

    Args:
        config: of Hugging Face, as a plain dict.
        engine: arguments of vLLM's engine, under its names.
    """
    overrides = engine.get("hf_overrides")
    if isinstance(overrides, Mapping):  # a function, which vLLM takes too, is only run there
        config = {**config, **overrides}
    if engine.get("disable_sliding_window"):
        text = {**text_config(config), "sliding_window": None}
        config = {**config, "text_config": text} if text_config(config) is not config else text
    return config


def _generates_text(config: Mapping[str, Any], engine: Mapping[str, Any]) -> bool:
    asked = (engine.get("runner") or "auto", engine.get("convert") or "auto")
    if asked[0] not in ("auto", "generate") or asked[1] not in ("auto", "none"):
        return False
    architectures = [str(name) for name in config.get("architectures") or ()]
    if architectures and all(name.endswith(_NOT_GENERATING) for name in architectures):
        return False
    kind = str(config.get("model_type") or "")
    return not ("bert" in kind or kind in _ENCODERS) or bool(config.get("is_decoder"))


def _other_layers(text: Mapping[str, Any]) -> tuple[str, ...]:
    """What shows layers other than attention in a config that does not name its layers' kinds."""
    shown = [name for name in _OTHER_LAYER_FIELDS if _names_others(text.get(name))]
    interval = text.get("full_attention_interval") or 1
    if interval > 1:
        shown.append(f"full_attention_interval {interval}")
    if any(kind != 1 for kind in text.get("attn_type_list") or ()):
        shown.append("attn_type_list")
    return tuple(shown)


def _names_others(value: object) -> bool:
    """Whether a field of a hybrid family is there, and no list of full attention alone."""
    is_full = isinstance(value, list | tuple) and set(map(str, value)) <= FULL_ATTENTION
    return bool(value) and not is_full


def _local_layers(
    config: Mapping[str, Any], text: Mapping[str, Any], window: int | None
) -> tuple[str, ...]:
    shown = [
        f"{name} {part[name]}"
        for part, name in ((text, "attention_chunk_size"), (config, "rswa_window"))
        if part.get(name)
    ]
    if window:
        shown += [f"{name} {text[name]}" for name in _PATTERN_FIELDS if text.get(name)]
        first, layers = text.get("max_window_layers"), text.get("num_hidden_layers")
        if text.get("use_sliding_window") and first and layers and first < layers:
            shown.append(f"max_window_layers {first} of {layers}")
    return tuple(shown)


def _attends_ahead(config: Mapping[str, Any], text: Mapping[str, Any]) -> tuple[str, ...]:
    shown = {
        "is_causal false": False in (config.get("is_causal"), text.get("is_causal")),
        "use_bidirectional_attention": text.get("use_bidirectional_attention") in (True, "all"),
        "prefix_lm": text.get("prefix_lm"),
        "canvas_length": config.get("canvas_length"),
    }
    return tuple(name for name, found in shown.items() if found)


def _attention_bias(text: Mapping[str, Any]) -> tuple[str, ...]:
    nested = text.get("attn_config")
    alibi = text.get("alibi") or (isinstance(nested, Mapping) and nested.get("alibi"))
    cap = text.get("attn_logit_softcapping")
    return (*(["alibi"] if alibi else []), *([f"attn_logit_softcapping {cap:g}"] if cap else []))


def _quantised_cache(config: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    for part in (config, text):
        for field in ("quantization_config", "compression_config"):
            quantised = part.get(field)
            if not isinstance(quantised, Mapping):
                continue
            inner = quantised.get("quantization")
            for where in (quantised, inner if isinstance(inner, Mapping) else {}):
                for name in ("kv_cache_scheme", "kv_cache_quant_algo"):
                    if where.get(name):
                        return f"{name} of {field}"
    return ""
