"""The one list of what is served: models by their configs, and arguments of the engine."""

import pytest
import transformers

from tangram.errors import UnsupportedError
from tangram.plan.model_facts import ModelFacts, served_config
from tangram.plan.supported import (
    MODEL_REASONS,
    OPTION_REASONS,
    WORKER_EXTENSION_PATH,
    refuse_model,
    refuse_options,
)
from tests.unit.cli.conftest import LLAMA

FULL = ["full_attention"]
OTHERS = "layers other than attention over all tokens"
LOCAL = r"sliding-window or local attention layers \("
WINDOW = r"sliding-window layers \(sliding_window"


def served(config, engine=None):
    config = served_config(config, engine or {})
    refuse_model("some/model", ModelFacts.from_config(config, engine or {}))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {}),
        ("Mistral", {"sliding_window": None}),
        ("Ministral3", {}),
        ("Mixtral", {}),
        ("Phi3", {}),
        ("Granite", {}),
        ("GraniteMoe", {}),
        ("GraniteMoeHybrid", {"layer_types": FULL * 32}),
        ("Qwen2", {}),
        ("Qwen2", {"sliding_window": 4096, "use_sliding_window": False}),
        ("Qwen2Moe", {}),
        ("Qwen2_5_VL", {}),
        ("Qwen3", {}),
        ("Qwen3Moe", {}),
        ("Qwen3VL", {}),
        ("Gemma", {}),
        ("Cohere", {}),
        ("Olmo2", {}),
        ("MiniMaxM2", {}),
        ("Starcoder2", {}),
        ("StableLm", {}),
        ("SmolLM3", {}),  # some of its layers have no RoPE, and attend to everything
        ("GPTNeoX", {}),  # whose config says that it is no decoder
        ("Glm4Moe", {}),
        ("SeedOss", {}),
        ("Apertus", {}),
    ],
)
def test_families_of_full_attention_are_served(family, changes):
    served(getattr(transformers, f"{family}Config")(**changes).to_dict())


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("Mistral", {}, WINDOW),
        ("Phi3", {"sliding_window": 2047}, WINDOW),
        ("Starcoder2", {"sliding_window": 4096}, WINDOW),
        ("Dots1", {}, WINDOW),
        ("Ministral", {}, LOCAL),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 4096}, LOCAL),
        ("Gemma2", {}, LOCAL),
        ("Gemma3Text", {}, LOCAL),
        ("Gemma3", {}, LOCAL),
        ("Gemma4Text", {}, LOCAL),
        ("GptOss", {}, LOCAL),
        ("Llama4", {}, rf"{LOCAL}chunked_attention, attention_chunk_size 8192"),
        ("Cohere2", {}, LOCAL),
        ("Olmo3", {}, LOCAL),
        ("Exaone4", {}, LOCAL),
        ("Afmoe", {}, LOCAL),
        ("Gemma3nText", {}, "shares KV between layers"),
        ("Qwen3Next", {}, rf"{OTHERS} \(linear_attention\)"),
        ("Qwen3_5", {}, OTHERS),
        ("Lfm2", {"full_attn_idxs": [2, 5]}, rf"{OTHERS} \(conv\)"),
        ("MiniMax", {}, OTHERS),
        ("OlmoHybrid", {}, OTHERS),
        ("GraniteMoeHybrid", {}, OTHERS),
        ("Jamba", {}, OTHERS),
        ("NemotronH", {}, OTHERS),
        ("Bamba", {}, OTHERS),
        ("FalconH1", {}, OTHERS),
        ("Zamba2", {}, OTHERS),
        ("RecurrentGemma", {}, OTHERS),
        ("Mamba", {}, OTHERS),
        ("Mamba2", {}, OTHERS),
        ("FalconMamba", {}, OTHERS),
        ("DeepseekV2", {}, "uses MLA"),
        ("DeepseekV3", {}, "uses MLA"),
        ("LongcatFlash", {}, "uses MLA"),
        ("Bert", {}, "does not generate text"),
        ("ModernBert", {}, "does not generate text"),
        ("XLMRoberta", {}, "does not generate text"),
        ("Electra", {}, "does not generate text"),
        ("Llama", {"architectures": ["LlamaForSequenceClassification"]}, "does not generate text"),
        ("T5", {}, "encoder-decoder"),
        ("Bart", {}, "encoder-decoder"),
        ("Whisper", {}, "encoder-decoder"),
        ("HrmText", {}, r"attends to later tokens too \(prefix_lm\)"),
        ("Gemma3Text", {"use_bidirectional_attention": True}, "later tokens too"),
        ("Mpt", {}, r"attention's logits \(alibi\)"),
        ("Falcon", {"alibi": True}, "alibi"),
    ],
)  # fmt: skip
def test_families_that_are_not_served_are_refused(family, changes, reason):
    config = getattr(transformers, f"{family}Config")(**changes).to_dict()
    with pytest.raises(UnsupportedError, match=f"'some/model', which .*{reason}.*: (use|give) "):
        served(config)


