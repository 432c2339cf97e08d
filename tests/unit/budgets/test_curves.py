import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from tangram.budgets import allocate
from tangram.budgets.curves import greedy_pages, hull_slopes, page_gain

INCREASES = stn.arrays(
    np.float64,
    st.tuples(st.just(1), st.integers(1, 4), st.integers(1, 5)),
    elements=st.integers(0, 8).map(float),
)


def cumulated(increases):
    return np.concatenate([np.zeros_like(increases[..., :1]), increases.cumsum(-1)], axis=-1)


def hull_by_lines(curve):
    """The least concave curve above, as the highest chord over every point."""
    points = len(curve)
    hull = curve.copy()
    for left, middle, right in itertools.combinations(range(points), 3):
        share = (middle - left) / (right - left)
        hull[middle] = max(hull[middle], (1 - share) * curve[left] + share * curve[right])
    return hull


def best_sum(gain, total, floor):
    """The largest sum over all ways to spend the pages."""
    _, groups, points = gain.shape
    return max(
        sum(gain[0, group, pages] for group, pages in enumerate(way))
        for way in itertools.product(range(floor, points), repeat=groups)
        if sum(way) == total
    )


@settings(max_examples=200, deadline=None)
@given(increases=INCREASES)
def test_the_hull_is_the_least_concave_curve_above(increases):
    for curve in cumulated(increases)[0]:
        slopes = hull_slopes(curve)
        np.testing.assert_allclose(cumulated(slopes), hull_by_lines(curve), atol=1e-12)
        assert (np.diff(slopes) <= 0).all()


def test_a_hull_of_no_steps_is_empty():
    assert hull_slopes(np.array([3.0])).shape == (0,)


@settings(max_examples=200, deadline=None)
@given(increases=INCREASES, spent=st.floats(0, 1), floor=st.integers(0, 1))
def test_greedy_is_the_best_of_all_ways_on_the_hulls(increases, spent, floor):
    gain = cumulated(increases)
    groups, most = gain.shape[1], gain.shape[2] - 1
    total = round(groups * (floor + spent * (most - floor)))
    pages = greedy_pages(gain, total, floor_pages=floor)
    assert pages.sum() == total
    assert pages.min() >= floor
    hulls = gain.copy()
    for group in range(groups):
        hulls[0, group, floor:] = hull_by_lines(gain[0, group, floor:])
    got = np.take_along_axis(hulls, pages[..., None], axis=-1).sum()
    np.testing.assert_allclose(got, best_sum(hulls, total, floor), atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(increases=INCREASES)
def test_a_larger_total_takes_no_page_away(increases):
    gain = cumulated(increases)
    before = np.zeros(gain.shape[:2], dtype=int)
    for total in range(gain.shape[1] * (gain.shape[2] - 1) + 1):
        pages = greedy_pages(gain, total, floor_pages=0)
        assert (pages >= before).all()
        before = pages


def test_curves_that_gain_nothing_are_filled_evenly():
    pages = greedy_pages(np.zeros((2, 3, 9)), 20, floor_pages=1)
    assert pages.max() - pages.min() <= 1


def test_curves_are_resampled_to_pages_and_noise_is_ironed_out():
    curve = np.array([[[0.5, 0.9, 0.8, 1.5]]])
    shares = np.array([0.0, 0.25, 0.5, 1.0])
    gain = page_gain(curve, shares, 8)
    np.testing.assert_allclose(
        gain[0, 0], [0, 0.2, 0.4, 0.4, 0.4, 0.475, 0.65, 0.825, 1.0], atol=1e-12
    )


@pytest.mark.parametrize("level", ["mass", "error"])
def test_pages_gain_more_than_uniform_ones(random_profile, level):
    profile = random_profile(6, num_layers=4, num_kv_heads=8)
    asked = {
        "num_layers": 4,
        "num_kv_heads": 8,
        "ratio": 0.25,
        "chunk_size_tokens": 256,
        "page_size_rows": 16,
        "n_sink_tokens": 4,
        "profile": profile,
    }
    sign = 1 if level == "mass" else -1
    curve = profile.arrays[f"{level}_curve"].astype(np.float64).mean(axis=0)
    gain = page_gain(sign * curve, np.array(profile.shares), 16)

    def gained(result):
        return sum(
            gain[layer, head, pages]
            for layer, groups in enumerate(result.heads)
            for group, pages in zip(groups, result.pages[layer], strict=True)
            for head in group
        )

    alone, pairs, uniform = (
        gained(allocate(rule, page_group_size=size, **asked))
        for rule, size in ((level, 1), (level, 2), ("uniform", 1))
    )
    assert alone >= pairs > uniform


def test_a_needy_head_gets_the_pages(random_profile):
    profile = random_profile(0, num_layers=1, num_kv_heads=2, num_shares=4)
    mass = np.array([[[[0, 1, 1, 1, 1], [0, 0.25, 0.5, 0.75, 1]]]])
    profile = dataclasses.replace(profile, arrays={"mass_curve": mass})
    result = allocate(
        "mass",
        num_layers=1,
        num_kv_heads=2,
        ratio=0.5,
        chunk_size_tokens=128,
        page_size_rows=16,
        page_group_size=1,
        n_sink_tokens=4,
        profile=profile,
    )
    assert dict(zip(result.heads[0], result.pages[0], strict=True)) == {(0,): 2, (1,): 6}
