"""Automatic calibration: what it is given of the engine, and its log in a place known to all."""

import json
import os
from pathlib import Path

import pytest
from vllm.engine.arg_utils import EngineArgs

from tangram.bundled import recall_model_path
from tangram.errors import ConfigurationError
from tangram.plan.options import CompressionOptions
from tangram.vllm_plugin.frontend import auto_profile
from tangram.vllm_plugin.frontend.auto_profile import _arguments


@pytest.fixture(autouse=True)
def nothing_is_started(monkeypatch):
    def start(*arguments, **options):
        pytest.fail("a process was started")

    monkeypatch.setattr(auto_profile.subprocess, "Popen", start)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_the_place_of_the_log_is_not_followed(tmp_path, there):
    other = tmp_path / "other"
    if there:
        other.write_text("whole")
    (tmp_path / "p.log").symlink_to(other)
    with pytest.raises(ConfigurationError, match="p.log cannot be written.*remove it"):
        auto_profile._calibrate(tmp_path / "p.profile", [], "m")
    assert other.exists() == there and (not there or other.read_text() == "whole")


def test_a_pipe_in_the_place_of_the_log_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.log")
    with pytest.raises(ConfigurationError, match="p.log cannot be written"):
        auto_profile._calibrate(tmp_path / "p.profile", [], "m")


MODEL = str(recall_model_path())


@pytest.mark.parametrize(
    "engine",
    [
        {},
        {"disable_sliding_window": True},
        {"kv_cache_dtype": "bfloat16", "dtype": "bfloat16"},
        {"hf_overrides": {"sliding_window": None}},
    ],
)
def test_what_changes_the_model_is_forwarded(engine):
    args = EngineArgs(MODEL, max_model_len=512, **engine)
    args.tokenizer = MODEL  # as vLLM fills it in
    made = _arguments(Path("p.profile"), CompressionOptions(), args)
    assert made[0] == MODEL
    assert json.loads(made[made.index("--engine-args") + 1]) == engine
