"""What cannot be served is refused before an engine starts, with the option and the remedy."""

import argparse
import inspect
import json
from pathlib import Path

import pytest

from tangram.errors import ConfigurationError, TangramError, UnsupportedError
from tangram.plan.compression_plan import plan_of
from tangram.plan.options import CONFIG_KEY
from tangram.scorers import get_scorer
from tangram.vllm_plugin import register
from tests.engine.harness import DEVICE, MODEL
from tests.engine.profiles import make_profile

QUANTISED_CACHE = dict(
    quant_method="compressed-tensors",
    format="float-quantized",
    config_groups={},
    kv_cache_scheme=dict(
        num_bits=8, type="float", strategy="tensor", dynamic=False, symmetric=True
    ),
)


@pytest.fixture
def warnings(monkeypatch):
    """What a configuration warns of."""
    from tangram.vllm_plugin.frontend import configure as module

    told = []
    monkeypatch.setattr(module.logger, "warning", lambda text, *args: told.append(text % args))
    return told


def configure(model=MODEL, *, compression=None, **arguments):
    """vLLM's configuration with compression on; no engine is started."""
    from vllm.engine.arg_utils import EngineArgs

    register()
    return EngineArgs(
        model=model,
        max_model_len=2048,
        additional_config={CONFIG_KEY: {"compression_profile": "none", **(compression or {})}},
        **{"dtype": "float32", **arguments},
    ).create_engine_config()


