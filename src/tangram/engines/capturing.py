"""Looking into stock vLLM while it reads texts with full KV: what calibration is made from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm import LLM, SamplingParams
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from tangram.engines.engine_arguments import named_refusals
from tangram.engines.process import free_memory, in_this_process
from tangram.errors import UnsupportedError
from tangram.geometry import LayerMap
from tangram.profile import ModelIdentity
from tangram.vllm_plugin.worker.gates import find_projection

OnLayer = Callable[..., None]
"""(ordinal of the layer, queries, keys, values, norms), queries [tokens, query_heads, head_size]
and keys after RoPE, keys and values [tokens, kv_heads, head_size], norms of the residual stream
[tokens]; and, where they are asked for, the hidden states that entered the projection to all three,
[tokens, hidden_size]."""


@dataclass(frozen=True)
class ModelFacts:
    """What calibration needs to know of a model beside its activations.

    Attributes:
        identity: which network it is.
        softmax_scale: factor on query times key.
        rope_frequencies: [rotary dimensions / 2] float64, or None where RoPE is not of neox style.
        output_projections: [layers], each [hidden, query_heads * head_size].
    """

    identity: ModelIdentity
    softmax_scale: float
    rope_frequencies: Tensor | None
    output_projections: list[Tensor]


class FullKVEngine:
    """Stock vLLM in this process, read from the inside.

    Args:
        model: folder or name of the model.
        max_tokens: longest text, in tokens; a text is read in one forward.
        layers: which of the model's layers are looked into; all with attention when absent.
        **options: further keyword arguments of `vllm.LLM`.

    Raises:
        UnsupportedError: a model whose decoder layers have another form than Llama's.
    """

    def __init__(
        self, model: str, max_tokens: int, *, layers: LayerMap | None = None, **options: Any
    ) -> None:
        with named_refusals(), in_this_process():
            self._llm = LLM(
                model,
                max_model_len=max_tokens + 1,
                max_num_batched_tokens=max_tokens + 1,
                max_num_seqs=1,
                enforce_eager=True,
                enable_prefix_caching=False,
                **options,
            )
        self._model: nn.Module = self._llm.apply_model(lambda inner: inner)[0]
        named = {
            extract_layer_index(name): (name, module)
            for name, module in self._model.named_modules()
            if isinstance(module, Attention)
        }
        chosen = LayerMap(tuple(sorted(named))) if layers is None else layers
        found = [named[layer] for layer in chosen.compressed]
        self._names = [name for name, _ in found]
        self._attention = {ordinal: module for ordinal, (_, module) in enumerate(found)}
        self._decoders: list[Any] = [
            self._model.get_submodule(name.partition(".self_attn.")[0]) for name, _ in found
        ]
        if not all(map(_can_be_looked_into, self._decoders)):
            raise self._unsupported("have no self_attn with an o_proj, or take no hidden_states")

    def facts(self) -> ModelFacts:
        """What is constant of the model."""
        config = self._llm.llm_engine.vllm_config.model_config.hf_config
        return ModelFacts(
            identity=ModelIdentity.from_config(config.to_dict()),
            softmax_scale=float(self._attention[0].impl.scale),
            rope_frequencies=_rope_frequencies(self._decoders[0].self_attn),
            output_projections=[_weight(d.self_attn.o_proj) for d in self._decoders],
        )

    def read(
        self, tokens: Sequence[int], on_layer: OnLayer, *, hidden_states: bool = False
    ) -> None:
        """Read one text; `on_layer` is called for every layer, in order.

        Args:
            tokens: of the text.
            on_layer: see `OnLayer`.
            hidden_states: whether it is given them.

        Raises:
            UnsupportedError: layers of the model do not call their attention as a module, or what
                they project hidden states with is not found.
        """
        norms: list[Tensor] = []
        projected: list[Tensor] = []
        seen: set[int] = set()

        def before_decoder(module: nn.Module, args: Any, kwargs: Any) -> None:
            states = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            hidden, residual = states["hidden_states"], states.get("residual")
            stream = hidden if residual is None else hidden + residual
            norms.append(stream.float().norm(dim=-1))

        def before_attention(layer: int, module: Attention, args: Any) -> None:
            query, key, value = (
                states.view(len(tokens), -1, module.head_size) for states in args[:3]
            )
            seen.add(layer)
            on_layer(layer, query, key, value, norms[-1], *projected[-1:])

        def before_projection(module: nn.Module, args: Any, kwargs: Any) -> None:
            projected.append(args[0] if args else next(iter(kwargs.values())))

        handles = [
            decoder.register_forward_pre_hook(before_decoder, with_kwargs=True)
            for decoder in self._decoders
        ]
        for name in self._names if hidden_states else ():
            projection = find_projection(self._model, name)
            handles.append(
                projection.register_forward_pre_hook(before_projection, with_kwargs=True)
            )
        for index, module in self._attention.items():
            handles.append(
                module.register_forward_pre_hook(
                    lambda module, args, index=index: before_attention(index, module, args)
                )
            )
        try:
            self._llm.generate(
                [{"prompt_token_ids": list(tokens)}],
                SamplingParams(max_tokens=1, temperature=0),
                use_tqdm=False,
            )
        finally:
            for handle in handles:
                handle.remove()
        if seen != set(self._attention):
            raise self._unsupported("do not call their attention as a module")

    def _unsupported(self, reason: str) -> UnsupportedError:
        return UnsupportedError(
            f"the layers of {type(self._model).__name__} {reason}: statistics can be taken of "
            "models built like Llama, Qwen3 and Granite; serve this one with --compression-profile "
            "none"
        )

    def close(self) -> None:
        """Give the engine's memory back."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._model, self._attention, self._decoders, self._llm
        free_memory()


def _can_be_looked_into(decoder: Any) -> bool:
    """Whether a decoder layer has what is read of it, under the names that vLLM's models share."""
    attention = getattr(decoder, "self_attn", None)
    takes = inspect.signature(decoder.forward).parameters
    return hasattr(attention, "o_proj") and "hidden_states" in takes


def _rope_frequencies(attention: Any) -> Tensor | None:
    """Radians per position of each rotated pair, read off the table at position 1.

    None where pairs are not turned by the same angle at every step: other styles than neox, and
    LongRoPE, which has a table for short texts and another for long ones.
    """
    rope: Any = getattr(attention, "rotary_emb", None)
    table = getattr(rope, "cos_sin_cache", None)
    if table is None or table.dim() != 2 or not getattr(rope, "is_neox_style", False):
        return None
    # The table that is served has the model's type: bfloat16 is off by up to 0.4 %, which positions
    # multiply. What scales cosine and sine alike, as YaRN does, leaves the angle as it is.
    exact = rope._compute_cos_sin_cache() if hasattr(rope, "_compute_cos_sin_cache") else table
    cos, sin = exact[1].double().cpu().chunk(2)
    return torch.atan2(sin, cos)


def _weight(linear: Any) -> Tensor:
    """[out, in]: what the layer does to each unit vector; a backend may have packed the weight.

    The bias is left out: it is the same whatever heads give.
    """
    # A quantised weight has a type of its own, in which no activations come.
    device = next(linear.parameters()).device
    eye = torch.eye(linear.input_size, dtype=linear.params_dtype, device=device)
    # Taken off again, a bias would leave its rounding behind.
    skipped, linear.skip_bias_add = linear.skip_bias_add, True
    try:
        out = linear(eye)
    finally:
        linear.skip_bias_add = skipped
    return (out[0] if isinstance(out, tuple) else out).float().T.contiguous()
