"""What vLLM's own objects tell of a model agrees with what its config file does."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from vllm.config import KVEventsConfig, ParallelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import registry

from tangram.bundled import recall_model_path
from tangram.errors import UnsupportedError
from tangram.plan.model_facts import ModelFacts, served_config
from tangram.plan.model_shape import ModelShape
from tangram.plan.supported import MODEL_REASONS, WORKER_EXTENSION_PATH
from tangram.profile import ModelIdentity
from tangram.vllm_plugin.frontend.refusals import (
    facts_of,
    refuse_arguments,
    refuse_configuration,
    refuse_model,
    refuse_shape,
    shape_of,
)

SIZES = {
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 4096,
    "vocab_size": 1088,
}
FULL = ["full_attention"] * 4
HEADS = {"head_dim": 64}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes a folder with the config of a family, and vLLM's own configuration of it."""
    # vLLM looks at every architecture in a process of its own.
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda look: look())
    for cached in ("_load_modelinfo_from_cache", "_save_modelinfo_to_cache"):
        monkeypatch.setattr(registry._LazyRegisteredModel, cached, lambda *_: None)

    def make(family, architecture, changes, **engine):
        made = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
        config = made.to_dict() | {"architectures": [architecture], "dtype": "float32"}
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(recall_model_path() / name, tmp_path / name)
        (tmp_path / "config.json").write_text(json.dumps(config))
        return config, EngineArgs(str(tmp_path), **engine).create_model_config()

    return make


@pytest.mark.parametrize(
    ("family", "architecture", "changes"),
    [
        ("Llama", "LlamaForCausalLM", {}),
        ("Llama", "LlamaForCausalLM", HEADS),
        ("Mistral", "MistralForCausalLM", {"sliding_window": None}),
        ("Mixtral", "MixtralForCausalLM", {}),
        ("Phi3", "Phi3ForCausalLM", {"pad_token_id": 0}),
        ("Granite", "GraniteForCausalLM", {}),
        ("GraniteMoeHybrid", "GraniteMoeHybridForCausalLM", {"layer_types": FULL}),
        ("Qwen2", "Qwen2ForCausalLM", {}),
        ("Qwen3", "Qwen3ForCausalLM", HEADS),
        ("Qwen3Moe", "Qwen3MoeForCausalLM", HEADS),
        ("Gemma", "GemmaForCausalLM", HEADS),
        ("Cohere", "CohereForCausalLM", {}),
        ("Olmo2", "Olmo2ForCausalLM", {}),
        ("Starcoder2", "Starcoder2ForCausalLM", {}),
        ("StableLm", "StableLmForCausalLM", {}),
        ("SmolLM3", "SmolLM3ForCausalLM", {}),
        ("GPTNeoX", "GPTNeoXForCausalLM", {}),
        ("Glm4Moe", "Glm4MoeForCausalLM", HEADS),
    ],
)  # fmt: skip
def test_facts_and_shape_of_a_served_family_are_those_of_its_config(
    make, family, architecture, changes
):
    config, model = make(family, architecture, changes)
    told, known = ModelFacts.from_config(config), facts_of(model, {})
    assert told == known == ModelFacts()
    identity = ModelIdentity.from_config(config)
    shape = shape_of(model, ParallelConfig())
    assert shape == ModelShape.of(identity) and shape.num_layers == 4
    refuse_shape(shape, identity)


def reason(facts):
    return next((name for name, reason in MODEL_REASONS.items() if reason.found(facts)), None)


@pytest.mark.parametrize(
    ("family", "architecture", "changes", "expected"),
    [
        ("Mistral", "MistralForCausalLM", {"sliding_window": 512}, "sliding window"),
        ("Phi3", "Phi3ForCausalLM", {"sliding_window": 512, "pad_token_id": 0}, "sliding window"),
        ("Qwen2", "Qwen2ForCausalLM",
         {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 2},
         "local layers"),
        ("Gemma2", "Gemma2ForCausalLM", HEADS, "local layers"),
        ("GptOss", "GptOssForCausalLM", HEADS, "local layers"),
        ("Cohere2", "Cohere2ForCausalLM", {}, "local layers"),
        ("Olmo3", "Olmo3ForCausalLM", {}, "local layers"),
        ("Qwen3Next", "Qwen3NextForCausalLM", HEADS, "other layers"),
        ("FalconMamba", "FalconMambaForCausalLM", {}, "other layers"),
        ("DeepseekV3", "DeepseekV3ForCausalLM", {"num_key_value_heads": 8}, "MLA"),
        ("Bert", "BertModel", {}, "no text"),
        ("HrmText", "HrmTextForCausalLM", {}, "attends ahead"),
    ],
)  # fmt: skip
def test_what_is_refused_is_refused_for_the_same_reason(
    make, family, architecture, changes, expected
):
    config, model = make(family, architecture, changes)
    assert reason(ModelFacts.from_config(config)) == reason(facts_of(model, {})) == expected


