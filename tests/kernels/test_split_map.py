"""The split map: thread blocks in proportion to the budgets, and their lines on the device."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tangram.geometry import Geometry, HeadGroups
from tangram.kernels.decode import DecodeTables, DecodeWorkspace, make_split_map
from tangram.kernels.decode.split_map import MAX_SPLITS
from tangram.kernels.decode.tables import Column
from tests.kernels.inputs import make_geometry

PAGES = st.lists(st.integers(1, 16), min_size=1, max_size=4)


def geometry_of(pages, **sizes):
    heads = [[4 * group + member for member in range(4)] for group in range(len(pages))]
    sizes = dict(chunk_size_tokens=256, window_size_tokens=32, n_sink_tokens=4) | sizes
    return Geometry(
        head_groups=HeadGroups.from_lists([heads], [list(pages)]),
        num_query_heads=16 * len(pages),
        head_size=128,
        itemsize_bytes=2,
        **sizes,
    )


def test_an_example():
    split_map = make_split_map(geometry_of([6, 2]), 0, batch_size=4, thread_blocks=32)
    assert split_map.splits == (6, 2)  # 4 requests: as many blocks, of 4 heads each, for a split
    assert split_map.heads_per_program == 4
    assert split_map.thread_blocks == 32
    assert split_map.balance() == (1.0, 1.5)
    assert split_map.evenly().splits == (4, 4)
    assert split_map.evenly(5).splits == (5, 5)


@settings(deadline=None)
@given(pages=PAGES, batch_size=st.integers(1, 40), thread_blocks=st.integers(1, 600))
def test_as_many_blocks_as_there_may_be(pages, batch_size, thread_blocks):
    split_map = make_split_map(geometry_of(pages), 0, batch_size, thread_blocks)
    one = batch_size * len(pages)
    assert min(split_map.splits) >= 1
    assert split_map.thread_blocks <= max(one, thread_blocks)
    if max(split_map.splits) < MAX_SPLITS:
        assert split_map.thread_blocks > thread_blocks - batch_size
    balance = split_map.balance()
    assert balance.split_map >= 1 - 1e-12
    assert len(set(split_map.evenly().splits)) == 1
    assert split_map.evenly().thread_blocks <= split_map.thread_blocks


@settings(deadline=None, max_examples=60)
@given(pages=st.lists(st.integers(1, 16), min_size=2, max_size=3), total=st.integers(2, 9))
def test_no_other_cut_has_a_smaller_largest_load(pages, total):
    split_map = make_split_map(geometry_of(pages), 0, 1, total)
    count = sum(split_map.splits)
    best = min(
        max(rows / parts for rows, parts in zip(split_map.budget_rows, cut, strict=True))
        for cut in product(range(1, count + 1), repeat=len(pages))
        if sum(cut) == count
    )
    largest = max(
        rows / parts for rows, parts in zip(split_map.budget_rows, split_map.splits, strict=True)
    )
    assert largest == pytest.approx(best)


@settings(deadline=None)
@given(pages=PAGES, batch_size=st.integers(1, 8), thread_blocks=st.integers(1, 400))
def test_every_slot_belongs_to_one_item(pages, batch_size, thread_blocks):
    geometry = geometry_of(pages)
    split_map = make_split_map(geometry, 0, batch_size, thread_blocks)
    tables = DecodeTables.make(geometry, split_map, "cpu")
    items = tables.items.tolist()
    slots = [item[Column.FIRST_SLOT] + item[Column.SPLIT] for item in items]
    assert sorted(slots) == list(range(len(items)))
    assert len(items) == sum(split_map.splits)
    for item in items:
        group = item[Column.RANK] // 4
        assert item[Column.MEMBER] == 0
        assert item[Column.FIRST_PAGE] == geometry.page_offsets[0][group]
        assert item[Column.BUDGET] == geometry.budget_rows(0, group)
        assert item[Column.FIRST_ROW] == geometry.first_row(0, group, 0)
        for place in range(4):
            of_head = tables.heads[tables.order[4 * group + place]].tolist()
            assert of_head == [item[Column.FIRST_SLOT], item[Column.NUM_SPLITS], place]
    loads = [item[Column.BUDGET] / item[Column.NUM_SPLITS] for item in items]
    assert loads == sorted(loads, reverse=True)
    workspace = DecodeWorkspace.allocate([tables])
    assert workspace.partial_out.shape == (batch_size * len(items) * 4, 4, 128)


@given(data=st.data(), rows=st.integers(1, 8192))
def test_thereciprocal_divides(data, rows):
    from tangram.kernels.decode.tables import _exact_below, reciprocal

    assert _exact_below(rows) >= 2**32 // 8192
    below = st.integers(0, _exact_below(rows) // rows - 1).map(lambda chunk: chunk * rows)
    for x in (data.draw(below), data.draw(below) + rows - 1, _exact_below(rows) - 1):
        assert (x * reciprocal(rows)) >> 32 == x // rows


def test_a_workspace_has_room_for_all_of_its_tables():
    geometry = make_geometry([[1, 3], [2, 4]], num_kv_heads=4)
    every = [
        DecodeTables.make(geometry, make_split_map(geometry, layer, batch, 64), "cpu")
        for layer, batch in product(range(2), (1, 2, 8))
    ]
    workspace = DecodeWorkspace.allocate(every)
    assert len(workspace.lse_log2) == max(
        t.batch_size * t.num_items * t.heads_per_program for t in every
    )
