"""The plan: how many heads share a budget where nobody says so, and the scorer's parameters."""

import json

import pytest

from tangram.bundled import recall_model_path
from tangram.errors import ConfigurationError, ProfileError, ProfileMismatchError
from tangram.plan.cached import cached_profile
from tangram.plan.compression_plan import CompressionPlan, group_size, make_plan, with_scorer
from tangram.plan.options import CompressionOptions
from tangram.profile import ModelIdentity, Profile
from tangram.scorers import get_scorer

MODEL = ModelIdentity("Sample", 2, 4, 8, 64, 512, 100)


def options(parameters=None, **more):
    given = {"compression_scorer": "snap_kv", "compression_scorer_parameters": parameters}
    return CompressionOptions.from_mapping(given | more)


@pytest.mark.parametrize(
    "heads, size", [(1, 1), (2, 1), (3, 1), (4, 2), (6, 2), (8, 4), (12, 4), (16, 4), (40, 4)]
)
def test_a_layer_has_two_groups_at_least(heads, size):
    assert group_size(CompressionOptions(), heads) == size


def test_the_size_that_is_asked_for_divides_the_heads():
    assert group_size(CompressionOptions(page_group_size=4), 4) == 4
    with pytest.raises(ConfigurationError, match="1, 2, 4"):
        group_size(CompressionOptions(page_group_size=3), 4)


def test_the_plan_has_the_scorers_parameters():
    plan = make_plan(options({"kernel_size": 7}), MODEL, itemsize_bytes=2)
    assert plan.scorer == get_scorer("snap_kv", kernel_size=7)
    assert plan.scorer_title == "snap_kv(kernel_size=7)"
    again = CompressionPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan and again.scorer == plan.scorer


def test_parameters_at_their_defaults_are_no_other_plan():
    plan, same = (make_plan(options(p), MODEL, 2) for p in (None, {"kernel_size": 5}))
    other = make_plan(options({"kernel_size": 7}), MODEL, itemsize_bytes=2)
    assert plan == same and plan.scorer_title == "snap_kv"
    assert other != plan and other.geometry.digest == plan.geometry.digest


def test_a_plan_from_before_there_were_parameters_is_read():
    plan = make_plan(options(), MODEL, itemsize_bytes=2)
    plain = plan.to_json()
    del plain["scorer_parameters"]
    assert CompressionPlan.from_json(plain) == plan


def test_a_plan_says_where_its_ratio_was_not_measured():
    served = {"compression_profile": str(recall_model_path() / "key_diff.profile")}
    served |= {"compression_scorer": "key_diff", "page_group_size": 1}
    config = json.loads((recall_model_path() / "config.json").read_text())
    model = ModelIdentity.from_config(config)
    measured, between = (
        make_plan(options(**served, compression_ratio=ratio), model, 2) for ratio in (0.25, 0.3)
    )
    assert measured.budgets_title == "measured budgets"
    assert between.budgets_title.startswith("measured budgets (interpolated: measured at ratios 0.")
    assert CompressionPlan.from_json(json.loads(json.dumps(between.to_json()))) == between


def test_a_profile_of_other_parameters_is_refused(tmp_path):
    path = str(tmp_path / "p.profile")
    sizes = {"chunk_size_tokens": 256, "window_size_tokens": 32, "n_sink_tokens": 4}
    seven = get_scorer("snap_kv", kernel_size=7).parameters()
    Profile(model=MODEL, scorer_name="snap_kv", scorer_parameters=seven, **sizes).save(path)
    served = {"compression_profile": path, "compression_level": "uniform"}
    assert make_plan(options({"kernel_size": 7}, **served), MODEL, 2).profile_path == path
    for other, has in ((None, 5), ({"kernel_size": 3}, 3)):
        with pytest.raises(ProfileMismatchError) as error:
            make_plan(options(other, **served), MODEL, 2)
        for words in (
            "the profile has snap_kv(kernel_size=7)", f"the server has snap_kv(kernel_size={has})",
            """--compression-scorer-parameters '{"kernel_size": 7}'""",
        ):  # fmt: skip
            assert words in str(error.value)


@pytest.mark.parametrize("name", ["auto", "Auto"])
def test_auto_is_the_profiles_scorer_or_one_that_needs_none(tmp_path, name):
    path = str(tmp_path / "p.profile")
    sizes = {"chunk_size_tokens": 256, "window_size_tokens": 32, "n_sink_tokens": 4}
    seven = get_scorer("snap_kv", kernel_size=7).parameters()
    Profile(model=MODEL, scorer_name="snap_kv", scorer_parameters=seven, **sizes).save(path)
    auto = {"compression_scorer": name, "compression_level": "uniform"}
    given = options(compression_profile=path, **auto)
    plan = make_plan(given, MODEL, itemsize_bytes=2)
    assert plan.scorer == get_scorer("snap_kv", kernel_size=7) and plan.profile_path == path
    assert plan.geometry.has_query_ring and '"auto"' not in json.dumps(plan.to_json())
    of_snap_kv = {"compression_profile": path, "compression_level": "uniform"}
    assert with_scorer(given) == options({"kernel_size": 7}, **of_snap_kv)
    assert make_plan(with_scorer(given), MODEL, 2) == plan
    for none in ("none", None):
        given = options(compression_profile=none, **auto)
        assert make_plan(given, MODEL, 2).scorer == get_scorer("key_diff")
        assert with_scorer(given).compression_scorer == "key_diff"
    with pytest.raises(ConfigurationError, match="snap_kv needs .*--compression-window-size"):
        make_plan(options(compression_profile=path, compression_window_size=0, **auto), MODEL, 2)


def test_auto_beside_a_profile_of_a_scorer_that_is_not_installed_is_refused(tmp_path):
    path = str(tmp_path / "p.profile")
    sizes = {"chunk_size_tokens": 256, "window_size_tokens": 32, "n_sink_tokens": 4}
    Profile(model=MODEL, scorer_name="ours", **sizes).save(path)
    with pytest.raises(ProfileError, match="auto takes the profile's scorer.*unknown .* 'ours'"):
        make_plan(CompressionOptions(compression_profile=path), MODEL, 2)


def test_auto_has_a_cached_profile_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(bytes(16))

    def cached(**given):
        return cached_profile(CompressionOptions(**given), str(tmp_path), MODEL)

    auto = cached()
    assert auto == cached(compression_scorer="Auto") and "-auto-C256" in auto.name
    assert auto != cached(compression_scorer="key_diff")
    monkeypatch.setattr("tangram.plan.options.AUTO_SCORERS", ("key_diff",))
    assert cached() not in (auto, cached(compression_scorer="key_diff"))


def test_the_cached_profile_is_that_of_the_parameters(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(16))
    given = (None, {"kernel_size": 5}, {"kernel_size": 7})
    none, same, other = (cached_profile(options(p), str(tmp_path), MODEL) for p in given)
    assert none == same != other
