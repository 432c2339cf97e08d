"""Damaged and lying profiles: refused in one line, or served as if nothing had happened."""

import os
import re
from pathlib import Path

import numpy as np
import pytest

from tangram.budgets import MEASURED, MeasuredEntry
from tangram.bundled import recall_model_path
from tangram.cli.report.layouts import Settings
from tangram.cli.report.page import render
from tangram.cli.report.story import report_data
from tangram.errors import ProfileError, TangramError
from tangram.geometry import HeadGroups
from tangram.plan.compression_plan import make_plan
from tangram.plan.options import CompressionOptions
from tangram.profile import ModelIdentity, Profile, store
from tests.unit.profile.damage import Damager

MODEL = ModelIdentity("TinyForCausalLM", 2, 4, 8, 8, 48, 100, "ab" * 32)
LEVELS = (None, "error", "mass", "crosslayer", "perlayer")
DAMAGES = 1000
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e]")


def entry(ratio, pages) -> dict:
    heads = [[[head] for head in range(4)]] * 2
    return MeasuredEntry(
        ratio=ratio, page_group_size=1, chunk_size_tokens=256, page_size_rows=16, n_sink_tokens=4,
        window_size_tokens=32, head_groups=HeadGroups.from_lists(heads, pages),
    ).to_json()  # fmt: skip


def measured_profile() -> Profile:
    random = np.random.default_rng(0)
    curve = np.sort(random.random((3, 2, 4, 5)))
    return Profile(
        model=MODEL,
        scorer_name="key_diff",
        chunk_size_tokens=256,
        window_size_tokens=32,
        n_sink_tokens=4,
        ratios=(0.25, 0.5),
        shares=(0, 0.25, 0.5, 0.75, 1),
        data={"sha256": "00", "n_samples": 3, "description": "notes"},
        seed=7,
        extra={
            MEASURED: [
                entry(0.25, [[9, 1, 2, 4], [1, 7, 3, 5]]),
                entry(0.5, [[15, 3, 7, 7], [2, 14, 9, 7]]),
            ]
        },
        arrays={
            "threshold_share/crosslayer": random.random((2, 3, 2, 4)),
            "threshold_share/perlayer": random.random((2, 3, 2, 4)),
            "mass_curve": curve,
            "error_curve": curve[..., ::-1] * 3,
            "query_mean": random.random((2, 8, 8)),
            "rope_frequencies": random.random(4),
        },
    )


def layout(path, level) -> str:
    """Digest of the layout that is served with a profile."""
    options = CompressionOptions(
        compression_profile=str(path),
        compression_level=level,
        compression_ratio=0.25,
        page_group_size=1,
    )
    return make_plan(options, MODEL, 2).geometry.digest


@pytest.fixture
def damager(tmp_path):
    measured_profile().save(tmp_path / "whole")
    return Damager(tmp_path / "whole")


def test_every_damage_is_refused_in_one_line_or_serves_the_same(damager, tmp_path):
    path = tmp_path / "p.profile"
    served = {level: layout(tmp_path / "whole", level) for level in LEVELS}
    assert len(set(served.values())) == len(LEVELS)
    refused: dict[str, int] = {}
    for number in range(DAMAGES):
        kind, contents = damager.damaged(number)
        path.write_bytes(contents)
        for level in LEVELS:
            try:
                assert layout(path, level) == served[level], (number, kind, level)
            except TangramError as error:
                assert len(str(error).splitlines()) == 1 and not CONTROL.search(str(error))
                if level is None:
                    refused[kind] = refused.get(kind, 0) + 1
                    assert str(path) in str(error) or "of another" in str(error), (number, kind)
    # Most damages are told; the others change what is only shown.
    assert set(refused) == {kind.__name__ for kind in damager.kinds}
    assert sum(refused.values()) > 0.9 * DAMAGES


def test_a_page_is_made_of_what_loads_and_holds_nothing_that_is_obeyed(damager, tmp_path):
    path, made = tmp_path / "p.profile", 0
    for number in range(0, DAMAGES, 5):
        _, contents = damager.damaged(number)
        path.write_bytes(contents)
        try:
            profile = Profile.load(path)
            data = report_data(profile, Settings.of(profile, ratios=(0.25,)), path)
        except TangramError:
            continue
        page = render(data)
        page.encode()
        assert not CONTROL.search(page)
        made += 1
    assert made > 10


def changed(profile: Profile, path: Path, change) -> None:
    """Write a profile whose header was changed and whose checksum is right."""
    profile.save(path)
    header, arrays = store.read(path)
    change(header)
    header.pop("schema_version")
    store.write(path, header, arrays)


