import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tangram.budgets import allocate
from tangram.budgets.problem import spread_order


def uniform(ratio, num_layers=6, num_kv_heads=8, page_group_size=2):
    return allocate(
        "uniform",
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        ratio=ratio,
        chunk_size_tokens=256,
        page_size_rows=16,
        page_group_size=page_group_size,
        n_sink_tokens=4,
    )


def test_groups_are_consecutive_heads_with_the_same_pages():
    result = uniform(0.25)
    assert result.heads == (((0, 1), (2, 3), (4, 5), (6, 7)),) * 6
    assert result.pages == ((4, 4, 4, 4),) * 6


@settings(max_examples=60, deadline=None)
@given(
    ratio=st.floats(1 / 16, 1),
    num_layers=st.integers(1, 40),
    groups=st.integers(1, 8),
)
def test_neither_groups_nor_layers_differ_by_more_than_a_page(ratio, num_layers, groups):
    pages = np.array(uniform(ratio, num_layers, 2 * groups).pages)
    assert np.ptp(pages) <= 1
    assert np.ptp(pages.sum(axis=1)) <= 1


def test_the_rest_is_spread_over_the_depth():
    more = np.array(uniform(5.5 / 16, num_layers=32, num_kv_heads=1, page_group_size=1).pages) - 5
    assert more.sum() == 16
    for start in range(0, 32, 8):
        assert 3 <= more[start : start + 8].sum() <= 5


def test_spread_order_is_a_permutation():
    for count in (1, 2, 7, 36, 100):
        assert sorted(spread_order(count)) == list(range(count))
