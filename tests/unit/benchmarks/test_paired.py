"""Paired shares and their intervals, on data of which they are known."""

import numpy as np
import pytest

from benchmarks.accuracy.paired import mean_interval, paired_share, shown


def test_the_share_is_of_sums():
    found = paired_share([4, 0, 6], [8, 2, 10])
    assert found.share == pytest.approx(0.5)
    assert 0 <= found.low < 0.5 < found.high <= 1


def test_the_same_loss_everywhere_leaves_nothing_open():
    # Conversations differ much, but all lose half: unpaired, the interval would be wide.
    assert paired_share([1, 2, 4, 0], [2, 4, 8, 0]) == pytest.approx((0.5, 0.5, 0.5))


def test_the_interval_is_that_of_the_bootstraps_theory():
    random = np.random.default_rng(1)
    ours = random.binomial(8, 0.6, size=400)
    found = paired_share(ours, [8] * 400)
    deviation = ours.std() / 8 / np.sqrt(400)
    assert found.high - found.low == pytest.approx(2 * 1.96 * deviation, rel=0.05)
    assert found == paired_share(ours, [8] * 400)


def test_nothing_to_compare_with():
    assert paired_share([0, 0], [0, 0]) is None
    assert shown(None) == "-"
    # Draws without a right answer of full KV say nothing.
    assert paired_share([1, 0], [1, 0]) == pytest.approx((1, 1, 1))


def test_mean_of_texts():
    assert mean_interval([0.25] * 8) == pytest.approx((0.25, 0.25, 0.25))
    found = mean_interval([0.0, 1.0] * 50)
    assert found.share == 0.5 and found.high - found.low == pytest.approx(0.196, rel=0.1)
    assert shown(mean_interval([0.871] * 3)) == "87.1 (87.1 to 87.1)"
