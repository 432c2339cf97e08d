"""A model of which layers 1 and 3 of four are compressed: budgets count the compressed alone."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.forward_context import ForwardContext

from tangram.plan.compression_plan import CompressionPlan, make_plan
from tangram.plan.options import CompressionOptions
from tangram.profile import ModelIdentity
from tangram.vllm_plugin.worker import backend, storage
from tangram.vllm_plugin.worker.backend import (
    CompressedAttentionBackend,
    CompressedAttentionImpl,
    CompressedMetadata,
)
from tangram.vllm_plugin.worker.storage import RING_NAME, SEALED_NAME, QueryRing, SealedCache

LAYERS = (1, 3)
NAMES = [f"model.layers.{layer}.self_attn.attn" for layer in range(4)]


@pytest.fixture
def plan():
    model = ModelIdentity("Sample", len(LAYERS), 4, 8, 64, 512, 100)
    options = CompressionOptions(compression_scorer="snap_kv", compression_ratio=0.25)
    return replace(make_plan(options, model, 2), layers=LAYERS)


@pytest.fixture
def sealed(plan):
    return SealedCache(plan, torch.float16, CompressedAttentionBackend)


def test_a_plan_keeps_its_layers_on_the_way_to_other_processes(plan):
    assert CompressionPlan.from_json(plan.to_json()) == plan
    assert plan.layer_map.compressed == LAYERS
    of_before = {name: value for name, value in plan.to_json().items() if name != "layers"}
    assert CompressionPlan.from_json(of_before).layer_map.compressed == (0, 1)


def test_layers_are_known_by_ordinals(sealed):
    assert [sealed.ordinal_of(name) for name in NAMES] == [None, 0, None, 1]


def test_kernels_are_given_the_caches_of_the_compressed_layers_in_order(sealed, plan, monkeypatch):
    layers = {name: SimpleNamespace(kv_cache=name) for name in reversed(NAMES)}
    monkeypatch.setattr(storage, "get_layers_from_vllm_config", lambda config, kind: layers)
    monkeypatch.setattr(storage, "find_flash_attention", lambda *args: None)
    given = {}

    class Kernels:
        is_device = True

        def __init__(self, geometry, scorer, device, sizes, recent_caches, **options):
            given.update(geometry=geometry, scorer=scorer, caches=recent_caches())

    monkeypatch.setattr(storage, "DeviceKernels", Kernels)
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=1000),
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=[1]),
        attention_config=SimpleNamespace(flash_attn_version=None),
        parallel_config=SimpleNamespace(data_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=100, max_num_seqs=4),
    )
    sealed.prepare_device(torch.device("cuda"), config)
    assert given["caches"] == [NAMES[1], NAMES[3]]
    assert given["geometry"] == plan.geometry and given["geometry"].num_layers == 2


def test_a_step_runs_a_layer_under_its_ordinal(sealed, plan, monkeypatch):
    """And sees its own raw tokens, beside what all layers of the step have in common."""
    g, steps = plan.geometry, []
    sealed.runner = SimpleNamespace(run=steps.append, forget_caches=lambda: None)
    sealed.kv_cache = torch.zeros(5, 1, g.rows_per_block, g.row_elements)
    ring = QueryRing(plan, torch.float16, CompressedAttentionBackend)
    ring.kv_cache = torch.zeros(5, 1, g.ring_block_tokens, g.query_bytes // 2)
    metadata = CompressedMetadata(
        block_table=torch.ones(1, 2),
        slot_mapping=torch.zeros(1),
        num_tokens=1,
        query_start=torch.arange(2),
        seq_lens=torch.ones(1),
        host=None,
        is_decode=True,
    )
    tables = {name: SimpleNamespace(block_table=name) for name in (SEALED_NAME, RING_NAME)}
    context = ForwardContext(
        no_compile_layers={SEALED_NAME: sealed, RING_NAME: ring},
        attn_metadata={NAMES[1]: metadata, NAMES[3]: metadata, **tables},
        slot_mapping={},
    )
    monkeypatch.setattr(backend, "get_forward_context", lambda: context)
    layer = object.__new__(CompressedAttentionImpl)
    layer.scale = 0.125
    states, caches = torch.zeros(3, 8, 64), {name: torch.full((2,), 7.0) for name in NAMES}
    for name in (NAMES[1], NAMES[3]):
        layer.forward(
            SimpleNamespace(layer_name=name), states, states, states, caches[name], metadata, states
        )
    assert [step.layer for step in steps] == [0, 1]
    assert [step.view.recent is caches[n] for step, n in zip(steps, NAMES[1::2], strict=True)]
    assert steps[0].view.sealed is steps[1].view.sealed
    assert steps[1].view.sealed_table == SEALED_NAME and steps[1].view.ring_table == RING_NAME
    assert steps[1].view.ring.shape[2] == len(LAYERS)
    with pytest.raises(AssertionError, match=r"layers\.2.* is not to be compressed"):
        layer.forward(
            SimpleNamespace(layer_name=NAMES[2]), states, states, states, None, metadata, states
        )


def test_calibration_looks_into_the_chosen_layers_alone(monkeypatch):
    from torch import nn
    from vllm.model_executor.layers.attention import Attention

    from tangram.engines import capturing
    from tangram.geometry import LayerMap

    class Layer(nn.Module):
        def __init__(self, index):
            super().__init__()
            self.index = index
            self.self_attn = nn.Module()
            self.self_attn.o_proj = nn.Identity()
            self.self_attn.attn = Attention.__new__(Attention)
            nn.Module.__init__(self.self_attn.attn)

        def forward(self, hidden_states):
            return hidden_states

    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([Layer(index) for index in range(4)])
    llm = SimpleNamespace(apply_model=lambda look: [look(model)])
    monkeypatch.setattr(capturing, "LLM", lambda *args, **options: llm)
    engine = capturing.FullKVEngine("model", 10, layers=LayerMap(LAYERS))
    assert [decoder.index for decoder in engine._decoders] == [1, 3]
    found = [engine._attention[ordinal] for ordinal in range(2)]
    assert found == [model.model.layers[layer].self_attn.attn for layer in LAYERS]
    assert len(capturing.FullKVEngine("model", 10)._decoders) == 4


def test_chunks_are_sealed_after_the_last_compressed_layer(sealed, plan, monkeypatch):
    """One launch for all layers, once the last ordinal has attended."""
    from tangram.vllm_plugin.worker.runners.device import DeviceKernels

    kernels = object.__new__(DeviceKernels)
    kernels.geometry, kernels._all_layers = plan.geometry, "all layers"
    done = []
    monkeypatch.setattr(kernels, "_attend_decodes", lambda step, count: done.append(step.layer))
    monkeypatch.setattr(kernels, "_seal", lambda step, tables, query: done.append(tables))
    for name in (NAMES[1], NAMES[3]):
        step = SimpleNamespace(
            layer=sealed.ordinal_of(name), query=np.zeros(2), store_queries=lambda: None
        )
        kernels._run_decode(step)
    assert done == [0, 1, "all layers"]
