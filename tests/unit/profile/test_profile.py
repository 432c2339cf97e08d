import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn
from safetensors.numpy import save_file

from tangram.errors import ProfileError, ProfileMismatchError
from tangram.profile import SCHEMA_VERSION, ModelIdentity, Profile, store


def same(left, right):
    for field in dataclasses.fields(Profile):
        if field.name != "arrays":
            assert getattr(left, field.name) == getattr(right, field.name), field.name
    assert set(left.arrays) == set(right.arrays)
    for name, array in left.arrays.items():
        assert array.dtype == right.arrays[name].dtype
        np.testing.assert_array_equal(array, right.arrays[name])
    return True


def test_what_was_saved_is_loaded(make_profile, tmp_path):
    profile = make_profile()
    profile.save(tmp_path / "p.safetensors")
    assert same(profile, Profile.load(tmp_path / "p.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]


def test_the_same_profile_gives_the_same_bytes(make_profile, tmp_path):
    profile = make_profile()
    reordered = make_profile(arrays=dict(reversed(profile.arrays.items())))
    profile.save(tmp_path / "a")
    reordered.save(tmp_path / "b")
    Profile.load(tmp_path / "a").save(tmp_path / "c")
    contents = {(tmp_path / name).read_bytes() for name in "abc"}
    assert len(contents) == 1


def test_every_array_is_optional(make_profile, tmp_path):
    make_profile(arrays={}).save(tmp_path / "p")
    profile = Profile.load(tmp_path / "p")
    assert dict(profile.arrays) == {}
    with pytest.raises(ProfileError, match="'mass' needs the array 'mass_curve'"):
        profile.require("mass_curve", "mass")


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_round_trip_of_any_sizes(data, tmp_path_factory):
    layers, kv_heads, per_head, size, samples, points, grid = (
        data.draw(st.integers(1, 4)) for _ in range(7)
    )
    shares = tuple(np.linspace(0, 1, points + 1))
    ratios = tuple((np.arange(grid) + 1) / grid)
    held, numbers = st.floats(0, 1, width=32), st.floats(-10, 10, width=32)
    shapes = {
        "threshold_share/perlayer": (grid, samples, layers, kv_heads),
        "mass_curve": (samples, layers, kv_heads, points + 1),
        "query_mean": (layers, kv_heads * per_head, size),
        "of_another_kind": (samples,),
    }
    wanted = data.draw(st.sets(st.sampled_from(sorted(shapes))))
    arrays = {
        name: data.draw(
            stn.arrays(
                np.float32,
                shapes[name],
                elements=held if name.startswith(("threshold", "mass")) else numbers,
            )
        )
        for name in sorted(wanted)
    }
    if "mass_curve" in arrays:
        arrays["mass_curve"].sort()
    profile = Profile(
        model=ModelIdentity("M", layers, kv_heads, kv_heads * per_head, size, 8, 9),
        scorer_name=data.draw(st.text(max_size=5)),
        scorer_parameters=data.draw(st.dictionaries(st.text(max_size=3), st.integers())),
        chunk_size_tokens=64,
        window_size_tokens=0,
        n_sink_tokens=0,
        ratios=ratios,
        shares=shares,
        arrays=arrays,
    )
    path = tmp_path_factory.mktemp("profile") / "p"
    profile.save(path)
    assert same(profile, Profile.load(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratios": (0.5, 0.25)}, "ratios must increase"),
        ({"ratios": (0.0, 0.5)}, r"ratios must lie in \(0, 1\]"),
        ({"shares": (0, 0.5)}, "shares must run from 0 to 1"),
        ({"chunk_size_tokens": 0}, "chunk_size_tokens cannot be 0"),
        ({"window_size_tokens": -1}, "window_size_tokens cannot be -1"),
        ({"data": {"x": float("nan")}}, "data must hold JSON values"),
        ({"extra": {"x": object()}}, "extra must hold JSON values"),
        ({"arrays": {"mass_curve": np.zeros((4, 2, 3, 4))}}, "mass_curve must have shape"),
        ({"arrays": {"mass_curve": np.zeros((0, 2, 3, 5))}}, "mass_curve must have shape"),
        ({"arrays": {"query_mean": np.zeros((2, 6))}}, "query_mean must have shape"),
        ({"arrays": {"query_mean": np.full((2, 6, 8), np.nan)}}, "query_mean holds values"),
    ],
)
def test_parts_that_do_not_fit_are_refused(make_profile, changes, message):
    with pytest.raises(ProfileError, match=message):
        make_profile(**changes)


def test_arrays_are_copied_and_cannot_be_written_to(make_profile):
    mine = np.zeros((4, 2, 3, 5), dtype=np.float32)
    profile = make_profile(arrays={"mass_curve": mine})
    mine[:] = 1
    assert not profile.arrays["mass_curve"].any()
    with pytest.raises(ValueError, match="read-only"):
        profile.arrays["mass_curve"][0] = 1


def test_every_truncation_is_refused(make_profile, tmp_path):
    path = tmp_path / "p"
    make_profile().save(path)
    whole = path.read_bytes()
    for length in [0, 4, 8, 100, 1000, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ProfileError, match=str(path)):
            Profile.load(path)


def test_every_changed_byte_is_noticed(make_profile, tmp_path):
    path = tmp_path / "p"
    make_profile().save(path)
    whole = path.read_bytes()
    for position in np.random.default_rng(1).integers(0, len(whole), 200):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ProfileError, match=str(path)):
            Profile.load(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ProfileError, match="missing"):
        Profile.load(tmp_path / "missing")
    with pytest.raises(ProfileError, match="no readable profile"):
        Profile.load(tmp_path)
    save_file({"x": np.zeros(2)}, tmp_path / "weights")
    with pytest.raises(ProfileError, match="weights: a safetensors file, but not a profile"):
        Profile.load(tmp_path / "weights")
    (tmp_path / "text").write_text("{}" * 50)
    with pytest.raises(ProfileError, match="text: no readable profile"):
        Profile.load(tmp_path / "text")
    for header in ["[]", "{}", "7", "no JSON", json.dumps({"schema_version": "x"})]:
        save_file({"x": np.zeros(2)}, tmp_path / "odd", metadata={store.METADATA_KEY: header})
        with pytest.raises(ProfileError, match="odd: damaged: its header"):
            Profile.load(tmp_path / "odd")
    store.write(tmp_path / "part", {"model": {}}, {})
    with pytest.raises(ProfileError, match="part: its header does not describe a profile"):
        Profile.load(tmp_path / "part")


def test_a_newer_schema_is_refused_whatever_else_it_holds(tmp_path):
    header = {"schema_version": SCHEMA_VERSION + 1, "tangram_version": "9.0"}
    save_file({"x": np.zeros(2)}, tmp_path / "p", metadata={store.METADATA_KEY: json.dumps(header)})
    with pytest.raises(ProfileError, match=r"p: written with schema 2 by version 9\.0.*up to 1"):
        Profile.load(tmp_path / "p")


def test_a_folder_that_is_missing_is_an_error_of_ours(make_profile, tmp_path):
    with pytest.raises(ProfileError, match="cannot be written"):
        make_profile().save(tmp_path / "none" / "p")


def test_check_accepts_its_own_model_and_scorer(make_profile):
    profile = make_profile()
    undigested = dataclasses.replace(profile.model, config_sha256=None)
    for model in (profile.model, undigested):
        parameters = {"b": (1.5, None), "a": 1}
        assert (
            profile.check(model=model, scorer_name="keydiff", scorer_parameters=parameters) is None
        )


@pytest.mark.parametrize(
    ("model", "scorer", "parameters", "message"),
    [
        (
            {"num_layers": 5},
            "keydiff",
            {},
            r"differing: num_layers.*2 layers.*server has.*5 layers",
        ),
        ({"config_sha256": "cd" * 32}, "keydiff", {}, r"config abab.*server has.*config cdcd"),
        ({}, "snapkv", {"a": 1, "b": [1.5, None]}, r"profile has keydiff\(.*server has snapkv\("),
        ({}, "keydiff", {"a": 2}, r"profile has keydiff\(a=1, b=.*server has keydiff\(a=2\)"),
        ({}, "keydiff", {}, r"of other parameters.*-scorer-parameters '{.a.: 1, .b"),
    ],
)
def test_check_names_both_sides_and_the_remedy(make_profile, model, scorer, parameters, message):
    profile = make_profile()
    other = dataclasses.replace(profile.model, **model)
    with pytest.raises(ProfileMismatchError, match=message) as caught:
        profile.check(model=other, scorer_name=scorer, scorer_parameters=parameters)
    assert "--compression-profile" in str(caught.value)


def test_layer_statistics_are_those_of_the_layer(make_profile):
    profile = make_profile()
    found = profile.layer_statistics(1)
    assert set(found) == {"query_mean", "query_covariance", "rope_frequencies"}
    np.testing.assert_array_equal(found["query_mean"], profile.arrays["query_mean"][1])
    np.testing.assert_array_equal(found["query_covariance"], profile.arrays["query_covariance"][1])
    assert found["rope_frequencies"].dtype == np.float64
    assert make_profile(arrays={}).layer_statistics(0) == {}
    with pytest.raises(ProfileError, match="no layer 2 among 2"):
        profile.layer_statistics(2)
