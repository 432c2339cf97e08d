"""Random geometries, small enough that a test can count tokens one by one."""

from hypothesis import strategies as st

from tangram.geometry import Geometry, HeadGroups

MAX_CHUNKS = 5


@st.composite
def head_groups(draw, max_pages: int = 8) -> HeadGroups:
    layers = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    size = draw(st.integers(1, 3))
    heads = []
    for _ in range(layers):
        order = draw(st.permutations(range(groups * size)))
        heads.append([order[g * size : (g + 1) * size] for g in range(groups)])
    count = st.integers(1, max_pages)
    row = st.lists(count, min_size=groups, max_size=groups)
    pages = draw(st.lists(row, min_size=layers, max_size=layers))
    return HeadGroups.from_lists(heads, pages)


@st.composite
def geometries(draw) -> Geometry:
    page_rows = draw(st.sampled_from([1, 2, 4, 16]))
    chunk_pages = draw(st.integers(1, 8))
    groups = draw(head_groups(max_pages=chunk_pages))
    chunk = chunk_pages * page_rows
    window = draw(st.integers(0, chunk - 1))
    least_rows = min(min(pages) for pages in groups.pages) * page_rows
    return Geometry(
        head_groups=groups,
        num_query_heads=groups.num_kv_heads * draw(st.integers(1, 4)),
        head_size=draw(st.integers(1, 8)),
        itemsize_bytes=draw(st.sampled_from([1, 2, 4])),
        chunk_size_tokens=chunk,
        window_size_tokens=window,
        n_sink_tokens=draw(st.integers(0, min(chunk - window, least_rows))),
        page_size_rows=page_rows,
        has_query_ring=window > 0 and draw(st.booleans()),
        has_stored_scores=draw(st.booleans()),
    )


def positions(geometry: Geometry) -> st.SearchStrategy[int]:
    return st.integers(0, MAX_CHUNKS * geometry.chunk_size_tokens)


def layers_and_groups(geometry: Geometry) -> list[tuple[int, int]]:
    pages = geometry.head_groups.pages
    return [(layer, group) for layer, row in enumerate(pages) for group in range(len(row))]
