"""Where rows lie: pages of a block, page tables, rows in use."""

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.geometry.strategies import MAX_CHUNKS, geometries, layers_and_groups


@given(geometries())
def test_the_pages_of_a_block_are_disjoint_and_complete(g):
    used = []
    for layer, group in layers_and_groups(g):
        first = g.page_offsets[layer][group]
        used += range(first, first + g.head_groups.pages[layer][group])
    assert sorted(used) == list(range(g.pages_per_block))


@given(geometries(), st.integers(0, MAX_CHUNKS), st.data())
def test_page_tables_are_disjoint_and_complete(g, chunks, data):
    """A request's blocks lie anywhere in the pool, in any order."""
    pool = data.draw(st.permutations(range(chunks + 2)))
    blocks = pool[:chunks]
    tables = [
        block * g.pages_per_block + g.page_offsets[layer][group] + page
        for layer, group in layers_and_groups(g)
        for block in blocks
        for page in range(g.head_groups.pages[layer][group])
    ]
    owned = [b * g.pages_per_block + i for b in blocks for i in range(g.pages_per_block)]
    assert sorted(tables) == sorted(owned)


@given(geometries())
def test_sums_are_exact(g):
    rows = sum(
        g.budget_rows(layer, group) * g.page_group_size for layer, group in layers_and_groups(g)
    )
    assert rows == g.rows_per_block == g.pages_per_block * g.page_rows
    assert g.sealed_block_bytes == rows * 2 * g.head_size * g.itemsize_bytes
    raw_heads = sum(len(group) for layer in g.head_groups.heads for group in layer)
    assert g.token_bytes == raw_heads * 2 * g.head_size * g.itemsize_bytes
    assert g.num_query_heads == g.num_kv_heads * g.queries_per_kv_head


@given(geometries())
def test_kept_rows_end_at_the_last_row_and_only_chunk_0_begins_late(g):
    for layer, group in layers_and_groups(g):
        budget = g.budget_rows(layer, group)
        for chunk in range(MAX_CHUNKS):
            tokens = len(range(*g.chunk_range(chunk)))
            kept, first = g.kept_rows(layer, group, chunk), g.first_row(layer, group, chunk)
            assert kept == min(budget, tokens)
            assert first + kept == budget
            assert first == 0 or chunk == 0
        assert g.kept_rows(layer, group, 0) >= g.n_sink_tokens
        assert (g.first_row(layer, group, 0) > 0) == (
            budget > g.chunk_size_tokens - g.window_size_tokens
        )


@given(geometries())
def test_a_head_s_rows_over_all_chunks_are_one_run(g):
    for layer, group in layers_and_groups(g):
        budget = g.budget_rows(layer, group)
        used = [
            chunk * budget + row
            for chunk in range(MAX_CHUNKS)
            for row in range(g.first_row(layer, group, chunk), budget)
        ]
        assert used == list(range(g.first_row(layer, group, 0), MAX_CHUNKS * budget))