def test_a_window_that_vllm_leaves_out_limits_its_requests_instead(make):
    engine = {"disable_sliding_window": True}
    config, model = make("Mistral", "MistralForCausalLM", {"sliding_window": 512}, **engine)
    assert model.max_model_len == 512
    assert facts_of(model, engine) == ModelFacts()
    config = served_config(config, engine)
    assert ModelFacts.from_config(config, engine) == ModelFacts()
    assert ModelIdentity.from_config(config) == ModelIdentity.from_config(model.hf_config.to_dict())


def test_numbers_that_differ_are_both_named():
    identity = ModelIdentity("M", 2, 8, 8, 64, 512, 100)
    with pytest.raises(UnsupportedError) as error:
        refuse_shape(ModelShape(2, 1, 8, 64), identity)
    for word in ("2 layers of 1 KV and 8 query heads of 64", "8 KV and", "--enable-compression"):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("scheme", "dtype", "said"),
    [
        ({"num_bits": 8}, "auto", "kv_cache_scheme of the checkpoint"),
        (None, "fp8_e4m3", "fp8_e4m3 by the checkpoint"),
        ({"num_bits": 8}, "bfloat16", None),
        (None, "auto", None),
    ],
)
def test_a_scheme_that_only_vllm_finds_is_refused(make, scheme, dtype, said):
    _, model = make("Llama", "LlamaForCausalLM", {})
    config = SimpleNamespace(
        model_config=model,
        cache_config=SimpleNamespace(cache_dtype=dtype),
        quant_config=SimpleNamespace(kv_cache_scheme=scheme),
    )
    if said is None:
        refuse_model(config)
        return
    with pytest.raises(UnsupportedError, match=f"quantised KV cache .{said}.: give --dtype"):
        refuse_model(config)


def test_arguments_are_asked_before_there_is_a_configuration():
    model = str(recall_model_path())
    refuse_arguments(EngineArgs(model, worker_extension_cls=WORKER_EXTENSION_PATH))
    refuse_arguments(EngineArgs(model, attention_config={"backend": "CUSTOM"}))
    with pytest.raises(UnsupportedError, match="--attention-config"):
        refuse_arguments(EngineArgs(model, attention_config={"backend": "TRITON_ATTN"}))
    with pytest.raises(UnsupportedError, match="--tensor-parallel-size 2 yet"):
        refuse_arguments(EngineArgs(model, tensor_parallel_size=2))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"speculative_config": object()}, "--speculative-config"),
        ({"cache_dtype": "float16"}, "--kv-cache-dtype float16 with a model in float32"),
        ({"disable_hybrid": True}, "hybrid KV cache manager"),
        ({"kv_events": KVEventsConfig()}, None),
        ({"kv_events": KVEventsConfig(enable_kv_cache_events=True)}, "--kv-events-config"),
    ],
)
def test_what_the_finished_configuration_shows(changes, said):
    config = SimpleNamespace(
        speculative_config=changes.get("speculative_config"),
        kv_transfer_config=None,
        kv_events_config=changes.get("kv_events"),
        cache_config=SimpleNamespace(cache_dtype=changes.get("cache_dtype", "auto")),
        model_config=SimpleNamespace(dtype=torch.float32),
        scheduler_config=SimpleNamespace(
            disable_hybrid_kv_cache_manager=changes.get("disable_hybrid", False)
        ),
    )
    if said is None:
        refuse_configuration(config)
        return
    with pytest.raises(UnsupportedError, match=said):
        refuse_configuration(config)
