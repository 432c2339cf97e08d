"""What automatic calibration is told of the engine that is to be served."""

import json
from pathlib import Path

import pytest
from vllm.engine.arg_utils import EngineArgs

from tangram.bundled import recall_model_path
from tangram.plan.options import CompressionOptions
from tangram.vllm_plugin.frontend.auto_profile import _arguments

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
