"""Automatic calibration: what it is given of the engine, and its log in a place known to all."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from vllm.engine.arg_utils import EngineArgs

from tangram.bundled import recall_model_path
from tangram.errors import ConfigurationError
from tangram.plan.cached import profile_problem
from tangram.plan.options import CompressionOptions
from tangram.profile import ModelIdentity, Profile
from tangram.scorers import get_scorer
from tangram.vllm_plugin.frontend import auto_profile
from tangram.vllm_plugin.frontend.auto_profile import _arguments


@pytest.fixture(autouse=True)
def nothing_is_started(monkeypatch):
    def start(*arguments, **options):
        pytest.fail("a process was started")

    monkeypatch.setattr(subprocess, "Popen", start)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_the_place_of_the_log_is_not_followed(tmp_path, there):
    other = tmp_path / "other"
    if there:
        other.write_text("whole")
    (tmp_path / "p.log").symlink_to(other)
    with pytest.raises(ConfigurationError, match="p.log cannot be written.*remove it"):
        auto_profile._calibrate(tmp_path / "p.profile", [], "m", {})
    assert other.exists() == there and (not there or other.read_text() == "whole")


def test_a_pipe_in_the_place_of_the_log_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.log")
    with pytest.raises(ConfigurationError, match="p.log cannot be written"):
        auto_profile._calibrate(tmp_path / "p.profile", [], "m", {})


MODEL = str(recall_model_path())


@pytest.mark.parametrize(
    "engine",
    [
        {},
        {"disable_sliding_window": True},
        {"kv_cache_dtype": "bfloat16", "dtype": "bfloat16"},
        {"hf_overrides": {"sliding_window": None}},
        {"model_impl": "transformers"},
    ],
)
def test_what_changes_the_model_is_forwarded(engine):
    args = EngineArgs(MODEL, max_model_len=512, **engine)
    args.tokenizer = MODEL  # as vLLM fills it in
    made = _arguments(Path("p.profile"), CompressionOptions(), args)
    assert made[0] == MODEL
    assert json.loads(made[made.index("--engine-args") + 1]) == engine


def test_a_token_reaches_the_calibration_by_its_environment_alone(tmp_path):
    args = EngineArgs(MODEL, hf_token="hf_secret")
    assert auto_profile._secrets(args) == {"HF_TOKEN": "hf_secret"}
    made = _arguments(tmp_path / "p.profile", CompressionOptions(), args)
    assert not any("hf_secret" in argument for argument in made)
    assert auto_profile._secrets(EngineArgs(MODEL, hf_token=True)) == {}
    assert auto_profile._secrets(EngineArgs(MODEL)) == {}


def test_only_a_profile_of_this_model_and_scorer_is_taken_from_the_cache(tmp_path):
    path, options = tmp_path / "p.profile", CompressionOptions()
    model = ModelIdentity("M", 2, 2, 4, 16, 64, 100)
    profile = Profile(
        model=model, scorer_name="key_diff",
        chunk_size_tokens=256, window_size_tokens=32, n_sink_tokens=4,
    )  # fmt: skip
    profile.save(path)
    assert profile_problem(path, options, model) is None
    whole = path.read_bytes()
    for damaged, said in ((b"", "no readable profile"), (whole[:-9], "no readable profile")):
        path.write_bytes(damaged)
        assert said in profile_problem(path, options, model)
    of_queries = get_scorer("expected_attention").parameters()
    candidate = replace(profile, scorer_name="expected_attention", scorer_parameters=of_queries)
    candidate.save(path)
    assert profile_problem(path, options, model) is None
    named = CompressionOptions(compression_scorer="key_diff")
    assert "another scorer" in profile_problem(path, named, model)
    replace(candidate, scorer_parameters={**of_queries, "epsilon": 1.0}).save(path)
    assert "other parameters" in profile_problem(path, options, model)
    replace(profile, scorer_name="tova").save(path)
    assert "another scorer" in profile_problem(path, options, model)
    replace(profile, model=replace(model, num_layers=3)).save(path)
    assert "another model" in profile_problem(path, options, model)
    path.unlink()
    assert "no readable profile" in profile_problem(path, options, model)


def test_an_unusable_file_in_the_cache_is_calibrated_again(tmp_path, monkeypatch, caplog):
    """It stopped every start of the server."""
    path, model = tmp_path / "p.profile", ModelIdentity("M", 2, 2, 4, 16, 64, 100)
    path.write_bytes(b"")

    def calibrate(out, *_):
        Profile(
            model=model, scorer_name="key_diff",
            chunk_size_tokens=256, window_size_tokens=32, n_sink_tokens=4,
        ).save(out)  # fmt: skip

    monkeypatch.setattr(auto_profile, "cached_profile", lambda *_: path)
    monkeypatch.setattr(auto_profile, "_calibrate", calibrate)
    monkeypatch.setattr(auto_profile.logger, "propagate", True)
    options = CompressionOptions(compression_profile="auto")
    resolved = auto_profile.resolve_profile(options, EngineArgs(MODEL), model, 2)
    assert resolved.compression_profile == str(path)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert f"{path} is calibrated again, and replaced: " in warning
    monkeypatch.setattr(auto_profile, "_calibrate", lambda *_: pytest.fail("made again"))
    assert auto_profile.resolve_profile(options, EngineArgs(MODEL), model, 2) == resolved
