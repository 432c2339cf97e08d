"""Scores that are made with their tokens: gates beside the projections to Q, K and V.

A gate's scores are made where its layer's hidden states are, inside of what vLLM compiles, and wait
in one buffer for the layer's attention, which stores them with the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention

from tangram.errors import UnsupportedError
from tangram.plan.compression_plan import CompressionPlan
from tangram.scorers.gates import GateScorer, GateSizes
from tangram.vllm_plugin.worker.storage import SEALED_NAME, SealedCache

PROJECTIONS = ("qkv_proj", "query_key_value", "qkv", "wqkv", "Wqkv", "W_pack", "c_attn")
"""Names under which models of vLLM have what makes queries, keys and values of a hidden state."""

# That the op says to write the projection's result is what keeps its place: whatever reads queries,
# keys or values comes after it, in any graph that a compiler makes. The buffer it does not tell of,
# as vLLM's attention does not tell of the cache: a compiler would copy it.
_library = torch.library.Library("tangram", "FRAGMENT")
_library.define("keep_scores(Tensor(a!) projected, Tensor scores) -> ()")


def _keep_scores(projected: Tensor, scores: Tensor) -> None:
    sealed: SealedCache = get_forward_context().no_compile_layers[SEALED_NAME]
    assert sealed.step_scores is not None, "gates are attached before the first step"
    sealed.step_scores[: len(scores)].copy_(scores)


_library.impl("keep_scores", _keep_scores, "CompositeExplicitAutograd")
torch.library.register_fake("tangram::keep_scores", lambda projected, scores: None, lib=_library)


def load_gates(plan: CompressionPlan, dtype: torch.dtype, hidden_size: int) -> nn.ModuleList:
    """The gates of the plan's scorer, on the device where the model is being made.

    Raises:
        ScorerError: the file is gone, of another model, or not the one that the plan was made with.
    """
    scorer, g = plan.scorer, plan.geometry
    assert isinstance(scorer, GateScorer)
    if scorer.identity()["weights"] != plan.weights_digest:
        raise scorer.file_error("the file has changed since the engine was configured: start again")
    sizes = GateSizes(hidden_size, g.num_kv_heads)
    return scorer.gates(dtype, torch.get_default_device(), g.num_layers, sizes)


def attach_gates(model: nn.Module, sealed: SealedCache, max_step_tokens: int) -> None:
    """Have every step make the scores of its tokens; before the model runs or is compiled.

    Args:
        model: with its weights.
        sealed: has the gates, and gets the buffer.
        max_step_tokens: most tokens of a step.

    Raises:
        UnsupportedError: a layer whose projection cannot be found.
    """
    if sealed.gates is None or sealed.step_scores is not None:
        return
    device = next(sealed.gates.parameters()).device
    heads = sealed.geometry.num_kv_heads
    sealed.step_scores = torch.zeros(max_step_tokens, heads, dtype=torch.float32, device=device)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, Attention):
            continue
        ordinal = sealed.ordinal_of(layer.layer_name)
        if ordinal is not None:
            projecting = find_projection(model, name)
            projecting.tangram_gate = sealed.gates[ordinal]
            projecting.register_forward_hook(_make_scores, with_kwargs=True)


def find_projection(model: nn.Module, attention: str) -> nn.Module:
    """What makes queries, keys and values for an attention layer.

    Args:
        model: a model of vLLM's.
        attention: name of the layer's `Attention` in it.

    Raises:
        UnsupportedError: it is not found.
    """
    parent = model.get_submodule(attention.rpartition(".")[0])
    found = [child for name, child in parent.named_children() if name in PROJECTIONS]
    if len(found) != 1:
        children = ", ".join(name for name, _ in parent.named_children())
        raise UnsupportedError(
            f"KV cache compression does not support gates in {type(parent).__name__}, where one of "
            f"{', '.join(PROJECTIONS)} was expected and {children} found: choose a "
            "--compression-scorer that does not make scores of hidden states"
        )
    return found[0]


def _make_scores(
    module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> None:
    """Once a projection has run; part of what is compiled."""
    hidden = args[0] if args else next(iter(kwargs.values()))
    projected = output[0] if isinstance(output, tuple) else output
    torch.ops.tangram.keep_scores(projected, module.tangram_gate(hidden))
