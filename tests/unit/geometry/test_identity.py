"""A geometry survives JSON, and its digest tells it from any other."""

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given

from tangram.errors import BudgetError
from tangram.geometry import Geometry, HeadGroups
from tests.unit.geometry.strategies import geometries, head_groups
from tests.unit.geometry.test_errors import geometry

OTHER = {
    "head_groups": HeadGroups.from_lists([[[0, 1], [2, 3]]], [[2, 2]]),
    "num_query_heads": 4,
    "head_size": 16,
    "itemsize_bytes": 4,
    "chunk_size_tokens": 128,
    "window_size_tokens": 9,
    "n_sink_tokens": 3,
    "page_size_rows": 8,
    "has_query_ring": True,
    "has_stored_scores": True,
}


@given(head_groups())
def test_head_groups_survive_lists(groups):
    assert HeadGroups.from_lists(*json.loads(json.dumps(groups.to_lists()))) == groups


@given(geometries())
def test_a_geometry_survives_json(g):
    again = Geometry.from_json(json.loads(json.dumps(g.to_json())))
    assert again == g
    assert hash(again) == hash(g)
    assert again.digest == g.digest


@given(geometries(), geometries())
def test_digests_are_equal_exactly_when_geometries_are(a, b):
    assert (a.digest == b.digest) == (a == b)


def test_every_field_is_changed_below():
    assert set(OTHER) == {field.name for field in fields(Geometry)}


@pytest.mark.parametrize("name", sorted(OTHER))
def test_a_change_of_any_field_changes_the_digest(name):
    changed = replace(geometry(), **{name: OTHER[name]})
    assert changed != geometry()
    assert changed.digest != geometry().digest


def test_the_order_of_heads_counts():
    """Rows of a page lie in the order of its heads."""
    swapped = HeadGroups.from_lists([[[1, 0], [2, 3]]], [[1, 2]])
    assert replace(geometry(), head_groups=swapped).digest != geometry().digest


def test_the_digest_is_the_same_in_every_process():
    assert geometry().digest == "c50ea364411b"


def test_budgets_of_the_same_size_leave_everything_but_offsets():
    one = geometry(head_groups=HeadGroups.from_lists([[[0, 1], [2, 3]]] * 2, [[2, 3], [1, 2]]))
    other = HeadGroups.from_lists([[[0, 3], [1, 2]]] * 2, [[1, 1], [4, 2]])
    made = one.replace_budgets(other)
    assert made.head_groups == other and made.digest != one.digest
    assert made.page_offsets == ((0, 1), (2, 6))
    for size in ("block_bytes", "sealed_block_bytes", "recent_block_tokens", "ring_blocks"):
        assert getattr(made, size) == getattr(one, size)
    assert made.replace_budgets(one.head_groups) == one


@pytest.mark.parametrize(
    "other",
    [
        ([[[0, 1], [2, 3]]] * 2, [[2, 3], [1, 3]]),
        ([[[0, 1], [2, 3]]] * 1, [[4, 4]]),
        ([[[0], [1], [2], [3]]] * 2, [[1, 1, 1, 1]] * 2),
        ([[[0, 1]]] * 2, [[4], [4]]),
    ],
)
def test_budgets_of_another_size_are_refused(other):
    one = geometry(head_groups=HeadGroups.from_lists([[[0, 1], [2, 3]]] * 2, [[2, 3], [1, 2]]))
    with pytest.raises(BudgetError, match="start another engine"):
        one.replace_budgets(HeadGroups.from_lists(*other))
