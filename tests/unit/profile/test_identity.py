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


@pytest.mark.parametrize(
    "change",
    [
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
