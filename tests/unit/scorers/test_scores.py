"""Every scorer against plain loops, and what must hold of all of them."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tangram.errors import ScorerError
from tangram.scorers import Chunks, attention_over_chunk, get_scorer, group_query_heads, top_rows
from tangram.scorers import scorer_names as all_names

NAMES = all_names(third_party=False)
# Whole results of float32 sums of about a hundred terms against float64.
TOLERANCE = {"rtol": 2e-5, "atol": 1e-6}


def one(chunks: Chunks, index: tuple[int, ...]) -> Chunks:
    """The chunk at a leading index, alone."""
    return replace(
        chunks,
        keys=chunks.keys[index],
        values=chunks.values[index],
        positions=chunks.positions[index],
        window_queries=chunks.window_queries[index],
        stored_scores=chunks.stored_scores[index],
    )


def close(found, expected):
    torch.testing.assert_close(found.double(), expected.double(), **TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tokens": 1},
        {"tokens": 2, "window": 1},
        {"tokens": 3, "kv_heads": 1, "group": 1, "head_size": 2},
        {"tokens": 63, "kv_heads": 3, "group": 1, "head_size": 6, "window": 7},
        {"tokens": 111, "kv_heads": 1, "group": 8, "head_size": 100},
        {"rotary_dim": 4},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "seed": 3},
    ],
    ids=str,
)
def test_as_the_formula_says(name, shape, make_chunks, naive):
    chunks = make_chunks(**shape)
    scores = get_scorer(name).score(chunks)
    assert scores.dtype == torch.float32
    assert scores.shape == chunks.keys.shape[:-1]
    close(scores, naive(name, chunks))


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("name", ["expected_attention", "snap_kv", "tova"])
def test_any_number_of_query_heads(name, group, make_chunks, naive):
    chunks = make_chunks(tokens=19, group=group, seed=group)
    close(get_scorer(name).score(chunks), naive(name, chunks))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("snap_kv", {"kernel_size": 1}),
        ("snap_kv", {"kernel_size": 7}),
        ("snap_kv", {"kernel_size": 101}),  # longer than the chunk
        ("expected_attention", {"n_future_tokens": 1}),
        ("expected_attention", {"n_future_tokens": 33, "epsilon": 0}),
        ("expected_attention", {"epsilon": 1.5}),
    ],
)
def test_parameters_do_what_they_say(name, parameters, make_chunks, naive):
    chunks = make_chunks()
    scorer = get_scorer(name, **parameters)
    scores = scorer.score(chunks)
    close(scores, naive(name, chunks, **parameters))
    assert not torch.allclose(scores, get_scorer(name).score(chunks))
    assert scorer.parameters().items() >= parameters.items()
    assert type(scorer)(**scorer.parameters()) == scorer


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    leading=st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple),
    tokens=st.integers(1, 70),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_chunks_do_not_see_each_other(make_chunks, name, leading, tokens, kv_heads, group, seed):
    chunks = make_chunks(leading, tokens=tokens, kv_heads=kv_heads, group=group, seed=seed)
    scorer = get_scorer(name)
    scores = scorer.score(chunks)
    assert scores.shape == (*leading, tokens, kv_heads)
    for index in product(*map(range, leading)):
        alone = scorer.score(one(chunks, index))
        torch.testing.assert_close(scores[index], alone, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_rows_alone_and_among_others(name, dtype, make_chunks):
    chunks = make_chunks((4,), tokens=128, head_size=64, window=32, dtype=dtype)
    scorer = get_scorer(name)
    rows = top_rows(scorer.score(chunks), 32)
    for i in range(4):
        assert torch.equal(rows[i], top_rows(scorer.score(one(chunks, (i,))), 32))


@pytest.mark.parametrize("name", NAMES)
def test_a_slice_of_a_cache_scores_like_a_copy_of_it(name, make_chunks):
    chunks = make_chunks((2,))
    both = torch.cat((chunks.keys, chunks.values), dim=-1)
    keys, values = both.split(chunks.head_size, dim=-1)
    assert not keys.is_contiguous()
    sliced = replace(chunks, keys=keys, values=values)
    assert torch.equal(get_scorer(name).score(sliced), get_scorer(name).score(chunks))


@pytest.mark.parametrize("name", NAMES)
def test_the_input_stays_as_it_is(name, make_chunks):
    chunks, same = make_chunks(), make_chunks()
    get_scorer(name).score(chunks).fill_(7.0)
    for field in ("keys", "values", "positions", "window_queries", "stored_scores"):
        assert torch.equal(getattr(chunks, field), getattr(same, field))
    for array, expected in zip(chunks.statistics.values(), same.statistics.values(), strict=True):
        assert torch.equal(array, expected)


@pytest.mark.parametrize("magnitude", [0.0, 1e-20, 1e4])
@pytest.mark.parametrize("name", NAMES)
def test_no_nan_at_extreme_magnitudes(name, magnitude, make_chunks):
    chunks = make_chunks((2,), magnitude=magnitude)
    assert torch.isfinite(get_scorer(name).score(chunks)).all()


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_on_their_own(name, make_chunks):
    """No view with strides of 0: who gets scores may write to them and reshape them."""
    scores = get_scorer(name).score(make_chunks((2,)))
    assert scores.is_contiguous()


def test_snap_kv_averages_each_window_query(make_chunks):
    """Not the queries first: a softmax of the mean query is another thing."""
    chunks = make_chunks(window=3)
    scorer = get_scorer("snap_kv")
    alone = [
        scorer.score(replace(chunks, window_queries=q)) for q in chunks.window_queries.split(1)
    ]
    close(scorer.score(chunks), torch.stack(alone).mean(dim=0))


def test_tova_is_one_decision_for_the_layer(make_chunks):
    scores = get_scorer("tova").score(make_chunks(kv_heads=3))
    assert torch.equal(scores, scores[:, :1].expand_as(scores))
    close(scores.sum(dim=0), torch.ones(3))


def test_key_diff_keeps_the_odd_one_out(make_chunks):
    chunks = make_chunks(tokens=9)
    keys = torch.zeros_like(chunks.keys)
    keys[..., 0] = 1.0
    keys[4, :, :2] = torch.tensor([0.0, 3.0])
    scores = get_scorer("key_diff").score(replace(chunks, keys=keys))
    assert (top_rows(scores, 1) == 4).all()


def test_streaming_llm_keeps_the_last_tokens_of_a_very_long_chunk(make_chunks):
    chunks = make_chunks(tokens=5000, kv_heads=1, head_size=2)
    rows = top_rows(get_scorer("streaming_llm").score(chunks), 3000)
    assert torch.equal(rows[:, 0], torch.arange(2000, 5000))


@pytest.mark.parametrize("name", ["snap_kv", "tova"])
@pytest.mark.parametrize("window", [None, 0])
def test_a_missing_window_is_named(name, window, make_chunks):
    chunks = make_chunks(window=0)
    if window is None:
        chunks = replace(chunks, window_queries=None)
    with pytest.raises(ScorerError, match="--compression-window-size of at least 1"):
        get_scorer(name).score(chunks)


@pytest.mark.parametrize("lacks", ["query_mean", "query_covariance", "rope_frequencies"])
def test_missing_statistics_are_named(lacks, make_chunks):
    chunks = make_chunks()
    statistics = {k: v for k, v in chunks.statistics.items() if k != lacks}
    scorer = get_scorer("expected_attention")
    with pytest.raises(ScorerError, match=f"needs {lacks} .*--compression-profile"):
        scorer.score(replace(chunks, statistics=statistics))
    with pytest.raises(ScorerError, match=f"needs {lacks} .*--compression-profile"):
        scorer.check_inputs(32, statistics)


def test_inputs_are_checked_before_the_first_chunk(make_chunks):
    get_scorer("key_diff").check_inputs(0, ())
    get_scorer("snap_kv").check_inputs(1, ())
    get_scorer("expected_attention").check_inputs(0, make_chunks().statistics)
    with pytest.raises(ScorerError, match="snap_kv needs the queries of the observation window"):
        get_scorer("snap_kv").check_inputs(0, ())
    with pytest.raises(ScorerError, match="got no statistics"):
        get_scorer("expected_attention").check_inputs(32, ())


@pytest.mark.parametrize(
    ("name", "of_another_model"),
    [
        ("query_mean", torch.zeros(6, 9)),
        ("query_mean", torch.zeros(5, 10)),
        ("query_covariance", torch.zeros(6, 10)),
        ("rope_frequencies", torch.zeros(6)),
    ],
)
def test_statistics_of_another_model_are_refused(name, of_another_model, make_chunks):
    chunks = make_chunks()
    statistics = {**chunks.statistics, name: of_another_model}
    with pytest.raises(ScorerError, match="of another model"):
        get_scorer("expected_attention").score(replace(chunks, statistics=statistics))


def test_query_heads_that_kv_heads_do_not_divide_are_refused(make_chunks):
    chunks = make_chunks(tokens=5, kv_heads=2, group=3)
    queries = chunks.window_queries[:, :5]
    with pytest.raises(ScorerError, match="5 query heads do not belong to 2 KV heads"):
        get_scorer("snap_kv").score(replace(chunks, window_queries=queries))


def test_query_heads_in_groups():
    heads = torch.arange(12).reshape(1, 12, 1)
    grouped = group_query_heads(heads, num_kv_heads=4, dim=-2)
    assert grouped.shape == (1, 4, 3, 1)
    for q in range(12):
        assert grouped[0, q // 3, q % 3, 0] == q


def test_attention_is_over_the_chunk_alone(make_chunks):
    chunks = make_chunks((2,), tokens=7, kv_heads=2, group=3, window=4)
    attention = attention_over_chunk(chunks.window_queries, chunks)
    assert attention.shape == (2, 2, 3, 4, 7)
    close(attention.sum(dim=-1), torch.ones(2, 2, 3, 4))


def test_chunks_tell_their_sizes(make_chunks):
    chunks = make_chunks((2, 3), tokens=7, kv_heads=2, head_size=10, window=4)
    assert (chunks.num_tokens, chunks.num_kv_heads, chunks.head_size) == (7, 2, 10)
    assert torch.equal(chunks.boundaries, chunks.positions[..., 0] + 7 + 4)
    assert chunks.boundaries.dtype == torch.int64


@pytest.mark.parametrize("field", ["values", "positions"])
def test_chunks_of_mixed_lengths_are_a_bug(field, make_chunks):
    chunks = make_chunks(tokens=7)
    with pytest.raises(AssertionError):
        replace(chunks, **{field: getattr(chunks, field)[1:]})
