"""Sealing what a step completes, as the device finds it: the kernel against scorers and `pack`."""

from dataclasses import dataclass

import pytest
import torch

from tangram.kernels.cache_view import CacheView, recent_scores
from tangram.kernels.reference.attend import gather_scores
from tangram.kernels.seal_decode import (
    KERNEL_SCORERS,
    QueryMoments,
    RowWeights,
    SealScorer,
    SealTables,
    has_kernel,
    reference,
)
from tangram.scorers import get_scorer, scorer_names
from tangram.scorers.base import Chunks
from tangram.scorers.expected_attention import average_rotation
from tangram.scorers.select import SCORE_BITS, score_ranks, top_rows
from tests.kernels.inputs import make_geometry, make_pool, needs_of

NOISE = {
    "streaming_llm": 0.0,
    "key_norm": 1e-6,
    "key_diff": 1e-6,
    "expected_attention": 1e-5,
    "learned": 1e-5,
    "snap_kv": 1e-5,
    "tova": 1e-5,
    "fastkvzip": 0.0,
    "kvzap": 0.0,
}
"""How far a score may be off, in shares of itself; closer calls are not in the tests."""

SCALE = 0.2


@dataclass
class Case:
    """One step on the CPU, every layer of it with raw rows."""

    pool: object  # inputs.Pool
    base: torch.Tensor  # the whole pool of blocks
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    ring: torch.Tensor | None
    ring_table: torch.Tensor | None
    query: torch.Tensor
    statistics: dict[str, torch.Tensor]


def in_base(view, base, offset=0):
    """The same view, moved by some elements, of another tensor's storage."""
    return base.as_strided(view.shape, view.stride(), view.storage_offset() + offset)


def recent_caches(case, base):
    g, first = case.pool.geometry, case.pool.recent_cache
    page = g.recent_layer_bytes // g.itemsize_bytes
    return [in_base(first, base, layer * page) for layer in range(g.num_layers)]


def make_case(
    geometry,
    num_tokens,
    *,
    dtype=torch.float32,
    step_tokens=None,
    seed=0,
    padding=0,
    **queries,
):
    g = geometry
    pool = make_pool(g, num_tokens, dtype=dtype, seed=seed, step_tokens=step_tokens)
    base = pool.recent_cache._base
    first, *others = recent_caches(Case(pool, *[None] * 7), base)
    for cache in others:
        cache.copy_(torch.where(first.isnan(), first, pool.random(*first.shape)))
        if g.has_stored_scores:
            raw = torch.zeros(len(first), 1, 1, dtype=torch.bool)
            raw[pool.recent_table.long()] = True
            is_token = raw & ~first[..., 0].isnan()
            fresh = torch.randn(int(is_token.sum()), generator=pool.generator)
            recent_scores(cache)[is_token] = fresh
    step_tokens = step_tokens or [1] * len(num_tokens)
    starts = torch.tensor([0, *step_tokens, *[0] * padding]).cumsum(0).to(torch.int32)
    lens = torch.tensor([*num_tokens, *[0] * padding], dtype=torch.int32)
    for name in ("sealed_table", "recent_table"):
        table = getattr(pool, name)
        setattr(pool, name, torch.nn.functional.pad(table, (0, 0, 0, padding)))
    query = pool.random(int(starts[-1]) + padding, g.num_query_heads, g.head_size)
    statistics = query_statistics(g, seed=seed, **queries)
    case = Case(pool, base, starts, lens, None, None, query, statistics)
    if g.has_query_ring:
        blocks = len(lens) * g.ring_blocks + 2
        shape = blocks, g.ring_block_tokens, g.num_layers, g.num_query_heads, g.head_size
        case.ring = torch.full(shape, torch.nan, dtype=dtype)
        order = 2 + torch.randperm(blocks - 2, generator=torch.Generator().manual_seed(seed))
        case.ring_table = order.view(len(lens), -1).to(torch.int32)
        case.ring[2:] = pool.random(*case.ring[2:].shape)
    return case


