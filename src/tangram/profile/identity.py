"""Which model a profile was made for: sizes, and a digest of what defines the network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tangram.errors import ProfileError
from tangram.profile.checks import MOST_HEADS, text, whole_number

# Named one by one, because a config that went through a library holds many more fields than the
# file it came from (defaults, generation settings), and both must give the same digest.
_NETWORK_FIELDS = (
    "attention_bias",
    "attention_multiplier",
    "attn_logit_softcapping",
    "decoder_sparse_step",
    "embedding_multiplier",
    "final_logit_softcapping",
    "hidden_act",
    "hidden_activation",
    "intermediate_size",
    "layer_norm_eps",
    "logits_scaling",
    "mlp_bias",
    "model_type",
    "moe_intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "rms_norm_eps",
    "shared_expert_intermediate_size",
    "tie_word_embeddings",
    "use_qk_norm",
)
_SLIDING_FIELDS = ("layer_types", "max_window_layers", "sliding_window", "sliding_window_pattern")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a Hugging Face config, which some nest."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


@dataclass(frozen=True)
class ModelIdentity:
    """The network that statistics belong to.

    Attributes:
        architecture: class name of the model, as in `architectures` of its config.
        num_layers: attention layers.
        num_kv_heads: KV heads of a layer.
        num_query_heads: query heads of a layer.
        head_size: elements of one head's key.
        hidden_size: width of the residual stream.
        vocab_size: tokens of the vocabulary.
        config_sha256: digest of the fields of the config that define the network, or None where
            the config is not known; two identities of which one lacks it are compared without.
    """

    architecture: str
    num_layers: int
    num_kv_heads: int
    num_query_heads: int
    head_size: int
    hidden_size: int
    vocab_size: int
    config_sha256: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self)[1:7]:
            whole_number(f"model identity: {field.name}", getattr(self, field.name))
        if self.num_layers * self.num_query_heads > MOST_HEADS:
            raise ProfileError(
                f"model identity: {self.num_layers} layers of {self.num_query_heads} query heads "
                f"are more than {MOST_HEADS} heads"
            )
        text("model identity: architecture", self.architecture)
        if self.config_sha256 is not None:
            text("model identity: config_sha256", self.config_sha256)
        if self.num_query_heads % self.num_kv_heads:
            raise ProfileError(
                f"model identity: {self.num_query_heads} query heads are not a multiple of "
                f"{self.num_kv_heads} KV heads"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelIdentity:
        """The identity of the model that a Hugging Face config (as a plain dict) describes.

        The language model's part is taken where it is nested (`text_config`). An absent
        `head_dim` is hidden_size / heads, an absent `num_key_value_heads` all heads. Name, path,
        versions, dtype and generation settings do not count.

        Raises:
            ProfileError: the config lacks a size.
        """
        text = text_config(config)

        def size(name: str) -> int:
            value = text.get(name)
            if not isinstance(value, int):
                raise ProfileError(
                    f"the model's config needs an integer {name}, got {value!r}: give the "
                    "folder or config.json of a decoder-only model whose sizes have Llama's names"
                )
            return value

        query_heads = size("num_attention_heads")
        hidden_size = size("hidden_size")
        named = config.get("architectures") or text.get("architectures") or []
        return cls(
            architecture=str(named[0] if named else text.get("model_type", "unknown")),
            num_layers=size("num_hidden_layers"),
            num_kv_heads=int(text.get("num_key_value_heads") or query_heads),
            num_query_heads=query_heads,
            head_size=int(text.get("head_dim") or hidden_size // query_heads),
            hidden_size=hidden_size,
            vocab_size=size("vocab_size"),
            config_sha256=_digest(text),
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    def differences(self, other: ModelIdentity) -> list[str]:
        """Names of the fields in which the two differ; empty when they are the same network."""
        names = [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]
        if self.config_sha256 is None or other.config_sha256 is None:
            return [name for name in names if name != "config_sha256"]
        return names

    def __str__(self) -> str:
        digest = self.config_sha256[:12] if self.config_sha256 else "unknown"
        return (
            f"{self.architecture} ({self.num_layers} layers, {self.num_kv_heads} KV and "
            f"{self.num_query_heads} query heads of {self.head_size}, width {self.hidden_size}, "
            f"vocabulary {self.vocab_size}, config {digest})"
        )


def _digest(text: Mapping[str, Any]) -> str:
    """SHA-256 of the network's fields; what is absent, null and false counts the same."""
    network: dict[str, Any] = {name: text.get(name) for name in _NETWORK_FIELDS}
    # A library may rename it as it reads the file.
    experts = network.pop("num_experts")
    network["num_local_experts"] = network["num_local_experts"] or experts
    network["rope"] = _rope(text)
    if text.get("use_sliding_window") is not False:
        network |= {name: text.get(name) for name in _SLIDING_FIELDS}
        if set(network["layer_types"] or ()) <= {"full_attention"}:
            network["layer_types"] = None
        if network["sliding_window"] is None:
            network["max_window_layers"] = network["sliding_window_pattern"] = None
    canonical = {name: value for name, value in network.items() if value not in (None, False)}
    text_form = json.dumps(canonical, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text_form.encode()).hexdigest()


def _rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings in one form, whether flat (`rope_theta`, `rope_scaling`) or gathered."""
    rope: dict[str, Any] = {
        name: text[name]
        for name in ("rope_theta", "partial_rotary_factor")
        if text.get(name) is not None
    }
    for gathered in ("rope_scaling", "rope_parameters"):
        rope |= {k: v for k, v in (text.get(gathered) or {}).items() if v is not None}
    kind = rope.pop("type", None)
    rope.setdefault("rope_type", kind)
    if rope["rope_type"] in (None, "default"):
        del rope["rope_type"]
    # What a library adds to a file that leaves them out.
    rope.setdefault("rope_theta", 10000)
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    return {k: float(v) if type(v) is int else v for k, v in rope.items()}
