"""Where gates are put in a model, and where their scores go."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention

from tangram.errors import ScorerError, UnsupportedError
from tangram.plan.compression_plan import make_plan
from tangram.plan.options import CompressionOptions
from tangram.profile import ModelIdentity
from tangram.vllm_plugin.worker import gates
from tangram.vllm_plugin.worker.backend import CompressedAttentionBackend
from tangram.vllm_plugin.worker.storage import SEALED_NAME, SealedCache
from tests.gate_files import write_gates

IDENTITY = ModelIdentity("Sample", 3, 2, 4, 64, 24, 100)


@pytest.fixture
def plan(tmp_path):
    path = write_gates("kvzap", tmp_path / "gates.pt")
    given = {"compression_scorer": f"kvzap:{path}", "page_group_size": 1}
    return make_plan(CompressionOptions.from_mapping(given), IDENTITY, 4)


class Block(nn.Module):
    """Attention of a model as vLLM makes them."""

    def __init__(self, layer, *projections):
        super().__init__()
        for name in projections:
            setattr(self, name, nn.Linear(24, 32))
        self.o_proj = nn.Identity()
        self.attn = Attention.__new__(Attention)
        nn.Module.__init__(self.attn)
        self.attn.layer_name = f"model.layers.{layer}.self_attn.attn"


def make_model(*projections):
    model = nn.Module()
    model.layers = nn.ModuleList(Block(layer, *projections) for layer in range(3))
    return model


def sealed_of(plan):
    made = gates.load_gates(plan, torch.float32, 24)
    return SealedCache(plan, torch.float32, CompressedAttentionBackend, made)


@pytest.mark.parametrize("name", gates.PROJECTIONS)
def test_a_projection_makes_the_scores_of_its_layer(plan, name, monkeypatch):
    model, sealed = make_model(name), sealed_of(plan)
    gates.attach_gates(model, sealed, max_step_tokens=9)
    buffer = sealed.step_scores
    assert buffer.shape == (9, 2) and buffer.dtype == torch.float32
    context = SimpleNamespace(no_compile_layers={SEALED_NAME: sealed})
    monkeypatch.setattr(gates, "get_forward_context", lambda: context)
    for layer in range(3):
        hidden = torch.randn(5 + layer, 24)
        before = buffer.clone()
        getattr(model.layers[layer], name)(hidden)
        assert torch.equal(buffer[: len(hidden)], sealed.gates[layer](hidden))
        assert torch.equal(buffer[len(hidden) :], before[len(hidden) :])


def test_gates_are_put_in_once(plan, monkeypatch):
    model, sealed = make_model("qkv_proj"), sealed_of(plan)
    for _ in range(2):
        gates.attach_gates(model, sealed, max_step_tokens=9)
    assert all(len(block.qkv_proj._forward_hooks) == 1 for block in model.layers)


@pytest.mark.parametrize("projections", [(), ("q_proj", "kv"), ("qkv_proj", "c_attn")])
def test_a_model_whose_projection_is_not_found_is_refused(plan, projections):
    with pytest.raises(UnsupportedError, match=r"gates in Block, where one of qkv_proj, .*o_proj"):
        gates.attach_gates(make_model(*projections), sealed_of(plan), max_step_tokens=9)


def test_a_compiler_keeps_scores_before_what_reads_the_projection(plan, monkeypatch):
    """All of one graph, in which nothing else says that attention reads the buffer."""
    model, sealed = make_model("qkv_proj"), sealed_of(plan)
    gates.attach_gates(model, sealed, max_step_tokens=9)
    context = SimpleNamespace(no_compile_layers={SEALED_NAME: sealed})
    monkeypatch.setattr(gates, "get_forward_context", lambda: context)
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    def step(hidden):
        for block in model.layers:
            hidden = block.qkv_proj(hidden)[:, :24].sin()
        return hidden

    hidden = torch.randn(4, 24)
    with torch._dynamo.config.patch(disable=False):
        compiled = torch.compile(step, backend=backend, fullgraph=True)
        assert torch.equal(compiled(hidden), step(hidden))
    (targets,) = graphs
    seen = [target for target in targets if "keep_scores" in target or "sin" in target]
    assert len(seen) == 6 and ["keep_scores" in target for target in seen] == [True, False] * 3


def test_weights_that_changed_since_the_plan_are_refused(plan, tmp_path):
    write_gates("kvzap", tmp_path / "gates.pt", seed=3)
    with pytest.raises(ScorerError, match="the file has changed since"):
        gates.load_gates(plan, torch.float32, 24)