def write_config(folder: Path, **changes) -> str:
    """A model's folder without weights, differing from the recall model as told; `...` drops."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((Path(MODEL) / name).read_bytes())
    config = json.loads((Path(MODEL) / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    "option, value, words",
    [
        ("compression_ratio", 0, ["--compression-ratio", "above 0"]),
        ("compression_ratio", 1.01, ["--compression-ratio", "at most 1"]),
        ("compression_ratio", "half", ["--compression-ratio", "'half'"]),
        ("compression_ratio", float("nan"), ["--compression-ratio"]),
        ("compression_ratio", 0.01, ["--compression-ratio"]),
        ("compression_ratio", True, ["--compression-ratio", "True"]),
        ("enable_compression", "false", ["--enable-compression", "'false'"]),
        ("compression_profile", 5, ["--compression-profile is 5"]),
        ("page_group_size", 3, ["--page-group-size", "4 KV heads", "1, 2, 4"]),
        ("page_group_size", 0, ["--page-group-size"]),
        ("compression_chunk_size", 100, ["--compression-chunk-size", "multiple", "16"]),
        ("compression_chunk_size", 0, ["--compression-chunk-size"]),
        ("compression_chunk_size", 64.5, ["--compression-chunk-size", "whole number"]),
        ("compression_window_size", 256, ["--compression-window-size"]),
        ("compression_window_size", -1, ["--compression-window-size"]),
        ("compression_n_sink_tokens", -1, ["--compression-n-sink-tokens"]),
        ("compression_n_sink_tokens", 250, ["--compression-n-sink-tokens"]),
        ("compression_scorer", "h2o", ["--compression-scorer", "h2o", "key_diff", "snap_kv"]),
        ("compression_scorer", "expected_attention", ["--compression-profile"]),
        ("compression_level", "best", ["--compression-level", "best", "uniform", "mass"]),
        ("compression_level", "mass", ["--compression-level", "--compression-profile"]),
        ("compression_profile", "/nowhere/profile", ["/nowhere/profile"]),
        ("compression_ration", 0.3, ["compression_ration", "compression_ratio"]),
    ],
)
def test_bad_options(option, value, words):
    with pytest.raises(TangramError) as error:
        configure(compression={option: value})
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "changes, advised",
    [
        ({}, True),
        ({"compression_chunk_size": 512}, False),
        ({"compression_ratio": 0.25}, False),
        ({"compression_level": "uniform"}, False),
    ],
)
def test_a_larger_chunk_is_advised_where_budgets_are_mostly_their_floor(warnings, changes, advised):
    compression = {
        "compression_profile": str(Path(MODEL) / "key_diff.profile"),
        "compression_ratio": 0.1,
        "page_group_size": 1,
    }
    configure(compression=compression | changes)
    assert ("a --compression-chunk-size above 256" in "".join(warnings)) is advised


@pytest.mark.parametrize("size, warned", [(4, True), (2, False), (1, False), (None, False)])
def test_heads_that_cannot_have_budgets_of_their_own_are_told(warnings, size, warned):
    """The recall model has four KV heads."""
    profile = str(Path(MODEL) / "key_diff.profile")
    compression = {"compression_profile": profile, "compression_level": "error"}
    configure(compression=compression | {"page_group_size": size})
    assert ("all 4 KV heads of a layer share a budget" in "".join(warnings)) is warned


@pytest.mark.parametrize("chunk, warned", [(2048, True), (1024, False)])
def test_requests_too_short_for_a_chunk_are_told(warnings, chunk, warned):
    configure(compression={"compression_chunk_size": chunk})  # of at most 2,048 tokens
    assert ("nothing will be compressed" in "".join(warnings)) is warned


@pytest.mark.parametrize("given, kept", [(0, 4096), (512, 512), (None, None)])
def test_the_retention_interval_is_the_users_or_some_thousand_tokens(given, kept):
    config = configure(prefix_cache_retention_interval=given)
    assert config.cache_config.prefix_cache_retention_interval == kept


def test_a_retention_interval_of_no_whole_chunks():
    with pytest.raises(ConfigurationError, match="--prefix-cache-retention-interval 100") as error:
        configure(prefix_cache_retention_interval=100)
    assert "--compression-chunk-size 256" in str(error.value) and "4096" in str(error.value)


def test_a_window_of_none_and_a_scorer_that_looks_at_it():
    with pytest.raises(ConfigurationError, match="--compression-window-size"):
        configure(compression={"compression_scorer": "tova", "compression_window_size": 0})


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            dict(speculative_config={"method": "ngram", "num_speculative_tokens": 2,
                                     "prompt_lookup_max": 3}),
            ["speculative decoding", "--speculative-config"],
        ),
        (dict(tensor_parallel_size=2), ["--tensor-parallel-size 2", "--tensor-parallel-size 1"]),
        (dict(pipeline_parallel_size=2), ["--pipeline-parallel-size 2"]),
        (dict(decode_context_parallel_size=2), ["--decode-context-parallel-size 2"]),
        (dict(prefill_context_parallel_size=2), ["--prefill-context-parallel-size 2"]),
        (
            dict(kv_transfer_config={"kv_connector": "ExampleConnector", "kv_role": "kv_both"}),
            ["KV connectors", "--kv-transfer-config"],
        ),
        (dict(kv_events_config={"enable_kv_cache_events": True}), ["--kv-events-config"]),
        (dict(kv_offloading_size=1.0), ["offloading", "--kv-offloading-size"]),
        (dict(kv_cache_dtype="fp8"), ["quantised KV cache", "--kv-cache-dtype fp8"]),
        (dict(disable_hybrid_kv_cache_manager=True), ["--disable-hybrid-kv-cache-manager"]),
        (dict(kv_cache_dtype="bfloat16"), ["--kv-cache-dtype bfloat16", "a model in float32"]),
        (dict(enable_dbo=True), ["--enable-dbo"]),
        (dict(ubatch_size=2), ["--ubatch-size"]),
        (dict(block_size=64), ["--block-size 64"]),
        (dict(attention_backend="TRITON_ATTN"), ["--attention-backend"]),
        (
            dict(attention_config={"backend_per_kind": {"full_attention": "TRITON_ATTN"}}),
            ["backend_per_kind", "--attention-config"],
        ),
        (dict(worker_extension_cls="some.Extension"), ["--worker-extension-cls some.Extension"]),
        (dict(runner="pooling", convert="embed"), ["does not generate text"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_unsupported_combinations(arguments, words):
    with pytest.raises(UnsupportedError) as error:
        configure(**arguments)
    for word in words:
        assert word in str(error.value)


def test_batch_invariance_is_refused_before_an_engine_starts(monkeypatch):
    """It came up in the engine core, whose last line does not name the variable."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    configure()
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(UnsupportedError, match="VLLM_BATCH_INVARIANT.*: unset it"):
        configure()


@pytest.mark.parametrize(
    "changes, word",
    [
        (
            dict(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=512),
            "sliding-window",
        ),
        (
            dict(use_sliding_window=True, sliding_window=512, max_window_layers=3,
                 layer_types=["full_attention"] * 3 + ["sliding_attention"] * 3),
            "sliding-window",
        ),
        (
            dict(architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2",
                 kv_lora_rank=64, q_lora_rank=None, qk_nope_head_dim=32, qk_rope_head_dim=32,
                 v_head_dim=32, first_k_dense_replace=6),
            "MLA",
        ),
        (
            dict(architectures=["FalconMambaForCausalLM"], model_type="falcon_mamba",
                 state_size=16, conv_kernel=4, layer_types=...),
            "layers other than attention",
        ),
        (
            dict(architectures=["WhisperForConditionalGeneration"], model_type="whisper",
                 is_encoder_decoder=True, d_model=256, encoder_layers=2, decoder_layers=2,
                 encoder_attention_heads=4, decoder_attention_heads=4,
                 max_target_positions=4096),
            "encoder-decoder",
        ),
        (
            dict(quantization_config=QUANTISED_CACHE),
            "quantised KV cache.*--kv-cache-dtype",
        ),
    ],
    ids=["sliding", "some-sliding", "mla", "attention-free", "encoder-decoder",
         "quantised-cache"],
)  # fmt: skip
def test_models_that_cannot_be_served(changes, word, tmp_path):
    with pytest.raises(UnsupportedError, match=word):
        configure(write_config(tmp_path, **changes))