FP8 = {"num_bits": 8, "type": "float", "dynamic": False}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        # A file leaves out what a library adds, layer_types among it.
        ({"model_type": "qwen3_next", "full_attention_interval": 4}, r"full_attention_interval 4"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*"}, "hybrid_override"),
        ({"model_type": "lfm2", "conv_L_cache": 3, "full_attn_idxs": [2]}, "conv_L_cache"),
        ({"attn_type_list": [0, 0, 1]}, "attn_type_list"),
        ({"layers_block_type": ["attention", "mamba"]}, "layers_block_type"),
        ({"layer_types": ["indexed_attention"] * 2}, "indexed_attention"),
        ({"model_type": "gemma3_text", "sliding_window": 512, "sliding_window_pattern": 6},
         f"{LOCAL}sliding_window_pattern 6"),
        ({"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 28},
         f"{LOCAL}max_window_layers 28 of 32"),
        ({"model_type": "gemma2", "sliding_window": 4096, "attn_logit_softcapping": 50.0},
         "attn_logit_softcapping 50"),
        ({"rswa_window": 128}, f"{LOCAL}rswa_window 128"),
        ({"is_causal": False}, "later tokens too"),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "does not generate"),
        ({"architectures": ["BertModel"], "model_type": "bert"}, "does not generate"),
        ({"architectures": ["Qwen2ForRewardModeling"]}, "does not generate"),
        ({"text_config": {"num_kv_shared_layers": 2}}, "shares KV"),
        ({"text_config": {"is_encoder_decoder": True}}, "encoder-decoder"),
        ({"quantization_config": {"kv_cache_scheme": FP8}}, "quantised KV cache.*--kv-cache-dtype"),
        ({"quantization_config": {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}},
         "quantised KV cache"),
        ({"text_config": {"quantization_config": {"quantization": {"kv_cache_quant_algo": "FP8"}}}},
         "quantised KV cache"),
    ],
)  # fmt: skip
def test_a_config_file_tells_what_is_not_served(changes, reason):
    with pytest.raises(UnsupportedError, match=reason):
        served(LLAMA | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"architectures": ["OurOwnForCausalLM"], "model_type": "ours", "ours": {"layers": 1}},
        {"architectures": None, "model_type": None},
        {"architectures": ["SomethingModel"]},
        {"sliding_window": 0},
        {"layers_block_type": ["attention"] * 32, "attn_type_list": [1, 1]},
        {"full_attention_interval": 1},
        {"layer_types": ["attention"] * 32, "mamba_d_state": 256},
        {"attn_logit_softcapping": None, "use_bidirectional_attention": False},
        {"quantization_config": {"quant_method": "awq", "kv_cache_scheme": None}},
    ],
)
def test_what_is_not_certain_is_left_to_the_engine(changes):
    served(LLAMA | changes)


@pytest.mark.parametrize(
    ("changes", "engine"),
    [
        ({"sliding_window": 512}, {"disable_sliding_window": True}),
        ({"text_config": {"sliding_window": 512}}, {"disable_sliding_window": True}),
        ({"sliding_window": 512}, {"hf_overrides": {"sliding_window": None}}),
        ({"quantization_config": {"kv_cache_scheme": FP8}}, {"kv_cache_dtype": "bfloat16"}),
    ],
)
def test_the_remedy_that_is_offered_works(changes, engine):
    with pytest.raises(UnsupportedError, match="--disable-sliding-window|--kv-cache-dtype"):
        served(LLAMA | changes)
    served(LLAMA | changes, engine)


