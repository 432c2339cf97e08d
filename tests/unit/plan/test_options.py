"""Options of compression from a dict."""

import argparse
import json
from dataclasses import fields

import pytest

from tangram.errors import ConfigurationError, ScorerError
from tangram.plan.options import (
    CompressionOptions,
    add_flags,
    compression_arguments,
    flag_names,
    option_names,
    options_from_flags,
)
from tangram.scorers import get_scorer


def options(scorer, parameters):
    given = {"compression_scorer": scorer, "compression_scorer_parameters": parameters}
    return CompressionOptions.from_mapping(given)


def test_the_known_options_are_told_in_order():
    with pytest.raises(ConfigurationError, match="unknown compression option ratio") as error:
        CompressionOptions.from_mapping({"ratio": 0.5})
    known = str(error.value).partition("known are ")[2].split(", ")
    assert known == sorted(known) and "compression_ratio" in known


def test_every_option_has_a_flag():
    assert option_names() == {field.name for field in fields(CompressionOptions)}


@pytest.mark.parametrize("given", [{"kernel_size": 7}, '{"kernel_size": 7}'])
def test_the_scorer_has_the_parameters_that_are_given(given):
    made = options("SnapKV", given)
    assert made.scorer == get_scorer("snap_kv", kernel_size=7)
    assert json.loads(json.dumps(made.to_mapping())) == made.to_mapping()
    assert CompressionOptions.from_mapping(made.to_mapping()) == made


@pytest.mark.parametrize("given", [None, {}, "{}"])
def test_without_parameters_the_scorer_has_its_own(given):
    assert options("snap_kv", given) == options("snap_kv", None)
    assert options("snap_kv", given).scorer == get_scorer("snap_kv")


@pytest.mark.parametrize("scorer", [None, "auto", "AUTO"])
def test_auto_takes_no_parameters_of_its_own(scorer):
    assert options(scorer, {}).is_auto and not options("key_diff", None).is_auto
    with pytest.raises(
        ConfigurationError,
        match="--compression-scorer-parameters is given.*--compression-scorer is auto.*name the",
    ):
        options(scorer, {"kernel_size": 7})


def test_options_may_be_hashed_while_no_parameters_are_given():
    assert hash(options("snap_kv", {})) == hash(options("snap_kv", None))


@pytest.mark.parametrize(
    ("scorer", "given", "said"),
    [
        ("snap_kv", {"kernel": 7}, "snap_kv has no parameter kernel: it takes kernel_size"),
        ("key_diff", {"kernel_size": 7}, "key_diff has no parameter kernel_size: it takes none"),
        ("snap_kv", {"name": "x"}, "snap_kv has no parameter name"),
        ("snap_kv", {"kernel_size": 4}, "kernel_size is 4, .*(snap_kv takes kernel_size)"),
        ("expected_attention", {"epsilon": "much"}, "takes n_future_tokens, epsilon"),
    ],
)
def test_a_bad_parameter_is_named_with_the_scorer(scorer, given, said):
    with pytest.raises(ScorerError, match=f"^--compression-scorer-parameters: .*{said}"):
        options(scorer, given)


@pytest.mark.parametrize(
    "given", ["kernel_size=7", "[7]", "7", 7, [7], {"epsilon": float("nan")}, {"epsilon": object()}]
)
def test_parameters_that_are_no_json_object_are_refused_with_an_example(given):
    with pytest.raises(ConfigurationError, match="-parameters is .*JSON object.*kernel_size"):
        options("snap_kv", given)


def test_parameters_survive_the_flags():
    asked = options("expected_attention", {"epsilon": 0.5, "n_future_tokens": 64})
    parser = argparse.ArgumentParser()
    add_flags(parser)
    given = options_from_flags(parser.parse_args(compression_arguments(asked)))
    again = CompressionOptions.from_mapping(given)
    assert again.compression_scorer_parameters == asked.compression_scorer_parameters
    assert again.scorer == asked.scorer
    assert not any("parameters" in word for word in compression_arguments(options("tova", {})))


@pytest.mark.usefixtures("my_scorers")
def test_a_scorer_of_another_package_has_parameters_too():
    assert options("value_norm", {"order": 1}).scorer.parameters() == {"order": 1}
    with pytest.raises(ScorerError, match="-parameters: value_norm: order is 0.5"):
        options("value_norm", {"order": 0.5})
    with pytest.raises(
        ScorerError, match=r"-parameters: .*not supported.*\(value_norm takes order"
    ):
        options("value_norm", {"order": "x"})


@pytest.mark.parametrize("is_on", [True, False])
def test_the_order_of_admission_survives_the_flags(is_on):
    asked = CompressionOptions(compression_admission=is_on)
    parser = argparse.ArgumentParser()
    add_flags(parser)
    given = options_from_flags(parser.parse_args(compression_arguments(asked)))
    assert CompressionOptions.from_mapping(given).compression_admission is is_on
    assert ("--no-compression-admission" in compression_arguments(asked)) is not is_on
    assert set(flag_names()) >= {"--compression-admission", "--no-compression-admission"}


def test_a_switch_is_refused_by_the_flag_that_was_given():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    with pytest.raises(ConfigurationError, match="^--no-compression-admission is given without"):
        options_from_flags(parser.parse_args(["--no-compression-admission"]))
    with pytest.raises(ConfigurationError, match="--compression-admission is 'no': give true"):
        CompressionOptions.from_mapping({"compression_admission": "no"})
