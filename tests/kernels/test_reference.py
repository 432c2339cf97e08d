"""The references against loops over tokens: the cut of a step, attention, and packing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tangram.kernels.reference.attend import attend
from tangram.kernels.reference.seal import pack
from tangram.kernels.segments import cut_step
from tests.kernels.inputs import make_geometry, make_pool, relative_error

STEPS = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 200)), min_size=1, max_size=5)


@settings(deadline=None)
@given(steps=STEPS, chunk_pages=st.integers(1, 8))
def test_a_step_is_cut_at_multiples_of_the_chunk(steps, chunk_pages):
    C = 16 * chunk_pages
    geometry = make_geometry(
        [[1]], num_kv_heads=2, chunk_size_tokens=C, window_size_tokens=4, n_sink_tokens=0
    )
    counts = np.array([count for _, count in steps])
    before = np.array([before for before, _ in steps])
    query_start = np.concatenate([[0], np.cumsum(counts)])
    segments, sealing = cut_step(geometry, query_start, before + counts)

    flat = []
    for request, first, count, position in zip(
        segments.request,
        segments.first_query,
        segments.num_queries,
        segments.position,
        strict=True,
    ):
        assert 1 <= count <= C
        assert position // C == (position + count - 1) // C
        flat += [(request, first + i, position + i) for i in range(count)]
    assert flat == [
        (request, query_start[request] + i, before[request] + i)
        for request in range(len(steps))
        for i in range(counts[request])
    ]
    assert list(zip(sealing.request, sealing.chunk, strict=True)) == [
        (request, chunk)
        for request in range(len(steps))
        if counts[request]
        for chunk in range(before[request] // C, (before[request] + counts[request]) // C)
    ]


def naive_attention(pool, query, num_tokens, request):
    """One query at the last position of a request, by loops."""
    g, position = pool.geometry, num_tokens - 1
    out = torch.zeros(g.num_query_heads, g.head_size)
    layer = pool.layer
    for group, heads in enumerate(g.head_groups.heads[layer]):
        for member, head in enumerate(heads):
            rows = []
            for chunk in range(position // g.chunk_size_tokens):
                block = int(pool.sealed_table[request, chunk])
                for row in range(g.first_row(layer, group, chunk), g.budget_rows(layer, group)):
                    page = g.page_offsets[layer][group] + row // g.page_size_rows
                    rows.append(pool.sealed_cache[block, page, member, row % g.page_size_rows])
            for p in range(g.recent_start(position), position + 1):
                block = int(pool.recent_table[request, p // g.recent_block_tokens])
                rows.append(pool.recent_cache[block, head, p % g.recent_block_tokens])
            key, value = torch.stack(rows).float().split(g.head_size, dim=1)
            for i in range(g.queries_per_kv_head):
                query_head = head * g.queries_per_kv_head + i
                weights = (key @ query[query_head].float() * 0.125).softmax(dim=0)
                out[query_head] = weights @ value
    return out


@pytest.mark.parametrize("pages", [[[1, 3], [2, 4]], [[4], [1]]], ids=["two-groups", "one-group"])
@pytest.mark.parametrize("window", [0, 16, 33])
@pytest.mark.parametrize("layer", [0, 1])
def test_attention_reads_what_it_should_and_nothing_else(pages, window, layer):
    geometry = make_geometry(pages, window_size_tokens=window, head_size=32)
    pool = make_pool(geometry, [1, 17, 63, 64, 65, 128, 129, 300], layer=layer, seed=window)
    count = len(pool.num_tokens)
    query = pool.random(count, geometry.num_query_heads, geometry.head_size)
    out = torch.full_like(query, torch.nan)
    segments, _ = cut_step(geometry, np.arange(count + 1), np.array(pool.num_tokens))
    attend(
        query,
        segments,
        pool.view(),
        geometry=geometry,
        layer=layer,
        softmax_scale=0.125,
        out=out,
    )
    for request, num_tokens in enumerate(pool.num_tokens):
        expected = naive_attention(pool, query[request], num_tokens, request)
        assert relative_error(out[request], expected) < 1e-5


@pytest.mark.parametrize("rows", [64, 48, 20, 4])
def test_packed_rows_end_at_the_last_row(rows):
    geometry = make_geometry([[1, 4]])
    pool = make_pool(geometry, [64])
    pool.sealed_cache.fill_(torch.nan)
    raw = pool.random(1, geometry.num_kv_heads, 64, geometry.row_elements)
    chosen = torch.stack([torch.randperm(64)[:rows].sort().values for _ in range(2)], dim=1)[None]
    pack(
        pool.sealed_cache, torch.tensor([2]), raw, chosen, geometry=geometry, layer=0, group=1
    )  # fmt: skip
    first = geometry.page_offsets[0][1]
    pages = pool.sealed_cache[2, first : first + 4]
    for member, head in enumerate(geometry.head_groups.heads[0][1]):
        stored = pages[:, member].flatten(0, 1)
        assert torch.equal(stored[64 - rows :], raw[0, head, chosen[0, :, member]])
        assert not stored[: 64 - rows].any()
    assert pool.sealed_cache[2, :first].isnan().all(), "another group's pages were written"
    assert pool.sealed_cache[1].isnan().all(), "another block was written"
