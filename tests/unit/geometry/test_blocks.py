"""Blocks of the pool: their sizes, and how many a request holds."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tangram.geometry import BlockCount, Geometry, HeadGroups
from tests.unit.geometry.strategies import MAX_CHUNKS, geometries, positions
from tests.unit.geometry.test_errors import geometry


def raw_tokens(g: Geometry, num_computed: int) -> set[int]:
    """Tokens in no sealed chunk, by the definition of a chunk."""
    C, W = g.chunk_size_tokens, g.window_size_tokens
    sealed: set[int] = set()
    for j in range(num_computed // C):
        sealed |= set(range(j * C - W, (j + 1) * C - W))
    return set(range(num_computed)) - sealed


def recent_bytes(g: Geometry, tokens: int) -> int:
    """Of a recent block: the rows of every layer, and the rows that hold their scores."""
    rows = tokens * g.num_kv_heads
    for_scores = 0
    while g.has_stored_scores and for_scores * g.row_bytes < 4 * rows:
        for_scores += 1
    return g.num_layers * (rows + for_scores) * g.row_bytes


@given(geometries())
def test_the_recent_block_is_the_longest_that_fits(g):
    C, R = g.chunk_size_tokens, g.recent_block_tokens
    assert C % R == 0
    assert g.recent_block_bytes == recent_bytes(g, R) == g.num_layers * g.recent_layer_bytes
    assert R * g.token_bytes <= g.sealed_block_bytes
    longer = [r for r in range(R + 1, C + 1) if C % r == 0]
    assert all(r * g.token_bytes > g.sealed_block_bytes for r in longer)


@given(geometries())
def test_scores_change_nothing_of_a_layout_but_its_recent_blocks(g):
    without = replace(g, has_stored_scores=False)
    assert without.recent_block_bytes == without.recent_block_tokens * g.token_bytes
    same = "sealed_block_bytes page_offsets token_bytes ring_block_tokens recent_block_tokens"
    for size in same.split():
        assert getattr(g, size) == getattr(without, size)
    assert "has_stored_scores" not in without.to_json()


def test_scores_take_four_bytes_a_token_layer_and_head():
    """Of bfloat16 heads of 128 elements less than a hundredth of the rows."""
    heads = HeadGroups.from_lists([[[0, 1, 2, 3], [4, 5, 6, 7]]] * 2, [[4, 4]] * 2)
    g = Geometry(heads, 32, 128, 2, 256, 32, 4, has_stored_scores=True)
    R = g.recent_block_tokens
    assert R == 64 and g.recent_layer_bytes == 64 * 8 * (512 + 4)
    assert g.block_bytes == g.recent_block_bytes == g.sealed_block_bytes * 129 // 128
    roomy = HeadGroups.from_lists([[[0, 1, 2, 3], [4, 5, 6, 7]]] * 2, [[4, 5]] * 2)
    roomy = replace(g, head_groups=roomy)
    assert roomy.recent_block_tokens == 64 and roomy.block_bytes == roomy.sealed_block_bytes


@given(geometries())
def test_the_query_ring_holds_the_window(g):
    assert g.query_bytes == g.num_layers * g.num_query_heads * g.head_size * g.itemsize_bytes
    if g.has_query_ring:
        assert g.ring_blocks * g.ring_block_tokens == g.window_size_tokens
        assert g.ring_block_tokens * g.query_bytes <= g.block_bytes
    else:
        assert g.ring_blocks == g.ring_block_tokens == 0


@given(geometries())
def test_a_block_is_as_wide_as_a_sealed_one_unless_one_query_is_wider(g):
    one_query = g.query_bytes if g.has_query_ring else 0
    raw = recent_bytes(g, g.recent_block_tokens)
    assert g.has_stored_scores or raw <= g.sealed_block_bytes
    assert g.block_bytes == max(g.sealed_block_bytes, one_query, raw)


@given(geometries(), st.data())
def test_blocks_held_is_a_naive_count_in_every_step(g, data):
    """A request runs in steps of any size; blocks come before a step, and go after it."""
    C, R = g.chunk_size_tokens, g.recent_block_tokens
    largest = data.draw(st.integers(1, 2 * C + 3))
    computed, alive, peak = 0, set(), 0
    while computed < MAX_CHUNKS * C:
        total = computed + data.draw(st.integers(1, largest))
        alive |= {t // R for t in range(computed, total)}
        held = g.blocks_held(total, computed)
        assert held.recent == len(alive)
        assert held.sealed == sum((j + 1) * C <= total for j in range(total))
        assert held.query_ring == g.ring_blocks
        peak = max(peak, len(alive))
        computed = total
        alive &= {t // R for t in raw_tokens(g, computed)}
        assert g.blocks_held(computed).recent == len(alive)
        assert g.blocks_held(computed) == g.blocks_held(computed, computed)
    assert peak <= g.max_recent_blocks(largest, max_model_len=computed)


@given(geometries())
def test_a_step_reads_no_raw_token_further_back_than_the_most_that_are_recent(g):
    C = g.chunk_size_tokens
    lengths = range((MAX_CHUNKS - 1) * C, MAX_CHUNKS * C)
    # A step reads what is raw before it, whatever it goes on to seal.
    back = [n - min(raw_tokens(g, n), default=n) for n in range(MAX_CHUNKS * C)]
    assert max(back) <= g.max_recent_tokens
    assert max(back[n] for n in lengths) == g.max_recent_tokens


@given(geometries(), st.data())
def test_the_most_recent_blocks_are_bounded_by_the_model_length_too(g, data):
    max_model_len = data.draw(st.integers(1, 3 * g.chunk_size_tokens))
    computed = data.draw(st.integers(0, max_model_len - 1))
    total = data.draw(st.integers(computed + 1, max_model_len))
    most = g.max_recent_blocks(max_model_len, max_model_len)
    assert g.blocks_held(total, computed).recent <= most
    assert most <= -(-max_model_len // g.recent_block_tokens) + 1


@given(geometries(), st.data())
def test_a_longer_step_holds_more_and_a_later_start_less(g, data):
    total = data.draw(positions(g))
    growing = [g.blocks_held(total + more, total) for more in range(2 * g.chunk_size_tokens)]
    for before, after in zip(growing, growing[1:], strict=False):
        assert all(b <= a for b, a in zip(before, after, strict=True))
    resting = [g.blocks_held(total, computed) for computed in range(total + 1)]
    for earlier, later in zip(resting, resting[1:], strict=False):
        assert later.recent <= earlier.recent
        assert (later.sealed, later.query_ring) == (earlier.sealed, earlier.query_ring)


@given(geometries())
def test_at_rest_blocks_go_only_when_a_chunk_is_sealed(g):
    held = [g.blocks_held(n) for n in range(MAX_CHUNKS * g.chunk_size_tokens + 1)]
    for n, (before, after) in enumerate(zip(held, held[1:], strict=False), start=1):
        boundary = n % g.chunk_size_tokens == 0
        assert after.sealed == before.sealed + boundary
        assert after.recent >= before.recent or boundary


@given(geometries(), st.data())
def test_bytes_are_blocks_times_their_size(g, data):
    n = data.draw(positions(g))
    held = g.blocks_held(n)
    assert held.total == held.sealed + held.recent + held.query_ring
    assert g.held_bytes(n) == held.total * g.block_bytes
    assert g.full_bytes(n) == n * g.token_bytes
    assert (held.sealed, held.recent) == (0, 0) if n == 0 else held.total > 0


def test_a_block_holds_one_token_s_queries_even_when_they_are_wider_than_a_sealed_chunk():
    g = Geometry(
        head_groups=HeadGroups.from_lists([[[0]]], [[1]]),
        num_query_heads=64,
        head_size=8,
        itemsize_bytes=2,
        chunk_size_tokens=64,
        window_size_tokens=8,
        n_sink_tokens=0,
        has_query_ring=True,
    )
    assert g.query_bytes == 1024 > g.sealed_block_bytes == 512
    assert (g.ring_block_tokens, g.ring_blocks, g.block_bytes) == (1, 8, 1024)


@given(geometries(), st.data())
def test_retained_rows_and_saved_bytes_are_those_of_the_requests(g, data):
    lengths = data.draw(st.lists(positions(g), max_size=4))
    rows = sealed = first = tail = 0
    held = BlockCount(0, 0, 0)
    for tokens in lengths:
        chunks = g.sealed_chunks(tokens)
        sealed, first, tail = (
            sealed + chunks,
            first + (chunks > 0),
            tail + tokens - chunks * g.chunk_size_tokens,
        )
        held = BlockCount(*map(sum, zip(held, g.blocks_held(tokens), strict=True)))
        for chunk in range(chunks):
            for layer, groups in enumerate(g.head_groups.heads):
                for group, heads in enumerate(groups):
                    rows += len(heads) * g.kept_rows(layer, group, chunk)
    assert g.retained_rows(sealed, first) == rows
    assert g.rows_bytes(rows) == rows * g.row_bytes
    saved = sum(g.full_bytes(tokens) - g.held_bytes(tokens) for tokens in lengths)
    assert g.saved_bytes(held, tail) == saved


@given(geometries(), st.data())
def test_a_block_s_shape_has_the_sizes_of_its_layout(g, data):
    """What ranks agree on says everything but where a head's rows lie."""
    shape, n = g.block_shape, data.draw(positions(g))
    computed = data.draw(st.integers(0, n))
    for name in ("sealed_block_bytes", "recent_block_tokens", "ring_blocks", "block_bytes"):
        assert getattr(shape, name) == getattr(g, name)
    assert shape.blocks_held(n, computed) == g.blocks_held(n, computed)
    assert shape.recent_start(n) == g.recent_start(n)


def test_layouts_that_differ_in_budgets_alone_have_one_shape():
    g = geometry()
    (first, *others), *layers = g.head_groups.pages
    moved = HeadGroups(g.head_groups.heads, (tuple([*others, first]), *layers))
    other = replace(g, head_groups=moved)
    assert other.block_shape == g.block_shape and other.digest != g.digest
    more = HeadGroups(g.head_groups.heads, ((first + 1, *others), *layers))
    assert replace(g, head_groups=more).block_shape != g.block_shape