def test_a_checkpoint_with_scales_is_served_with_a_cache_that_does_without(tmp_path):
    model = write_config(tmp_path, quantization_config=QUANTISED_CACHE)
    config = configure(model, dtype="bfloat16", kv_cache_dtype="bfloat16")
    assert plan_of(config.additional_config).geometry.itemsize_bytes == 2


def test_layers_with_other_heads_than_the_config_says():
    from vllm.config import set_current_vllm_config

    from tangram.vllm_plugin.worker.backend import CompressedAttentionImpl

    with set_current_vllm_config(configure()), pytest.raises(UnsupportedError) as error:
        CompressedAttentionImpl(8, 64, 1.0, num_kv_heads=1)
    for word in ("(8, 1, 64)", "(8, 4, 64)", "config"):
        assert word in str(error.value)


def test_what_vllm_asks_of_any_backend_is_asked_of_ours(monkeypatch):
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    with set_current_vllm_config(configure()):
        assert get_attn_backend(64, torch.float32, "auto").get_name() == "CUSTOM"
        monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
        with pytest.raises(UnsupportedError, match="batch invariance"):
            get_attn_backend(64, torch.float32, "auto")
        monkeypatch.delenv("VLLM_BATCH_INVARIANT")
        with pytest.raises(UnsupportedError, match="kv_cache_dtype"):
            get_attn_backend(64, torch.float32, "fp8")


def test_a_model_whose_layers_choose_another_backend_is_not_served_uncompressed(monkeypatch):
    import vllm
    from vllm.model_executor.layers.attention import attention

    def stock(*args, **kwargs):
        config = vllm.config.get_current_vllm_config()
        with monkeypatch.context() as patch:
            patch.setattr(config.attention_config, "backend", None)
            return choose(*args, **kwargs)

    choose = attention.get_attn_backend
    monkeypatch.setattr(attention, "get_attn_backend", stock)
    with pytest.raises(UnsupportedError, match=r"choose their attention backend.*6 of them"):
        vllm.LLM(
            MODEL,
            additional_config={CONFIG_KEY: {"compression_profile": "none"}},
            enforce_eager=True,
            max_model_len=512,
            kv_cache_memory_bytes=32 << 20,
            **{"dtype": DEVICE.dtype, **DEVICE.options},
        )


def test_a_profile_of_another_model_is_refused(tmp_path):
    path = tmp_path / "profile.safetensors"
    (tmp_path / "model").mkdir()
    other = write_config(tmp_path / "model", num_hidden_layers=5)
    make_profile("key_diff", model=other).save(path)
    with pytest.raises(TangramError) as error:
        configure(compression={"compression_profile": str(path)})
    for word in ("5 layers", "6 layers", "--compression-profile"):
        assert word in str(error.value)


def test_a_profile_of_another_scorer_is_refused(tmp_path):
    path = tmp_path / "profile.safetensors"
    make_profile("snap_kv").save(path)
    with pytest.raises(TangramError) as error:
        configure(compression={"compression_profile": str(path), "compression_scorer": "key_diff"})
    for word in ("snap_kv", "key_diff"):
        assert word in str(error.value)


def test_a_file_that_is_no_profile_is_refused(tmp_path):
    path = tmp_path / "profile.safetensors"
    path.write_bytes(b"not a profile at all" * 10)
    with pytest.raises(TangramError, match=str(path)):
        configure(compression={"compression_profile": str(path)})


def test_without_a_profile_one_warning_says_that_budgets_are_uniform(monkeypatch):
    from tangram.vllm_plugin.frontend import configure as module

    warnings = []
    monkeypatch.setattr(module.logger, "warning", lambda text, *args: warnings.append(text))
    plan = plan_of(configure().additional_config)
    assert plan.level == "uniform"
    assert len(warnings) == 1
    assert "--compression-profile" in warnings[0] and "uniform budgets" in warnings[0]


