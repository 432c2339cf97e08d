"""What the page tells: the same figures for every level, ratio and scope, and plain warnings."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tangram.cli.report.layouts import Settings
from tangram.cli.report.search_log import measured_log
from tangram.cli.report.story import STEPS, facts, report_data

PATH = Path("tiny.profile")


def tell(profile, **settings):
    data = report_data(profile, Settings.of(profile, **settings), PATH)
    json.dumps(data, allow_nan=False)
    return data


def warned(profile, words, **settings) -> bool:
    return any(words in sentence for sentence in tell(profile, **settings)["warnings"])


def test_every_level_ratio_and_scope_has_its_figures(make_profile):
    data = tell(make_profile(), ratios=(0.1, 0.25, 0.3))
    assert data["start"] == {"level": "error", "ratio": 2}
    for level in data["levels"].values():
        assert [sum(rows) for rows in level["rows"]] == pytest.approx(
            [ratio * 256 * 12 for ratio in (0.1, 0.25, 0.3)], rel=0.06
        )
        assert len(level["skew"]) == 3 and min(level["skew"]) >= 1
    for scope in data["scopes"].values():
        assert np.shape(scope["boxes"]) == (3, 12, 6)
        assert [len(rank["samples"]) for rank in scope["ranks"]] == [12] * 3
        for of_ratio in scope["overflow"].values():
            assert np.shape([each["often"] for each in of_ratio]) == (3, 12)
            assert np.shape([each["short"] for each in of_ratio]) == (3, 12)


def test_shares_between_known_ratios_are_interpolated(make_profile):
    data = tell(make_profile(), ratios=(0.25, 0.375, 0.5))
    low, between, high = (np.array(boxes) for boxes in data["scopes"]["crosslayer"]["boxes"])
    assert between[:, 5] == pytest.approx((low[:, 5] + high[:, 5]) / 2, abs=1)
    # The need of the neediest head is 1.8 times the ratio.
    assert high[-1, 5] / STEPS == pytest.approx(0.9, abs=0.02)


def test_overflow_is_against_the_rows_that_are_shown(make_profile):
    data = tell(make_profile(), ratios=(0.25,), page_group_size=1)
    share = np.asarray(make_profile().arrays["threshold_share/perlayer"])[1].reshape(12, -1)
    rows = np.array(data["levels"]["mass"]["rows"][0])
    shown = data["scopes"]["perlayer"]["overflow"]["mass"][0]
    assert shown["often"] == (share * 256 > rows).sum(axis=0).tolist()


def test_a_good_profile_is_not_warned_about(make_profile):
    assert tell(make_profile(), page_group_size=1)["warnings"] == []


def test_few_samples_are_warned_about(make_profile):
    few = {name: array[:, :3] for name, array in make_profile().arrays.items() if "/" in name}
    assert warned(make_profile(arrays=few), "Only 3 sample(s)")


def test_samples_that_disagree_are_warned_about(make_profile):
    random = np.random.default_rng(1)
    share = random.random((3, 12, 3, 4)) * np.array([0.2, 0.5, 1]).reshape(3, 1, 1, 1)
    profile = make_profile(arrays={"threshold_share/crosslayer": share})
    assert warned(profile, "Which heads need much depends on the text")
    assert not warned(make_profile(), "Which heads need much depends on the text")


def test_budgets_that_do_not_fit_the_samples_are_warned_about(make_profile):
    # Groups of all heads of a layer cannot follow heads whose need differs ninefold.
    share = np.tile([0.02, 0.02, 0.06, 0.9], (3, 12, 3, 1))
    profile = make_profile(arrays={"threshold_share/perlayer": share})
    assert warned(profile, "Many heads overflow", page_group_size=4)
    assert warned(profile, "share one budget", page_group_size=4)


def test_an_unknown_config_or_version_or_scorer_is_warned_about(make_profile):
    profile = make_profile()
    assert warned(
        replace(profile, model=replace(profile.model, config_sha256=None)), "by its sizes alone"
    )
    assert warned(replace(profile, tangram_version="0.0.1"), "Tangram 0.0.1 wrote the profile")
    assert warned(replace(profile, scorer_name="ours"), "ours is not installed here")


@pytest.mark.parametrize("missing", ["threshold_share", "mass", "error", ""])
def test_arrays_may_be_missing(make_profile, without, missing):
    data = tell(make_profile(arrays=without(missing)))
    assert "uniform" in data["levels"]
    if missing in ("mass", "error"):
        assert missing not in data["levels"] and missing not in data["curves"]
        assert any(f"Budgets of level {missing} cannot be had" in w for w in data["warnings"])
    if missing == "":
        assert list(data["levels"]) == ["uniform"] and data["start"]["level"] == "uniform"
        assert any("no statistics of heads" in sentence for sentence in data["warnings"])
    if missing == "threshold_share":
        assert data["scopes"] == {}


def test_the_query_ring_of_the_scorer_is_counted(make_profile):
    plain = tell(make_profile())["memory"]["compressed"][0][0]
    assert tell(make_profile(scorer_name="snap_kv"))["memory"]["compressed"][0][0] > plain


def test_a_chunk_unlike_the_servers_is_part_of_the_command(make_profile):
    assert tell(make_profile())["serve_flags"] == []
    data = tell(make_profile(chunk_size_tokens=512, n_sink_tokens=8))
    assert data["serve_flags"] == [
        "--compression-chunk-size 512",
        "--compression-n-sink-tokens 8",
    ]


@pytest.mark.parametrize(
    ("scorer", "parameters", "flags"),
    [
        ("snap_kv", {"kernel_size": 5}, []),
        ("snap_kv", {"kernel_size": 7}, ["--compression-scorer-parameters '{\"kernel_size\": 7}'"]),
        (
            "kvzap",
            {"weights": "sha256:00ff"},
            ['--compression-scorer-parameters \'{"weights": "FILE"}\''],
        ),
        ("of_others", {"a": 1}, ["--compression-scorer-parameters '{\"a\": 1}'"]),
    ],
)
def test_parameters_that_are_not_by_default_are_part_of_the_command(
    make_profile, scorer, parameters, flags
):
    profile = make_profile(scorer_name=scorer, scorer_parameters=parameters)
    assert tell(profile)["serve_flags"] == flags


def test_facts_count_the_kinds_of_samples(make_profile):
    kinds = ["code", "dialogue", "code"] * 4
    profile = make_profile(extra={"sample_kinds": kinds}, scorer_parameters={"epsilon": 0.01})
    told = dict(facts(profile))
    assert told["Samples"] == "12: 8 code, 4 dialogue"
    assert told["Scorer"] == "key_diff (epsilon = 0.01)"
    assert tell(profile)["sample_kinds"] == kinds
    assert tell(make_profile(extra={"sample_kinds": kinds[:-1]}))["sample_kinds"] is None


def test_the_log_of_measured_budgets_is_sorted_best_first(make_profile):
    trials = [
        {"name": "uniform", "divergence": 0.2, "checked": 0.3},
        {"name": "spared", "divergence": None, "checked": None},
        {"name": "mass", "divergence": 0.5, "checked": 0.1},
    ]
    log = {"origin": "mass", "divergence": 0.1, "candidates": trials}
    entries = [{"ratio": 0.5, "log": log}, {"ratio": 0.25, "log": {}}]
    high, low = measured_log(make_profile(extra={"measured": entries}))[::-1]
    assert (low["ratio"], low["origin"], low["candidates"]) == (0.25, "unknown", [])
    assert [name for name, *_ in high["candidates"]] == ["mass", "uniform", "spared"]
    assert (high["divergence"], high["evaluations"]) == (0.1, None)


def test_budgets_within_noise_are_told(make_profile, without):
    log = {"origin": "error", "within_noise": ["uniform", "mass"], "check_samples": 8}
    entries = [{"ratio": 0.1, "log": log}, {"ratio": 0.5, "log": {"within_noise": []}}]
    arrays = without("threshold")
    (remark,) = tell(make_profile(arrays=arrays, extra={"measured": entries}))["remarks"]
    assert remark.startswith("At ratio 0.1, the 8 samples that had the last word cannot tell")
    assert "from uniform, mass: " in remark


@pytest.mark.parametrize("found", [None, 3, "x", {}, [None, 1, {}, {"ratio": 1, "log": 2}]])
def test_what_is_no_log_is_passed_over(make_profile, found):
    profile = make_profile(extra={"measured": found})
    assert measured_log(profile) == []
    assert tell(profile)["measured"] == []


def test_a_figure_of_another_measure_is_explained_and_no_caution(make_profile, without):
    (remark,) = tell(make_profile(), page_group_size=1)["remarks"]
    assert remark.startswith("At ratio 0.3, 40% of what a sample's own crosslayer threshold")
    assert "beyond the error budgets" in remark and "not what is lost" in remark
    assert tell(make_profile(arrays=without("threshold")))["remarks"] == []
    follows = make_profile(arrays=without("error", "mass"))
    assert tell(follows)["start"]["level"] == "crosslayer" and tell(follows)["remarks"] == []


def test_the_models_name_is_the_title_where_it_is_known(make_profile):
    assert facts(make_profile())[0] == ("Model", "TinyForCausalLM")
    named = facts(make_profile(extra={"model_name": "org/tiny"}))
    assert named[:2] == [("Model", "org/tiny"), ("Architecture", "TinyForCausalLM")]
    for odd in (3, "", None, ["x"]):
        assert facts(make_profile(extra={"model_name": odd}))[0] == ("Model", "TinyForCausalLM")


def test_nothing_of_a_profile_is_obeyed_by_a_terminal(make_profile):
    profile = make_profile(
        data={"description": "\x1b[2Jgone\ud800"}, extra={"sample_kinds": ["a\nb"] * 12}
    )
    data = tell(profile)
    assert ["Texts", "\\x1b[2Jgone\\ud800"] in data["profile"]["facts"]
    assert data["sample_kinds"][0] == "a\\nb"
