"""Sizes that do not fit each other are refused, naming the option."""

import pytest

from tangram.errors import BudgetError, ConfigurationError, TangramError
from tangram.geometry import Geometry, HeadGroups

GROUPS = HeadGroups.from_lists([[[0, 1], [2, 3]]], [[1, 2]])


def geometry(**changes) -> Geometry:
    sizes = {
        "head_groups": GROUPS,
        "num_query_heads": 8,
        "head_size": 8,
        "itemsize_bytes": 2,
        "chunk_size_tokens": 64,
        "window_size_tokens": 8,
        "n_sink_tokens": 4,
    }
    return Geometry(**(sizes | changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"chunk_size_tokens": 40}, ["--compression-chunk-size is 40", "16 rows"]),
        ({"chunk_size_tokens": 8}, ["--compression-chunk-size is 8"]),
        ({"chunk_size_tokens": 0}, ["--compression-chunk-size is 0", "above 0"]),
        ({"chunk_size_tokens": -64}, ["--compression-chunk-size is -64", "above 0"]),
        ({"window_size_tokens": 64}, ["--compression-window-size is 64", "below"]),
        ({"window_size_tokens": -1}, ["--compression-window-size is -1"]),
        ({"n_sink_tokens": 57}, ["--compression-n-sink-tokens is 57", "56 tokens"]),
        ({"n_sink_tokens": -1}, ["--compression-n-sink-tokens is -1"]),
        (
            {"window_size_tokens": 0, "has_query_ring": True},
            ["--compression-window-size is 0", "--compression-scorer"],
        ),
        ({"num_query_heads": 6}, ["6 query heads", "4 KV heads"]),
    ],
)
def test_a_bad_size_is_a_configuration_error(changes, named):
    with pytest.raises(ConfigurationError) as raised:
        geometry(**changes)
    assert all(words in str(raised.value) for words in named), raised.value


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_sink_tokens": 17}, ["layer 0", "16 to 32 rows", "17 of --compression-n-sink-tokens"]),
        ({"chunk_size_tokens": 16}, ["layer 0", "16 to 32 rows", "16 of --compression-chunk-size"]),
    ],
)
def test_budgets_must_hold_the_sinks_and_fit_a_chunk(changes, named):
    with pytest.raises(BudgetError) as raised:
        geometry(**changes)
    assert all(words in str(raised.value) for words in named), raised.value


def test_limits_themselves_are_allowed():
    g = geometry(chunk_size_tokens=32, window_size_tokens=16, n_sink_tokens=16)
    assert g.kept_rows(0, 0, 0) == g.n_sink_tokens
    assert geometry(window_size_tokens=0, n_sink_tokens=0).recent_start(64) == 64
    assert geometry(window_size_tokens=63, n_sink_tokens=1).kept_rows(0, 1, 0) == 1


@pytest.mark.parametrize(
    ("heads", "pages", "named"),
    [
        ([], [], "0 layers"),
        ([[[0]]], [], "1 layers and pages 0"),
        ([[]], [[]], "layer 0 has no heads"),
        ([[[]]], [[1]], "layer 0 has no heads"),
        ([[[0], [1]]], [[1]], "layer 0 has 2 head groups and 1 page counts"),
        ([[[0, 1], [2]]], [[1, 1]], "layer 0: every head group needs 2 heads"),
        ([[[0, 1]], [[0], [1]]], [[1], [1, 1]], "layer 1: every head group needs 2 heads"),
        ([[[0, 0]]], [[1]], r"layer 0: .* heads 0 to 1 once each, got \[0, 0\]"),
        ([[[1, 2]]], [[1]], r"layer 0: .* got \[1, 2\]"),
        ([[[0], [1]], [[0]]], [[1, 1], [1]], r"layer 1: .* heads 0 to 1 once each, got \[0\]"),
        ([[[0]], []], [[1], []], r"layer 1: .* got \[\]"),
        ([[[0], [1]]], [[1, 0]], "layer 0: every head group keeps at least one page"),
    ],
)
def test_head_groups_must_hold_every_head_once(heads, pages, named):
    with pytest.raises(BudgetError, match=named):
        HeadGroups.from_lists(heads, pages)


def test_errors_are_value_errors_of_this_package():
    for error in (BudgetError, ConfigurationError):
        assert issubclass(error, TangramError) and issubclass(error, ValueError)