def window_queries(case, layer, request, boundary):
    """[1, W, query_heads, head_size]: from the ring, and of one layer from the step."""
    g = case.pool.geometry
    W, R = g.window_size_tokens, g.ring_block_tokens
    row = int(request)
    old = int(case.seq_lens[row] - case.query_start[row + 1] + case.query_start[row])
    found = []
    for position in range(boundary - W, boundary):
        if position >= old and case.query is not None:
            found.append(case.query[int(case.query_start[row]) + position - old])
        else:
            block = case.ring_table[row, position % W // R]
            found.append(case.ring[block, position % W % R, layer])
    return torch.stack(found)[None]


def query_statistics(geometry, rotary_dim=None, rank=None, strength=1.0, seed=0):
    """What a profile holds for scorers, for all layers, by name; float32, frequencies float64.

    Args:
        geometry: the layout.
        rotary_dim: dimensions that RoPE turns; all when absent.
        rank: of the covariances; full when absent.
        strength: standard deviation of the queries' elements.
        seed: of everything random.
    """
    g, generator = geometry, torch.Generator().manual_seed(seed)
    shape = g.num_layers, g.num_query_heads, g.head_size
    root = torch.randn(*shape, rank or g.head_size, generator=generator)
    root *= strength / g.head_size**0.5
    half = (rotary_dim or g.head_size) // 2
    features = 2 * g.head_size + 4
    weights = torch.randn(g.num_layers, g.num_kv_heads, features, generator=generator)
    return {
        "row_weights": strength * weights / features**0.5,
        "query_mean": strength * torch.randn(shape, generator=generator),
        "query_covariance": root @ root.mT,
        "rope_frequencies": 1e4 ** -(torch.arange(half, dtype=torch.float64) / half),
    }


def of_layer(statistics, layer):
    """The part of `query_statistics` that a scorer sees of a layer."""
    return {n: a if n == "rope_frequencies" else a[layer] for n, a in statistics.items()}


def on_device(statistics, geometry, scorer, chunks, device):
    """`query_statistics` as the kernel reads them."""
    boundaries = geometry.chunk_size_tokens * torch.arange(1, chunks + 1)
    frequencies = statistics["rope_frequencies"]
    if scorer.name == "learned":
        return RowWeights.of(
            statistics["row_weights"], frequencies, num_chunks=chunks, device=device,
            chunk_size_tokens=geometry.chunk_size_tokens,
            window_size_tokens=geometry.window_size_tokens,
        )  # fmt: skip
    return QueryMoments.of(
        statistics["query_mean"],
        statistics["query_covariance"],
        average_rotation(frequencies, boundaries, scorer.n_future_tokens),
        epsilon=scorer.epsilon,
        device=device,
    )


def expected_base(case, layers, name, parameters):
    """The pool as the reference leaves it. Fails where noise could decide what is kept."""
    pool, base = case.pool, case.base.clone()
    g, scorer = pool.geometry, get_scorer(name, **parameters)

    for layer in layers:
        view = view_of(case, base).of_layer(recent_caches(case, base)[layer])

        def choose(request, position, raw, rows, layer=layer, view=view):
            key, value = raw.transpose(1, 2).split(g.head_size, dim=-1)
            boundary = int(position[0, -1]) + 1 + g.window_size_tokens
            needs = scorer.needs_window_queries
            chunks = Chunks(
                keys=key,
                values=value,
                positions=position,
                softmax_scale=SCALE,
                window_size_tokens=g.window_size_tokens,
                window_queries=window_queries(case, layer, request, boundary) if needs else None,
                statistics=of_layer(case.statistics, layer) if scorer.needs_statistics else {},
                stored_scores=(
                    gather_scores(view, request, position, g) if g.has_stored_scores else None
                ),
            )
            scores, sinks = scorer.score(chunks), position < g.n_sink_tokens
            kept = top_rows(scores, rows, sinks)
            assert_no_close_call(scores, sinks, kept, name)
            return kept

        reference.seal_decode(view, geometry=g, layer=layer, choose=choose)
    return base


def assert_no_close_call(scores, sinks, kept, name):
    size = scores.abs()
    if name == "key_diff":  # a cosine near zero is a sum of larger terms; zero is one of zeros
        size = size.amax(dim=-2, keepdim=True) * (scores != 0)
    margin = (size * NOISE[name]).nan_to_num()
    index = torch.arange(scores.shape[-2]).unsqueeze(-1)

    def order(moved):
        rank = score_ranks(moved).long().masked_fill(sinks.unsqueeze(-1), 2**31)
        return rank * len(index) + index

    low, high = order(scores - margin), order(scores + margin)
    is_kept = torch.zeros_like(low, dtype=torch.bool).scatter(-2, kept, True)
    worst = low.masked_fill(~is_kept, 2**62).amin(dim=-2)
    best = high.masked_fill(is_kept, -(2**62)).amax(dim=-2)
    assert (worst > best).all(), "a close call: choose another seed for this case"


def sealed_base(case, device, layers, name, parameters):
    """The pool as the kernel leaves it."""
    from tangram.kernels.seal_decode import kernel

    base = case.base.to(device, copy=True)
    caches = recent_caches(case, base)
    tables = SealTables.of(case.pool.geometry, layers, [caches[layer] for layer in layers])
    kernel.seal_decode(
        tables,
        view_of(case, base),
        scorer=seal_scorer(case, name, parameters, device),
        softmax_scale=SCALE,
        query=case.query.to(device) if len(layers) == 1 else None,
    )
    return base.cpu()


def view_of(case, base):
    """The cache in `base`, and everything else on its device; raw tokens of layer 0."""
    pool = case.pool
    recent = in_base(pool.recent_cache, base)
    view = CacheView(
        sealed=in_base(pool.sealed_cache, base),
        sealed_table=pool.sealed_table,
        recent=recent,
        recent_table=pool.recent_table,
        query_start=case.query_start,
        seq_lens=case.seq_lens,
        ring=case.ring,
        ring_table=case.ring_table,
        scores=recent_scores(recent) if pool.geometry.has_stored_scores else None,
    )
    return CacheView(*(None if tensor is None else tensor.to(base.device) for tensor in view))


def seal_scorer(case, name, parameters, device):
    """A scorer as launches are given it, with the case's statistics where it needs some."""
    g, scorer = case.pool.geometry, get_scorer(name, **parameters)
    moments = None
    if scorer.needs_statistics:
        chunks = int(case.seq_lens.max()) // g.chunk_size_tokens
        moments = on_device(case.statistics, g, scorer, chunks, device)
    return SealScorer(name, parameters.get("kernel_size", 5), moments)


def bits(tensor):
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def check(case, device, layers, name, **parameters):
    """The whole pool is what the reference makes of it, to the bit; how much of it changed."""
    if len(layers) > 1:
        case.query = None
    expected = expected_base(case, layers, name, parameters)
    got = sealed_base(case, device, layers, name, parameters)
    assert torch.equal(bits(got), bits(expected))
    return int((bits(got) != bits(case.base)).sum())


GEOMETRIES = {
    # A head with one page, heads that keep more than chunk 0 has (48), heads that keep all (64).
    "small": dict(pages=[[1, 4], [4, 2]]),
    "odd heads": dict(pages=[[1, 2, 4]], num_kv_heads=3, queries_per_kv_head=5),
    "odd sizes": dict(
        pages=[[1, 2]], num_kv_heads=2, head_size=80, chunk_size_tokens=48, window_size_tokens=7
    ),
    "no window": dict(pages=[[1, 2]], window_size_tokens=0, n_sink_tokens=0),
    "large": dict(
        pages=[[1, 16]], num_kv_heads=2, head_size=128, chunk_size_tokens=256,
        window_size_tokens=32,
    ),
}  # fmt: skip


def geometry_of(name, scorer, dtype=torch.float32):
    needs = needs_of(scorer)
    if needs["has_query_ring"] and name == "no window":
        pytest.skip("the scorer needs a window")
    return make_geometry(**GEOMETRIES[name], dtype=dtype, **needs)


@pytest.mark.parametrize("scorer", KERNEL_SCORERS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_seals_those_at_a_boundary_and_touches_nothing_else(kernel_device, name, scorer):
    g = geometry_of(name, scorer)
    C = g.chunk_size_tokens
    case = make_case(g, [2 * C, C, C + 1, C - 1, 3 * C, 1], padding=2, seed=12)
    assert check(case, kernel_device, [0], scorer) > 0


@pytest.mark.parametrize("scorer", KERNEL_SCORERS)
def test_a_step_without_a_boundary_changes_nothing(kernel_device, scorer):
    g = geometry_of("small", scorer)
    case = make_case(g, [1, 63, 65, 127, 200])
    assert check(case, kernel_device, [0], scorer) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scorer", KERNEL_SCORERS)
def test_half_types(kernel_device, scorer, dtype):
    multiplies = scorer in ("expected_attention", "snap_kv", "tova")
    if multiplies and (kernel_device, dtype) == ("cpu", torch.bfloat16):
        pytest.skip("Triton's interpreter multiplies the bits of bf16 matrices")
    case = make_case(geometry_of("small", scorer, dtype), [64, 256, 70], dtype=dtype, seed=2)
    assert check(case, kernel_device, [0], scorer) > 0


@pytest.mark.parametrize("scorer", KERNEL_SCORERS)
def test_all_layers_in_one_launch(kernel_device, scorer):
    case = make_case(geometry_of("small", scorer), [128, 64, 65], seed=3)
    assert check(case, kernel_device, [0, 1], scorer) > 0


@pytest.mark.parametrize("scorer", KERNEL_SCORERS)
def test_a_step_of_many_tokens_seals_several_chunks(kernel_device, scorer):
    g = geometry_of("small", scorer)
    case = make_case(g, [200, 128, 70, 64], step_tokens=[150, 1, 3, 64], seed=4)
    assert check(case, kernel_device, [0], scorer) > 0


@pytest.mark.parametrize("scorer", ["key_norm", "key_diff"])
def test_of_equal_keys_the_later_is_kept(kernel_device, scorer):
    g = make_geometry([[1, 2]])
    case = make_case(g, [64, 128], seed=5)
    for head in range(g.num_kv_heads):  # three different keys, again and again
        rows = case.pool.recent_cache[:, head]
        there = ~rows[..., 0].isnan()
        words = case.pool.random(3, g.head_size)
        rows[..., : g.head_size][there] = words[torch.arange(int(there.sum())) % 3]
    assert check(case, kernel_device, [0], scorer) > 0


def test_keys_of_no_length_score_zero(kernel_device):
    case = make_case(make_geometry([[1, 2]]), [64, 128], seed=6)
    keys = case.pool.recent_cache[..., :64]
    keys[:, :, ::3] = torch.where(keys[:, :, ::3].isnan(), keys[:, :, ::3], 0)
    assert check(case, kernel_device, [0], "key_diff") > 0
    keys[~keys.isnan()] = 0
    assert check(case, kernel_device, [0], "key_diff") > 0


@pytest.mark.parametrize("scorer", KERNEL_SCORERS)
def test_a_key_that_is_not_a_number_goes_last(kernel_device, scorer):
    g = geometry_of("small", scorer)
    case = make_case(g, [128], seed=7)
    block = case.pool.recent_table[0, 80 // g.recent_block_tokens]
    case.pool.recent_cache[block, :, 80 % g.recent_block_tokens, 0] = torch.nan
    assert check(case, kernel_device, [0], scorer) > 0


@pytest.mark.parametrize("kernel_size", [1, 3, 9])
def test_the_smoothing_of_snap_kv(kernel_device, kernel_size):
    case = make_case(geometry_of("small", "snap_kv"), [64, 128], seed=8)
    assert check(case, kernel_device, [0], "snap_kv", kernel_size=kernel_size) > 0


EXPECTED_CASES = {
    "one query head": dict(queries_per_kv_head=1),
    "four query heads": dict(num_kv_heads=2, queries_per_kv_head=4),
    "heads of 128": dict(num_kv_heads=2, head_size=128),
    "half of the dimensions turn": dict(rotary_dim=32),
    "few dimensions turn, of an odd size": dict(head_size=80, rotary_dim=22),
    "covariances of low rank": dict(rank=3),
    "long chunks": dict(
        num_kv_heads=2, chunk_size_tokens=256, window_size_tokens=32, rotary_dim=48
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", EXPECTED_CASES)
def test_expected_attention_of_other_queries(kernel_device, name, dtype):
    if (kernel_device, dtype) == ("cpu", torch.bfloat16):
        pytest.skip("Triton's interpreter multiplies the bits of bf16 matrices")
    options = dict(EXPECTED_CASES[name])
    queries = {key: options.pop(key) for key in ("rotary_dim", "rank") if key in options}
    g = make_geometry([[1, 2], [3, 1]], dtype=dtype, **options)
    C = g.chunk_size_tokens
    case = make_case(
        g, [C, 3 * C, 5 * C - 3], step_tokens=[1, C + 1, 1], dtype=dtype, seed=12, **queries
    )
    assert check(case, kernel_device, [1], "expected_attention") > 0


@pytest.mark.parametrize(
    "parameters", [dict(n_future_tokens=1), dict(n_future_tokens=33, epsilon=0), dict(epsilon=2.5)]
)
def test_the_parameters_of_expected_attention(kernel_device, parameters):
    case = make_case(geometry_of("small", "expected_attention"), [64, 128], seed=13)
    usual, other = (
        expected_base(case, [0], "expected_attention", options) for options in ({}, parameters)
    )
    assert not torch.equal(bits(usual), bits(other)), "no choice hangs on the parameters"
    assert check(case, kernel_device, [0], "expected_attention", **parameters) > 0


def test_the_factor_of_a_covariance():
    """Of one without variance in most directions, too, which rounding makes not quite positive."""
    root = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    root[1, :, :, 2:] = 0
    covariance = root @ root.mT
    covariance[1, 0] -= 1e-6 * torch.eye(16)
    rotation = torch.ones(1, 8, dtype=torch.complex64)
    found = QueryMoments.of(root[..., 0], covariance, rotation, epsilon=0.5, device="cpu")
    assert found.factor.dtype == torch.float32 and found.epsilon == 0.5
    torch.testing.assert_close(found.factor @ found.factor.mT, covariance, rtol=0, atol=5e-6)


def test_the_rounding_is_that_of_the_scorers():
    from tangram.kernels.seal_decode import kernel

    assert kernel._DROPPED_BITS.value == 24 - SCORE_BITS


def test_which_scorers_have_a_kernel():
    assert has_kernel("key_diff") and not has_kernel("value_norm")
    assert set(KERNEL_SCORERS) == set(scorer_names(third_party=False))


def test_a_launch_is_given_a_scorer_s_parameters():
    g = make_geometry([[1, 4]])
    made = SealScorer.of(get_scorer("snap_kv", kernel_size=9), {}, g, 300, "cpu")
    assert made == SealScorer("snap_kv", 9, None) and made.reads_queries
    assert not SealScorer.of(get_scorer("key_diff"), {}, g, 300, "cpu").reads_queries


@pytest.mark.gpu
@pytest.mark.parametrize("scorer", KERNEL_SCORERS)
@pytest.mark.parametrize("head_size", [64, 256])
@pytest.mark.parametrize("chunk", [1024, 2048])
def test_long_chunks(kernel_device, chunk, head_size, scorer):
    g = make_geometry(
        [[1, chunk // 16], [9, 40]], num_kv_heads=2, head_size=head_size, dtype=torch.bfloat16,
        chunk_size_tokens=chunk, window_size_tokens=64,
        **needs_of(scorer),
    )  # fmt: skip
    case = make_case(g, [chunk, 2 * chunk, chunk + 1], dtype=torch.bfloat16, seed=33)
    assert check(case, kernel_device, [0, 1], scorer) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("scorer", ["key_diff", "expected_attention", "learned"])
def test_a_captured_launch_follows_the_lengths(scorer):
    from tangram.kernels.seal_decode import kernel

    g = make_geometry([[1, 4], [4, 2]], dtype=torch.bfloat16)
    cases = [make_case(g, n, dtype=torch.bfloat16, seed=10) for n in ([128, 65], [129, 128])]
    expected = [expected_base(case, [0, 1], scorer, {}) for case in cases]
    by = seal_scorer(cases[0], scorer, {}, "cuda")
    shape = max(case.base.shape[0] for case in cases), cases[0].base.shape[1]
    base = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    columns = [max(c.pool.recent_table.shape[1] for c in cases), 4]
    recent_table = torch.zeros(2, columns[0], dtype=torch.int32, device="cuda")
    sealed_table = torch.zeros(2, columns[1], dtype=torch.int32, device="cuda")
    lens = torch.zeros(2, dtype=torch.int32, device="cuda")
    start = torch.arange(3, dtype=torch.int32, device="cuda")
    recent = in_base(cases[0].pool.recent_cache, base)
    page = g.num_kv_heads * g.recent_block_tokens * g.row_elements
    tables = SealTables.of(g, [0, 1], [recent, in_base(recent, base, page)])
    sealed = in_base(cases[0].pool.sealed_cache, base)

    def launch():
        view = CacheView(sealed, sealed_table, recent, recent_table, start, lens)
        kernel.seal_decode(tables, view, scorer=by, softmax_scale=SCALE)

    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for case, wanted in zip(cases, expected, strict=True):
        base[: len(case.base)] = case.base.cuda()
        recent_table[:, : case.pool.recent_table.shape[1]] = case.pool.recent_table.cuda()
        sealed_table[:, : case.pool.sealed_table.shape[1]] = case.pool.sealed_table.cuda()
        lens.copy_(case.seq_lens)
        graph.replay()
        assert torch.equal(bits(base[: len(case.base)].cpu()), bits(wanted))