def test_where_some_layers_slide_the_option_that_cannot_help_is_not_offered():
    config = LLAMA | {"sliding_window": 512, "layer_types": ["sliding_attention", *FULL] * 16}
    for engine in ({}, {"disable_sliding_window": True}):
        with pytest.raises(UnsupportedError, match=LOCAL) as error:
            served(config, engine)
        assert "--disable-sliding-window" not in str(error.value)


@pytest.mark.parametrize("engine", [{"runner": "pooling"}, {"convert": "embed"}])
def test_an_engine_that_does_not_generate_is_refused(engine):
    with pytest.raises(UnsupportedError, match="does not generate text.*--runner and --convert"):
        served(LLAMA, engine)
    served(LLAMA, {"runner": "generate", "convert": "none"})


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("speculative decoding", {"speculative_config": {"method": "ngram"}},
         "--speculative-config"),
        ("speculative decoding", {"spec_method": "ngram"}, "--spec-method"),
        ("tensor parallelism", {"tensor_parallel_size": 2}, "--tensor-parallel-size 2 yet"),
        ("pipeline parallelism", {"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2 yet"),
        ("decode context parallelism", {"decode_context_parallel_size": 4},
         "--decode-context-parallel-size 4"),
        ("prefill context parallelism", {"prefill_context_parallel_size": 4},
         "--prefill-context-parallel-size 4"),
        ("KV connectors", {"kv_transfer_config": {"kv_role": "kv_both"}}, "--kv-transfer-config"),
        ("KV connectors", {"kv_offloading_size": 1.0}, "--kv-offloading-size"),
        ("KV events", {"kv_events_config": {"enable_kv_cache_events": True}},
         "--kv-events-config"),
        ("quantised cache", {"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ("two types", {"kv_cache_dtype": "bfloat16", "dtype": "float16"},
         "--kv-cache-dtype bfloat16 with a model in float16"),
        ("microbatches", {"enable_dbo": True}, "--enable-dbo"),
        ("microbatches", {"ubatch_size": 2}, "--ubatch-size"),
        ("no hybrid manager", {"disable_hybrid_kv_cache_manager": True},
         "--disable-hybrid-kv-cache-manager"),
        ("block size", {"block_size": 64}, "--block-size 64"),
        ("attention backend", {"attention_backend": "FLASH_ATTN"}, "--attention-backend"),
        ("attention backend", {"attention_config": {"backend": "FLASH_ATTN"}},
         "--attention-config"),
        ("attention backend", {"attention_config": {"backend_per_kind": {"a": "b"}}},
         "backend_per_kind"),
        ("worker extension", {"worker_extension_cls": "some.Extension"},
         "--worker-extension-cls some.Extension"),
    ],
)  # fmt: skip
def test_an_option_that_is_not_served_is_named_with_the_remedy(name, given, said):
    assert OPTION_REASONS[name].found(given)
    with pytest.raises(UnsupportedError, match=f"{said}.*: (use|leave) "):
        refuse_options(given)
    with pytest.raises(UnsupportedError, match="in --engine-args: (use|leave) "):
        refuse_options(given, "--engine-args")


def test_batch_invariance_is_told_by_its_variable(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    refuse_options({})
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(UnsupportedError, match="VLLM_BATCH_INVARIANT.*: unset it"):
        refuse_options({})


def test_options_at_their_defaults_or_of_no_matter_are_served():
    refuse_options(
        {
            "tensor_parallel_size": 1,
            "pipeline_parallel_size": None,
            "kv_cache_dtype": "bfloat16",
            "dtype": "auto",
            "attention_config": {"backend": "CUSTOM", "flash_attn_version": 3},
            "kv_events_config": {"enable_kv_cache_events": False, "publisher": "null"},
            "worker_extension_cls": WORKER_EXTENSION_PATH,
            "ubatch_size": 0,
            "seed": 5,
        }
    )


def test_facts_of_a_served_model_give_no_reason():
    assert [name for name, reason in MODEL_REASONS.items() if reason.found(ModelFacts())] == []
