"""What is refused, or warned of, by what only the made model or configuration shows."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode

from tangram.errors import UnsupportedError
from tangram.geometry import LayerMap
from tangram.vllm_plugin.core.specs import RecentSpec, SealedSpec
from tangram.vllm_plugin.frontend import configure
from tangram.vllm_plugin.worker.refusals import refuse_spec, refuse_uncompressed
from tests.kernels.inputs import make_geometry

GEOMETRY = make_geometry([[2, 2]] * 3)
RECENT, SEALED = (spec.of(GEOMETRY.block_shape, torch.float16) for spec in (RecentSpec, SealedSpec))


def specs(layers):
    return {"sealed": SEALED, **{f"model.layers.{n}.attn": RECENT for n in layers}}


def test_a_model_of_the_layers_that_are_planned_is_served():
    refuse_uncompressed(specs([0, 1, 2]), LayerMap.every(3))
    refuse_uncompressed(specs([1, 3]), LayerMap((1, 3)))


@pytest.mark.parametrize("layers", [[0, 1], [0, 2], [1, 2, 3]])
def test_layers_without_attention_are_refused(layers):
    with pytest.raises(UnsupportedError, match=f"only {len(layers)} of 3 layers have attention"):
        refuse_uncompressed(specs(layers), LayerMap.every(3))


def test_layers_with_a_cache_of_their_own_are_refused():
    own = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float16)
    with pytest.raises(UnsupportedError, match="choose their attention backend themselves"):
        refuse_uncompressed({**specs([0, 1]), "model.layers.2.attn": own}, LayerMap.every(3))


def full_attention(**changes):
    """What a layer asks vLLM for."""
    sizes = dict(num_kv_heads=RECENT.num_kv_heads, head_size=RECENT.head_size)
    return FullAttentionSpec(**{**sizes, "block_size": 16, "dtype": RECENT.dtype, **changes})


@pytest.mark.parametrize("changes", [{}, {"block_size": 64}, {"max_tp_shards": 1}])
def test_full_attention_as_it_is_understood_is_served(changes):
    refuse_spec(full_attention(**changes), RECENT)


@pytest.mark.parametrize(
    "field, value",
    [
        ("non_causal", True),
        ("sliding_window", 512),
        ("attention_chunk_size", 512),
        ("head_size_v", RECENT.head_size // 2),
        ("head_size", RECENT.head_size * 2),
        ("num_kv_heads", RECENT.num_kv_heads + 1),
        ("dtype", torch.float32),
        ("kv_quant_mode", KVQuantMode.FP8_PER_TENSOR),
        ("page_size_padded", 1 << 20),
        ("tokens_per_state", 4),
    ],
)
def test_layers_that_ask_for_another_attention_are_refused(field, value):
    if field == "head_size":
        spec = full_attention(head_size=value, head_size_v=RECENT.head_size)
    else:
        spec = full_attention(**{field: value})
    with pytest.raises(UnsupportedError, match=f"has {field} .*: serve the model without --enable"):
        refuse_spec(spec, RECENT)


def test_a_field_that_a_later_vllm_adds_is_refused_unless_it_is_at_its_default():
    @dataclass(frozen=True, kw_only=True)
    class Later(FullAttentionSpec):
        attends_to_every_other: bool = False

    same = vars(full_attention())
    refuse_spec(Later(**same), RECENT)
    with pytest.raises(UnsupportedError, match="attends_to_every_other True"):
        refuse_spec(Later(**same, attends_to_every_other=True), RECENT)


@pytest.mark.parametrize(
    "requests, captured, block_mib, warned",
    [(1024, 512, 80, True), (1024, 512, 20, False), (64, 512, 80, False), (1024, None, 80, False)],
)
def test_blocks_held_to_measure_graphs_are_told(requests, captured, block_mib, warned, monkeypatch):
    told = []
    monkeypatch.setattr(configure.logger, "warning", lambda text, *of: told.append(text % of))
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=captured),
        scheduler_config=SimpleNamespace(max_num_seqs=requests),
    )
    configure._warn_of_profiling(config, SimpleNamespace(block_bytes=block_mib << 20))
    assert bool(told) == warned
    if warned:
        assert "512 blocks of 80 MiB" in told[0] and "40.0 GiB" in told[0]
        assert "--max-cudagraph-capture-size" in told[0]
