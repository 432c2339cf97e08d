"""Which tokens a query sees: chunks, recent tokens, and nothing twice."""

from hypothesis import given
from hypothesis import strategies as st

from tangram.geometry import Geometry
from tests.unit.geometry.strategies import MAX_CHUNKS, geometries, positions


def chunk_by_definition(g: Geometry, position: int) -> int:
    """The chunk j with jC - W <= position < (j+1)C - W."""
    C, W = g.chunk_size_tokens, g.window_size_tokens
    (j,) = [j for j in range(MAX_CHUNKS + 2) if j * C - W <= position < (j + 1) * C - W]
    return j


@given(geometries(), st.integers(0, MAX_CHUNKS))
def test_chunks_tile_the_tokens_below_the_last_window(g, chunks):
    C, W = g.chunk_size_tokens, g.window_size_tokens
    ranges = [g.chunk_range(j) for j in range(chunks)]
    tokens = [t for r in ranges for t in range(r.start, r.stop)]
    assert tokens == list(range(max(0, chunks * C - W)))
    assert all(chunk_by_definition(g, t) == j for j, r in enumerate(ranges) for t in range(*r))


@given(geometries())
def test_only_chunk_0_is_shorter(g):
    lengths = [len(range(*g.chunk_range(j))) for j in range(MAX_CHUNKS)]
    assert lengths[0] == g.chunk_size_tokens - g.window_size_tokens
    assert set(lengths[1:]) == {g.chunk_size_tokens}


@given(geometries(), st.data())
def test_a_query_sees_every_token_once_sealed_or_raw(g, data):
    p = data.draw(positions(g))
    sealed = [t for j in range(g.sealed_chunks(p)) for t in range(*g.chunk_range(j))]
    raw = list(range(g.recent_start(p), p + 1))
    assert sealed + raw == list(range(p + 1))
    assert all(chunk_by_definition(g, t) < p // g.chunk_size_tokens for t in sealed)
    assert all(chunk_by_definition(g, t) >= p // g.chunk_size_tokens for t in raw)


@given(geometries())
def test_chunks_and_the_first_raw_token_only_move_forward(g):
    lengths = range(MAX_CHUNKS * g.chunk_size_tokens + 1)
    sealed = [g.sealed_chunks(n) for n in lengths]
    start = [g.recent_start(n) for n in lengths]
    assert sealed == sorted(sealed)
    assert start == sorted(start)
    for before, after in zip(lengths, lengths[1:], strict=False):
        boundary = after % g.chunk_size_tokens == 0
        assert sealed[after] - sealed[before] == boundary
        assert start[after] == start[before] or boundary


@given(geometries())
def test_the_window_is_raw_at_every_boundary(g):
    for n in range(0, MAX_CHUNKS * g.chunk_size_tokens + 1, g.chunk_size_tokens):
        assert n - g.recent_start(n) == min(n, g.window_size_tokens)
