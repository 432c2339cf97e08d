"""Which rows are chosen: ties, noise, infinities, NaN, sinks."""

import math
import struct
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tangram.scorers import score_ranks, top_rows

INF, NAN = math.inf, math.nan
FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)


def column(*scores: float) -> torch.Tensor:
    return torch.tensor(scores, dtype=torch.float32).unsqueeze(-1)


def chosen(scores: torch.Tensor, rows: int, always: torch.Tensor | None = None) -> list[int]:
    return top_rows(scores, rows, always)[:, 0].tolist()


def rounded(score: float) -> float:
    """To 11 significant bits, halves away from zero, by exact fractions."""
    if math.isnan(score):
        return -INF
    if math.isinf(score) or score == 0:
        return score + 0.0
    _, exponent = math.frexp(score)
    # The least exponent of a float32: below it, bits have no smaller places to go.
    unit = Fraction(2) ** (max(exponent, -125) - 11)
    steps = math.floor(abs(Fraction(score)) / unit + Fraction(1, 2))
    magnitude = steps * unit
    return math.copysign(INF if magnitude >= 2**128 else float(magnitude), score)


@given(st.lists(FLOATS, min_size=1, max_size=40))
def test_ranks_order_scores_as_their_rounded_values_do(scores):
    ranks = score_ranks(torch.tensor(scores, dtype=torch.float32)).tolist()
    exact = [rounded(score) for score in scores]
    for a, x in zip(ranks, exact, strict=True):
        for b, y in zip(ranks, exact, strict=True):
            assert (a < b, a == b) == (x < y, x == y)


@given(FLOATS)
def test_a_rank_is_the_bits_of_the_rounded_score(score):
    rank = int(score_ranks(torch.tensor(score, dtype=torch.float32)))
    magnitude = struct.unpack("<f", struct.pack("<I", abs(rank)))[0]
    assert (-magnitude if rank < 0 else magnitude) == rounded(score)


@given(
    scores=st.lists(
        st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, INF, -INF, NAN]), FLOATS),
        min_size=1,
        max_size=30,
    ),
    data=st.data(),
)
def test_as_a_plain_sort_would_choose(scores, data):
    rows = data.draw(st.integers(0, len(scores)))
    always = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    order = sorted(
        range(len(scores)),
        key=lambda i: (always[i], 0 if always[i] else rounded(scores[i]), i),
        reverse=True,
    )
    found = chosen(column(*scores), rows, torch.tensor(always))
    assert found == sorted(order[:rows])


def test_of_equals_the_later_ones_are_kept():
    assert chosen(column(1, 1, 1, 1, 1), 2) == [3, 4]
    assert chosen(column(1, 5, 1, 5, 1), 3) == [1, 3, 4]


@pytest.mark.parametrize("seed", range(5))
def test_rounding_noise_changes_nothing(seed):
    """Few distinct values, each many times, as repeated words give."""
    random = torch.Generator().manual_seed(seed)
    clean = torch.randint(-40, 40, (3, 200, 4), generator=random).float() / 16
    for _ in range(5):
        noise = 1e-6 * (2 * torch.rand(clean.shape, generator=random) - 1)
        noisy = clean * (1 + noise)
        assert not torch.equal(noisy, clean)
        for rows in (1, 16, 77, 199):
            assert torch.equal(top_rows(noisy, rows), top_rows(clean, rows))


def test_differences_of_a_thousandth_count():
    assert chosen(column(1.001, 1.0, 1.0, 1.0), 1) == [0]
    assert chosen(column(-1.0, -1.001, -1.001), 1) == [0]


def test_infinities_and_nan():
    assert chosen(column(INF, 3e38, -INF, NAN, 0), 1) == [0]
    assert chosen(column(NAN, -3e38, NAN, 0), 2) == [1, 3]
    assert chosen(column(-INF, NAN, 0, -INF), 3) == [1, 2, 3]
    assert chosen(column(NAN, NAN, NAN), 2) == [1, 2]
    assert chosen(column(INF, INF, INF), 2) == [1, 2]


def test_minus_nan_is_no_more_than_nan():
    bits = torch.tensor([0x7FC00000, 0x7F800001, -0x400000], dtype=torch.int32)
    nans = bits.view(torch.float32)
    assert nans.isnan().all()
    assert len(set(score_ranks(nans).tolist())) == 1
    assert score_ranks(nans)[0] == score_ranks(torch.tensor(-INF))


def test_minus_zero_is_zero():
    assert chosen(column(-0.0, 0.0, -0.0), 2) == [1, 2]
    assert chosen(column(1e-45, -0.0), 1) == [1]  # the least number there is rounds to zero


def test_sinks_come_first_whatever_their_score():
    sinks = torch.tensor([True, True, False, False, False])
    assert chosen(column(-INF, NAN, INF, 5, 6), 3, sinks) == [0, 1, 2]
    assert chosen(column(-INF, NAN, INF, 5, 6), 2, sinks) == [0, 1]
    assert chosen(column(1, 1, 1, 1, 1), 4, sinks) == [0, 1, 3, 4]


def test_every_head_and_chunk_chooses_for_itself():
    random = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 2, 50, 4, generator=random)
    always = torch.zeros(3, 2, 50, dtype=torch.bool)
    always[0, :, :4] = True
    rows = top_rows(scores, 9, always)
    assert rows.shape == (3, 2, 9, 4)
    assert rows.dtype == torch.int64
    assert (rows.diff(dim=-2) > 0).all()
    for i in range(3):
        for j in range(2):
            for head in range(4):
                alone = top_rows(scores[i, j, :, head : head + 1], 9, always[i, j])
                assert torch.equal(rows[i, j, :, head : head + 1], alone)
                assert (alone[:4, 0] == torch.arange(4)).all() == (i == 0)


def test_views_are_fine():
    scores = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(top_rows(scores.T, 7), top_rows(scores.T.contiguous(), 7))
    shared = scores[0].unsqueeze(-1).expand(-1, 3)
    assert torch.equal(top_rows(shared, 7), top_rows(shared.contiguous(), 7))


def test_no_rows_and_all_rows():
    scores = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    assert top_rows(scores, 0).shape == (2, 0, 3)
    everything = torch.arange(5).view(1, 5, 1).expand(2, 5, 3)
    assert torch.equal(top_rows(scores, 5), everything)


@pytest.mark.parametrize("rows", [-1, 6])
def test_more_rows_than_tokens_are_a_bug(rows):
    with pytest.raises(AssertionError, match="rows of 5 tokens"):
        top_rows(torch.zeros(5, 1), rows)


def test_scores_of_another_precision_are_a_bug():
    with pytest.raises(AssertionError, match="float64"):
        top_rows(torch.zeros(5, 1, dtype=torch.float64), 1)
