"""The keyword arguments of `tangram.LLM`."""

from dataclasses import fields
from inspect import signature

import pytest
import vllm

from tangram.engines.llm import LLM
from tangram.errors import ConfigurationError
from tangram.plan.options import CONFIG_KEY, CompressionOptions


def test_every_option_is_a_keyword():
    names = {field.name for field in fields(CompressionOptions)}
    assert names <= set(signature(LLM.__init__).parameters)


def test_what_is_given_goes_into_the_configuration(monkeypatch):
    seen = {}
    monkeypatch.setattr(vllm.LLM, "__init__", lambda self, model, **options: seen.update(options))
    monkeypatch.setattr(LLM, "_check_active", lambda self: None)
    given = {"compression_scorer": "snap_kv", "compression_scorer_parameters": {"kernel_size": 7}}
    LLM("m", **given)
    assert seen["additional_config"][CONFIG_KEY] == {**given, "enable_compression": True}


def test_parameters_of_the_scorer_without_compression_are_refused():
    with pytest.raises(ConfigurationError, match="compression_scorer_parameters is given"):
        LLM("m", enable_compression=False, compression_scorer_parameters={"kernel_size": 7})
