"""Budgets and memory on the page are those that are served."""

import pytest

from tangram.budgets import allocate
from tangram.cli.report.layouts import (
    CONTEXTS,
    MAX_RATIOS,
    Settings,
    head_pages,
    layouts,
    memory_bytes,
)
from tangram.errors import BudgetError, ConfigurationError
from tangram.geometry import HeadGroups


def test_pages_of_heads_whatever_the_groups():
    groups = HeadGroups(heads=(((0, 3), (1, 2)), ((2, 3), (0, 1))), pages=((5, 1), (2, 4)))
    assert head_pages(groups).tolist() == [[5, 1, 1, 5], [4, 4, 2, 2]]


def test_the_usual_ratios_are_those_that_a_chunk_allows(make_profile):
    # One page of 16 rows in a chunk of 64 is a quarter.
    found = Settings.of(make_profile(chunk_size_tokens=64, window_size_tokens=8))
    assert found.ratios == (0.25, 0.3, 0.4, 0.5, 0.75)
    assert found.page_group_size == 2  # of four KV heads


def test_measured_ratios_and_their_group_size_come_first(make_profile):
    entry = {"ratio": 0.35, "page_group_size": 2}
    odd = [{"ratio": "x"}, 3, {"ratio": 0.2, "page_group_size": 3}, {"ratio": 7}]
    found = Settings.of(make_profile(extra={"measured": [entry, *odd]}))
    assert 0.35 in found.ratios and found.page_group_size == 2
    assert len(found.ratios) <= MAX_RATIOS
    asked = Settings.of(make_profile(extra={"measured": [entry]}), page_group_size=1)
    assert asked.page_group_size == 1


def test_a_ratio_or_a_size_that_cannot_be_had_is_refused(make_profile):
    with pytest.raises(BudgetError, match="--compression-ratio 0.01 is too low"):
        Settings.of(make_profile(), ratios=(0.01, 0.5))
    with pytest.raises(ConfigurationError, match="--page-group-size is 3"):
        Settings.of(make_profile(), page_group_size=3)


def test_layouts_are_those_of_the_server(make_profile):
    profile = make_profile()
    settings = Settings.of(profile, ratios=(0.25, 0.5), page_group_size=2)
    found, missing = layouts(profile, settings, has_query_ring=False)
    assert {"uniform", "crosslayer", "perlayer", "mass", "error"} <= set(found)
    assert not {"uniform", "crosslayer", "perlayer", "mass", "error"} & set(missing)
    for level, of_ratio in found.items():
        for layout, ratio in zip(of_ratio, settings.ratios, strict=True):
            served = allocate(
                level,
                num_layers=3,
                num_kv_heads=4,
                ratio=ratio,
                chunk_size_tokens=256,
                page_size_rows=16,
                page_group_size=2,
                n_sink_tokens=4,
                profile=profile,
            )
            assert layout.head_groups == served


def test_levels_whose_arrays_are_missing_are_told_with_the_reason(make_profile, without):
    profile = make_profile(arrays=without("mass", "threshold_share/perlayer"))
    found, missing = layouts(profile, Settings.of(profile), has_query_ring=False)
    assert "mass_curve" in missing["mass"] and "perlayer" in missing["perlayer"]
    assert {"uniform", "crosslayer", "error"} <= set(found)


def test_memory_by_hand(make_profile):
    profile = make_profile()
    settings = Settings.of(profile, ratios=(0.25,), page_group_size=2)
    found, _ = layouts(profile, settings, has_query_ring=False)
    memory = memory_bytes(found["uniform"])
    at = CONTEXTS.index(4096)
    # A token of 3 layers x 4 heads x 2 x 64 elements x 2 bytes; 256 blocks of 16 tokens.
    assert memory["full"][at] == 4096 * 3072
    # 16 sealed chunks of 64 rows, and tokens 3,808 to 4,095 in 5 blocks of 64 tokens.
    assert memory["compressed"][0][at] == (16 + 5) * 64 * 3072


def test_all_levels_of_a_ratio_hold_the_same(make_profile):
    profile = make_profile()
    found, _ = layouts(profile, Settings.of(profile), has_query_ring=True)
    memories = [memory_bytes(of_ratio) for of_ratio in found.values()]
    assert all(memory == memories[0] for memory in memories)
