"""The plugin in a vLLM that has changed under it: harmless until somebody asks for compression."""

import argparse
import inspect
from types import SimpleNamespace

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tangram.bundled import recall_model_path
from tangram.plan.options import CONFIG_KEY
from tangram.vllm_plugin import register
from tangram.vllm_plugin.frontend import overrides


def test_a_vllm_that_has_changed_is_left_alone_until_compression_is_asked_for(monkeypatch):
    stock_flags = inspect.unwrap(EngineArgs.add_cli_args)
    monkeypatch.setattr(EngineArgs, "add_cli_args", staticmethod(stock_flags))
    changed = classmethod(lambda cls, namespace: None)
    monkeypatch.setattr(EngineArgs, "from_cli_args", changed)
    warnings = []
    monkeypatch.setattr(overrides.logger, "warning", lambda text, *args: warnings.append(args))

    register()

    assert len(warnings) == 1 and "EngineArgs.from_cli_args" in str(warnings[0][0])
    assert EngineArgs.add_cli_args is stock_flags
    with pytest.raises(SystemExit):
        EngineArgs.add_cli_args(argparse.ArgumentParser()).parse_args(["--enable-compression"])
    asked = EngineArgs(model=str(recall_model_path()), additional_config={CONFIG_KEY: {}})
    with pytest.raises(RuntimeError, match=r"from_cli_args.*Install vLLM 0\.32"):
        asked.create_engine_config()


def test_options_beside_their_place_in_additional_config_are_told(monkeypatch):
    register()
    warnings = []
    monkeypatch.setattr(overrides.logger, "warning", lambda text, *args: warnings.append(args))
    of_others = SimpleNamespace(compute_hash=lambda: "")
    for given in ({"compression_ratio": 0.3, "other": 1}, {"other": 1}, {}, of_others):
        EngineArgs(model=str(recall_model_path()), additional_config=given).create_engine_config()
    assert warnings == [("compression_ratio", CONFIG_KEY)]


def test_flags_are_not_abbreviated_and_leave_abbreviations_of_others_alone(capsys):
    register()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    given = ["--comp", '{"mode": 0}', "--compression-ratio=0.5", "--page_group_size", "2"]
    args = parser.parse_args([*given, "--enable-compression"])
    assert args.compilation_config.mode == 0
    assert (args.compression_ratio, args.page_group_size) == (0.5, 2)
    with pytest.raises(SystemExit):
        parser.parse_args(["--compression-rat", "0.5"])
    assert "unrecognized arguments: --compression-rat" in capsys.readouterr().err
