import json

import pytest

from tangram.errors import ProfileError
from tangram.profile import ModelIdentity

FILE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "vocab_size": 151936,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 36,
    "torch_dtype": "bfloat16",
}
# The same model after a library has read it: defaults filled in, rotary settings gathered.
READ = {
    **{name: value for name, value in FILE.items() if not name.startswith("rope")},
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "layer_types": ["full_attention"] * 36,
    "attention_bias": False,
    "dtype": "float32",
    "_name_or_path": "/somewhere",
    "transformers_version": "5.0",
    "output_hidden_states": False,
}


def test_sizes_are_taken_from_the_config():
    identity = ModelIdentity.from_config(FILE)
    assert identity.architecture == "Qwen3ForCausalLM"
    assert (identity.num_layers, identity.num_kv_heads, identity.num_query_heads) == (36, 8, 32)
    assert (identity.head_size, identity.hidden_size, identity.vocab_size) == (128, 2560, 151936)
    assert "36 layers, 8 KV and 32 query heads of 128" in str(identity)


def test_absent_sizes_follow_from_the_others():
    config = {k: v for k, v in FILE.items() if k not in ("head_dim", "num_key_value_heads")}
    identity = ModelIdentity.from_config(config)
    assert (identity.num_kv_heads, identity.head_size) == (32, 80)


def test_a_nested_text_config_is_found():
    config = {"architectures": ["PictureModel"], "vision_config": {}, "text_config": READ}
    identity = ModelIdentity.from_config(config)
    assert identity.architecture == "PictureModel"
    assert identity.config_sha256 == ModelIdentity.from_config(FILE).config_sha256


def test_the_file_and_what_a_library_makes_of_it_are_the_same_network():
    assert ModelIdentity.from_config(FILE) == ModelIdentity.from_config(READ)


SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
SLIDING = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}
ROUTED = {"num_experts_per_tok": 2}
EXPERTS = {"num_experts": 8, "moe_intermediate_size": 64, **ROUTED}
MULTIPLIERS = {
    "attention_multiplier": 0.01,
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "file",
    [
        {"model_type": "llama", "rope_scaling": None},
        {
            "model_type": "llama",
            "rope_theta": 500000.0,
            "rope_scaling": LLAMA_3 | {"original_max_position_embeddings": 8192},
        },
        {"model_type": "mistral", "rope_theta": 1000000.0, "sliding_window": None},
        {"model_type": "phi3", "rope_theta": 250000, "rope_scaling": None, "sliding_window": None},
        {"model_type": "granite", "rope_theta": 1e7, **MULTIPLIERS},
        {"model_type": "qwen2", "rope_theta": 1000000.0, **SLIDING},
        {"model_type": "qwen3", "rope_theta": 1000000, "head_dim": 32, **SLIDING},
        {"model_type": "qwen3_moe", "rope_theta": 1e6, "decoder_sparse_step": 1, **EXPERTS},
        {
            "model_type": "mixtral",
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        {"model_type": "stablelm", "partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5},
    ],
    ids=lambda file: file["model_type"],
)
def test_a_file_and_what_transformers_makes_of_it_are_the_same_network(file, tmp_path):
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps(SIZES | file))
    read = AutoConfig.from_pretrained(tmp_path).to_dict()
    known, found = (ModelIdentity.from_config(config) for config in (SIZES | file, read))
    assert known.config_sha256 == found.config_sha256


@pytest.mark.parametrize(
    "change",
    [
        {"partial_rotary_factor": 0.5},
        {"num_experts": 8},
        {"rope_theta": 10000},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"intermediate_size": 1},
        {"hidden_act": "gelu"},
        {"tie_word_embeddings": True},
        {"use_sliding_window": True, "sliding_window": 128},
    ],
)
def test_another_network_has_another_digest(change):
    changed = ModelIdentity.from_config(FILE | change)
    assert ModelIdentity.from_config(FILE).differences(changed) == ["config_sha256"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": None}, "integer num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_layers must be >= 1"),
        ({"num_key_value_heads": 5}, "not a multiple of 5"),
    ],
)
def test_a_config_without_sizes_is_refused(change, message):
    with pytest.raises(ProfileError, match=message):
        ModelIdentity.from_config(FILE | change)