def test_flags_of_compression_without_the_one_that_turns_it_on():
    with pytest.raises(ConfigurationError, match="--enable-compression"):
        parse("--compression-ratio", "0.5")


def parse_flags(*flags: str):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    register()
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return parser.parse_args(["--model", MODEL, *flags])


def parse(*flags: str):
    from vllm.engine.arg_utils import AsyncEngineArgs

    parsed = parse_flags(*flags)  # first: it loads the plugin, which replaces the method
    return AsyncEngineArgs.from_cli_args(parsed)


def test_several_api_servers_get_the_options_with_their_arguments():
    """They get parsed arguments, and make engine arguments of them with no plugin loaded.

    A frontend without the plan has no metrics of compression.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    parsed = parse_flags("--enable-compression", "--compression-ratio", "0.4")
    AsyncEngineArgs.from_cli_args(parsed)
    stock = inspect.unwrap(AsyncEngineArgs.from_cli_args.__func__)
    arguments = stock(AsyncEngineArgs, parsed)
    assert arguments.additional_config["tangram"]["compression_ratio"] == 0.4


def test_every_flag_reaches_the_plan():
    arguments = parse(
        "--enable-compression", "--compression-ratio", "0.4", "--page-group-size", "2",
        "--compression-chunk-size", "128", "--compression-window-size", "16",
        "--compression-n-sink-tokens", "2", "--compression-scorer", "SnapKV",
        "--compression-scorer-parameters", '{"kernel_size": 7}',
        "--compression-level", "uniform", "--compression-profile", "none",
        "--dtype", "float32", "--max-model-len", "1024",
    )  # fmt: skip
    plan = plan_of(arguments.create_engine_config().additional_config)
    geometry = plan.geometry
    assert plan.scorer == get_scorer("snap_kv", kernel_size=7)
    assert plan.scorer_name == "snap_kv" and plan.level == "uniform" and plan.profile_path is None
    assert geometry.page_group_size == 2
    assert geometry.chunk_size_tokens == 128
    assert geometry.window_size_tokens == 16
    assert geometry.n_sink_tokens == 2
    assert geometry.has_query_ring
    kept = geometry.rows_per_block / (geometry.num_layers * geometry.num_kv_heads * 128)
    assert kept == pytest.approx(0.4, abs=0.01)


def test_without_flags_the_arguments_are_untouched():
    arguments = parse("--dtype", "float32", "--max-model-len", "1024")
    assert arguments.additional_config == {}
    config = arguments.create_engine_config()
    assert config.additional_config == {} and config.attention_config.backend is None
    assert config.parallel_config.worker_extension_cls == ""


def test_the_plan_survives_json():
    config = configure(compression={"compression_ratio": 0.5})
    again = json.loads(json.dumps(config.additional_config))
    assert plan_of(again) == plan_of(config.additional_config)
    config.compute_hash()


def test_the_same_arguments_can_be_configured_twice():
    arguments = parse(
        "--enable-compression", "--compression-profile", "none",
        "--dtype", "float32", "--max-model-len", "1024",
    )  # fmt: skip
    first, second = (arguments.create_engine_config() for _ in range(2))
    assert plan_of(first.additional_config) == plan_of(second.additional_config)


def test_llm_refuses_options_that_it_was_told_not_to_use():
    import tangram

    with pytest.raises(ConfigurationError, match="enable_compression=False"):
        tangram.LLM(MODEL, enable_compression=False, compression_ratio=0.5)


@pytest.mark.parametrize("given", [None, True, "on", [0.3]], ids=repr)
def test_options_in_additional_config_that_are_no_object(given):
    from vllm.engine.arg_utils import EngineArgs

    register()
    arguments = EngineArgs(model=MODEL, dtype="float32", additional_config={CONFIG_KEY: given})
    with pytest.raises(ConfigurationError, match="--additional-config"):
        arguments.create_engine_config()


@pytest.mark.parametrize(
    "enable, given", [(False, {"compression_ratio": 0.5}), (True, {"enable_compression": False})]
)
def test_llm_refuses_an_additional_config_that_contradicts_it(enable, given):
    import tangram

    with pytest.raises(ConfigurationError, match="additional_config"):
        tangram.LLM(MODEL, enable_compression=enable, additional_config={CONFIG_KEY: given})


def test_adding_the_flags_twice_is_an_error_of_the_parser_and_not_silent():
    from tangram.plan.options import add_flags

    parser = argparse.ArgumentParser()
    add_flags(parser)
    with pytest.raises(argparse.ArgumentError):
        add_flags(parser)
