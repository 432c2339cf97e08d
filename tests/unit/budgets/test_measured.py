"""The measured level: what was found is returned, and asked about other ratios and sizes."""

import dataclasses

import numpy as np
import pytest

from tangram.budgets import (
    MEASURED,
    MeasuredEntry,
    allocate,
    default_level,
    interpolation,
    measured_entries,
    with_entry,
)
from tangram.budgets.grouping import head_pages
from tangram.errors import ProfileError
from tangram.geometry import HeadGroups
from tangram.profile import Profile

SIZE = dict(
    num_layers=2,
    num_kv_heads=4,
    chunk_size_tokens=256,
    page_size_rows=16,
    page_group_size=2,
    n_sink_tokens=4,
)
HEADS = [[[0, 3], [1, 2]], [[0, 1], [2, 3]]]


def entry(ratio, pages, heads=HEADS, **sizes):
    return MeasuredEntry(
        ratio=ratio,
        window_size_tokens=32,
        head_groups=HeadGroups.from_lists(heads, pages),
        **{
            "page_group_size": 2,
            "chunk_size_tokens": 256,
            "page_size_rows": 16,
            "n_sink_tokens": 4,
            **sizes,
        },
    )


@pytest.fixture
def profile(random_profile):
    return dataclasses.replace(random_profile(0, num_layers=2, num_kv_heads=4), extra={})


def ask(profile, ratio, **change):
    return allocate(MEASURED, ratio=ratio, profile=profile, **(SIZE | change))


def test_what_was_measured_is_returned_and_survives_the_file(profile, tmp_path):
    found = entry(0.25, [[9, 1], [1, 5]])
    with_entry(profile, found).save(tmp_path / "p")
    loaded = Profile.load(tmp_path / "p")
    assert measured_entries(loaded) == [found]
    assert ask(loaded, 0.25) == found.head_groups


def test_an_entry_takes_the_place_of_the_one_with_its_ratio_and_sizes(profile):
    first, second = entry(0.25, [[9, 1], [1, 5]]), entry(0.25, [[4, 4], [4, 4]])
    other = entry(0.5, [[9, 7], [8, 8]])
    made = with_entry(with_entry(with_entry(profile, first), other), second)
    assert measured_entries(made) == [other, second]
    assert ask(made, 0.25) == second.head_groups
    assert ask(made, 0.5) == other.head_groups


def test_between_two_ratios_shares_are_interpolated_and_groups_kept(profile):
    made = with_entry(profile, entry(0.25, [[9, 1], [1, 5]]))
    made = with_entry(made, entry(0.5, [[15, 3], [7, 7]]))
    between = ask(made, 0.375)
    assert head_pages(between).tolist() == [[12, 2, 2, 12], [4, 4, 6, 6]]
    assert {frozenset(layer) for layer in between.heads} == {
        frozenset(tuple(tuple(group) for group in layer)) for layer in HEADS
    }


def test_below_the_lowest_ratio_shares_shrink_and_above_the_highest_they_fill_up(profile):
    made = with_entry(profile, entry(0.5, [[14, 2], [10, 6]]))
    assert head_pages(ask(made, 0.25)).tolist() == [[7, 1, 1, 7], [5, 5, 3, 3]]
    assert head_pages(ask(made, 0.75)).tolist() == [[15, 9, 9, 15], [13, 13, 11, 11]]
    assert head_pages(ask(made, 1.0)).tolist() == [[16] * 4] * 2


def test_a_larger_ratio_takes_no_page_away_where_more_was_found_for_it(profile):
    made = with_entry(profile, entry(0.25, [[9, 1], [1, 5]]))
    made = with_entry(made, entry(0.5, [[15, 3], [7, 7]]))
    before = np.zeros((2, 4))
    for ratio in np.linspace(0.07, 1, 60):
        pages = head_pages(ask(made, float(ratio)))
        # Which of two fractions is rounded up may change; never by more than that page.
        assert (pages >= before - 1).all()
        before = pages


def test_other_chunks_keep_the_shares(profile):
    made = with_entry(profile, entry(0.25, [[9, 1], [1, 5]]))
    larger = ask(made, 0.25, chunk_size_tokens=512)
    assert head_pages(larger).tolist() == [[18, 2, 2, 18], [2, 2, 10, 10]]


def test_other_groups_put_heads_of_like_shares_together(profile):
    made = with_entry(profile, entry(0.25, [[9, 1], [1, 5]]))
    alone = ask(made, 0.25, page_group_size=1)
    assert head_pages(alone).tolist() == [[9, 1, 1, 9], [1, 1, 5, 5]]
    assert sum(map(sum, ask(made, 0.25, page_group_size=4).pages)) == 8


def test_the_nearest_sizes_are_asked(profile):
    made = with_entry(profile, entry(0.25, [[9, 1], [1, 5]]))
    heads = [[[0], [1], [2], [3]]] * 2
    single = entry(0.25, [[1, 1, 1, 13], [13, 1, 1, 1]], heads, page_group_size=1)
    made = with_entry(made, single)
    assert ask(made, 0.25, page_group_size=1) == single.head_groups
    assert head_pages(ask(made, 0.25, page_group_size=1, n_sink_tokens=2))[0, 3] == 13
    assert head_pages(ask(made, 0.25, n_sink_tokens=2))[0].tolist() == [9, 1, 1, 9]


def test_what_is_interpolated_is_said_and_from_what(profile):
    first = entry(0.25, [[9, 1], [1, 5]])
    measured = with_entry(with_entry(profile, first), entry(0.5, [[15, 3], [7, 7]]))
    sizes = first.sizes
    assert interpolation(measured, 0.25, sizes) == ""
    assert interpolation(measured, 1, sizes) == "", "everything is kept"
    said = "interpolated: measured at ratios 0.25, 0.5"
    assert interpolation(measured, 0.3, sizes) == said
    other = (sizes[0], 2 * sizes[1], *sizes[2:])
    assert interpolation(measured, 0.25, other).startswith(f"{said} in chunks of {sizes[1]} with")
    assert interpolation(profile, 0.3, sizes) == ""


def test_a_profile_without_measured_budgets_is_refused_with_the_remedy(profile):
    with pytest.raises(ProfileError, match="has none: calibrate with measuring, or choose another"):
        ask(profile, 0.25)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda plain: plain.pop("pages"), "damaged"),
        (lambda plain: plain.update(ratio=0.5), "have 16 pages, expected 32"),
        (lambda plain: plain.update(heads=HEADS[:1], pages=[[9, 1]]), "are of 1 layers"),
    ],
)
def test_entries_that_do_not_fit_are_refused(profile, spoil, message):
    plain = entry(0.25, [[9, 1], [1, 5]]).to_json()
    spoil(plain)
    spoilt = dataclasses.replace(profile, extra={MEASURED: [plain]})
    with pytest.raises(ProfileError, match=message):
        ask(spoilt, 0.5)


def test_the_default_level_is_the_best_that_the_profile_allows(profile):
    assert default_level(None) == "uniform"
    assert default_level(profile) == "error"
    assert default_level(with_entry(profile, entry(0.25, [[9, 1], [1, 5]]))) == MEASURED