def test_groups_larger_than_their_entry_says_do_not_keep_everything(tmp_path):
    """Budgets of groups of 4 heads said to be of 1 kept all rows at ratio 0.25."""
    lie = entry(0.25, [[4] * 4] * 2)
    lie["heads"], lie["pages"] = [[[0, 1, 2, 3]]] * 2, [[16], [16]]
    path = tmp_path / "p.profile"
    changed(measured_profile(), path, lambda header: header["extra"].update(measured=[lie]))
    with pytest.raises(ProfileError, match="page_group_size is 1, and its groups have 4 heads"):
        layout(path, None)
    with pytest.raises(ProfileError, match=str(path)):
        layout(path, "measured")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 0.5}, "for ratio 0.5 have 32 pages, expected 64"),
        ({"ratio": True}, "ratio must be a number"),
        ({"ratio": 1.5}, r"ratio must lie in \(0, 1\]"),
        ({"page_group_size": 2}, "page_group_size is 2, and its groups have 1"),
        ({"page_size_rows": 7}, "no multiple of 7 rows"),
        ({"chunk_size_tokens": 512}, "have 32 pages, expected 64"),
        ({"chunk_size_tokens": 10**30}, "chunk_size_tokens must be"),
        ({"n_sink_tokens": 17}, "keep 1 to 9 pages of a chunk, expected 2 to 16"),
        ({"n_sink_tokens": -1}, "n_sink_tokens must be >= 0"),
        ({"window_size_tokens": "32"}, "window_size_tokens must be"),
        ({"pages": [[17, 1, 1, 1], [1, 7, 3, 1]]}, "keep 1 to 17 pages"),
        ({"pages": [[9.5, 1, 2, 4], [1, 7, 3, 5]]}, "a number of pages, must be"),
        ({"pages": {"0": [9]}}, "damaged"),
        ({"heads": 3}, "damaged"),
        ({"log": 3}, "log must be an object"),
    ],
)
def test_entries_of_other_sizes_than_they_say_are_refused(tmp_path, change, message):
    path = tmp_path / "p.profile"
    changed(measured_profile(), path, lambda header: header["extra"]["measured"][0].update(change))
    with pytest.raises(ProfileError, match=message):
        layout(path, None)


@pytest.mark.parametrize("found", [None, {}, 0, "", 3, "x", [None], [[]], [3]])
def test_what_is_no_list_of_entries_is_not_passed_over(tmp_path, found):
    path = tmp_path / "p.profile"
    changed(measured_profile(), path, lambda header: header["extra"].update(measured=found))
    with pytest.raises(ProfileError, match="measured budgets are damaged"):
        layout(path, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(seed="7"), "seed must be"),
        (lambda h: h.update(tangram_version=3), "tangram_version must be a text"),
        (lambda h: h.update(ratios=[0.25, "0.5"]), "ratios must be a list of numbers"),
        (lambda h: h.update(ratios=[0.25, 10**400]), "ratios must be finite"),
        (lambda h: h.update(shares="01"), "shares must be a list of numbers"),
        (lambda h: h.update(data=[]), "data must be an object"),
        (lambda h: h["data"].update(n_samples=4), "numbers of samples differ"),
        (lambda h: h["model"].update(num_layers=10**9), "more than 1048576 heads"),
        (lambda h: h["model"].update(architecture=[]), "architecture must be a text"),
        (lambda h: h["model"].update(config_sha256=0), "config_sha256 must be a text"),
        (lambda h: h["model"].update(more=0), "more"),
        (lambda h: h["scorer"].update(name=None), "scorer_name must be a text"),
        (lambda h: h["scorer"].update(parameters=[["a", 1]]), "parameters must be an object"),
        (lambda h: h["chunk"].update(chunk_size_tokens=1 << 40), "chunk_size_tokens must be"),
        (lambda h: h["chunk"].update(window_size_tokens=253), "do not fit a chunk of 256"),
        (lambda h: h.pop("seed"), "it lacks 'seed'"),
        (lambda h: h.update(scorer=[]), "header does not describe a profile"),
    ],
)
def test_fields_that_no_profile_has_name_the_file_and_the_remedy(tmp_path, change, message):
    path = tmp_path / "p.profile"
    changed(measured_profile(), path, change)
    with pytest.raises(ProfileError, match=message) as caught:
        Profile.load(path)
    assert str(path) in str(caught.value)
    assert "calibrate again, or give another file" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("mass_curve", lambda a: a[..., ::-1], "mass_curve falls"),
        ("mass_curve", lambda a: a + 1, "mass_curve must lie between 0 and 1"),
        ("error_curve", lambda a: -a, "error_curve must lie between 0 and inf"),
        ("error_curve", lambda a: a[:2], "numbers of samples differ"),
        ("threshold_share/perlayer", lambda a: a - 1, "perlayer must lie between 0 and 1"),
        ("query_mean", lambda a: a.astype(np.float64), "query_mean must be float32"),
        ("query_mean", lambda a: a > 0, "query_mean must hold numbers, got bool"),
        ("rope_frequencies", lambda a: a * np.nan, "not finite"),
    ],
)
def test_arrays_that_no_calibration_makes_are_refused(tmp_path, name, spoil, message):
    path = tmp_path / "p.profile"
    measured_profile().save(path)
    header, arrays = store.read(path)
    header.pop("schema_version")
    store.write(path, header, {**arrays, name: np.ascontiguousarray(spoil(arrays[name]))})
    with pytest.raises(ProfileError, match=message):
        Profile.load(path)


def test_what_is_no_plain_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path, tmp_path / "a\0b"):
        with pytest.raises(ProfileError, match="no readable profile there"):
            Profile.load(path)


def test_a_file_of_any_size_is_not_read_into_memory(tmp_path):
    with (tmp_path / "p.profile").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ProfileError, match="no profile more than"):
        Profile.load(tmp_path / "p.profile")


@pytest.mark.parametrize(
    ("name", "digest"), [("key_diff", "885d1549bdd7"), ("expected_attention", "f52486110c9a")]
)
def test_the_bundled_profiles_are_served_as_before(name, digest):
    path = recall_model_path() / f"{name}.profile"
    profile = Profile.load(path)
    options = CompressionOptions(
        compression_profile=str(path), compression_scorer=name, page_group_size=1
    )
    assert make_plan(options, profile.model, 2).geometry.digest == digest
