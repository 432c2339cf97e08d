"""The oracle itself: against transformers' own attention, and against loops over the definition."""

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers
from hypothesis import example, given
from hypothesis import strategies as st

from tangram.geometry import HeadGroups
from tangram.scorers import get_scorer, top_rows
from tangram.scorers.base import Chunks, Scorer
from tests.engine.oracle import Oracle, best_tokens, is_close_call, rounded

C, W, S, P = 32, 8, 4, 16
VOCABULARY = 97
QUERY_HEADS, KV_HEADS, LAYERS = 8, 4, 2
SIZES = {"chunk_size_tokens": C, "window_size_tokens": W, "n_sink_tokens": S, "page_size_rows": P}

HALF = HeadGroups.from_lists([[[0, 2], [3, 1]], [[0, 1], [2, 3]]], [[1, 2], [2, 1]])
ALL = HeadGroups.from_lists([[[0, 1, 2, 3]]] * LAYERS, [[C // P]] * LAYERS)
ONE_PAGE = HeadGroups.from_lists([[[0, 1, 2, 3]]] * LAYERS, [[1]] * LAYERS)


def save_model(folder, name: str = "Qwen3", num_layers: int = LAYERS) -> str:
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.15,  # so that attention is far from uniform
        tie_word_embeddings=True,
    )
    torch.manual_seed(7)
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("qwen3"))


def tokens(n: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (n,), generator=generator).tolist()


def plain_logprobs(path: str, ids: list[int], attention: str) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation=attention
    )
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)


@dataclass(frozen=True)
class Mixed(Scorer):
    """A score of position and head that has no pattern, and many ties."""

    name: ClassVar[str] = "mixed"

    def score(self, chunks: Chunks) -> torch.Tensor:
        heads = torch.arange(chunks.num_kv_heads)
        return ((chunks.positions[:, None] * 37 + heads * 101) % 23).float()


@dataclass(frozen=True)
class Recording(Mixed):
    """Keeps what it was shown."""

    name: ClassVar[str] = "recording"
    needs_window_queries: ClassVar[bool] = True
    seen: ClassVar[list[Chunks]] = []

    def score(self, chunks: Chunks) -> torch.Tensor:
        self.seen.append(chunks)
        return super().score(chunks)


# -- against transformers ------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Qwen3", "Qwen2", "Llama"])
def test_keeping_all_is_the_model_itself(tmp_path, name, attention):
    path = save_model(tmp_path, name)
    ids = tokens(3 * C + 5)
    expected = plain_logprobs(path, ids, attention)
    kept_all = Oracle(path, ALL, get_scorer("key_diff"), **SIZES).logprobs(ids)
    full = Oracle(path, None, None, **SIZES).logprobs(ids)
    assert expected.shape == (len(ids), VOCABULARY)
    torch.testing.assert_close(kept_all, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(full, expected, atol=1e-5, rtol=0)


def test_greedy_is_the_model_s_own(model_path):
    ids = tokens(C + 3)
    answer = Oracle(model_path, None, None, **SIZES).greedy(ids, 4)
    for token in answer:
        assert token == int(plain_logprobs(model_path, ids, "sdpa")[-1].argmax())
        ids.append(token)


def test_fewer_rows_change_the_answer_after_the_first_boundary_only(model_path):
    ids = tokens(3 * C)
    full = Oracle(model_path, None, None, **SIZES).logprobs(ids)
    little = Oracle(model_path, ONE_PAGE, get_scorer("key_diff"), **SIZES).logprobs(ids)
    changed = (little - full).abs().amax(dim=-1)
    assert changed[:C].max() < 1e-6
    assert changed[C:].min() > 1e-3


# -- schedule invariance: an answer depends on the tokens before it only ---------------------------


@pytest.mark.parametrize("scorer", ["key_diff", "snap_kv", "streaming_llm"])
@pytest.mark.parametrize("end", [C - 1, C, C + 1, 2 * C, 2 * C + W, 3 * C])
def test_later_tokens_change_nothing(model_path, scorer, end):
    oracle = Oracle(model_path, HALF, get_scorer(scorer), **SIZES)
    ids = tokens(3 * C + 9)
    whole = oracle.logprobs(ids)
    other = oracle.logprobs(ids[:end] + tokens(len(ids) - end, seed=1))
    torch.testing.assert_close(other[:end], whole[:end], atol=1e-5, rtol=0)
    assert (other[end:] - whole[end:]).abs().max() > 1e-2
    torch.testing.assert_close(oracle.logprobs(ids[:end]), whole[:end], atol=1e-5, rtol=0)


# -- the mask against the definition -------------------------------------------------------------


def kept_by_definition(layer: int, head: int, num_tokens: int) -> set[int]:
    """Tokens that a head keeps of all sealed chunks under `Mixed`, token by token."""
    pages = next(
        pages
        for heads, pages in zip(HALF.heads[layer], HALF.pages[layer], strict=True)
        if head in heads
    )
    kept = set()
    for j in range(num_tokens // C):
        candidates = [t for t in range(num_tokens) if j * C - W <= t < (j + 1) * C - W]
        chosen = [t for t in candidates if t < S]
        while candidates and len(chosen) < min(pages * P, len(candidates)):
            best = None
            for t in candidates:
                score = (t * 37 + head * 101) % 23
                if t not in chosen and (best is None or score >= best[0]):
                    best = (score, t)
            chosen.append(best[1])
        kept |= set(chosen)
    return kept


@pytest.mark.parametrize("num_tokens", [C - 1, C, 3 * C + 11])
def test_the_mask_is_the_definition(model_path, num_tokens):
    oracle = Oracle(model_path, HALF, Mixed(), **SIZES)
    oracle.logprobs(tokens(num_tokens))
    assert [kept.shape for kept in oracle.kept] == [(KV_HEADS, num_tokens)] * LAYERS
    for layer in range(LAYERS):
        mask = oracle.mask(layer).tolist()
        for head in range(KV_HEADS):
            kept = kept_by_definition(layer, head, num_tokens)
            for p in range(num_tokens):
                sealed = C * (p // C) - W
                for t in range(num_tokens):
                    expected = t <= p and (t >= sealed or t in kept)
                    assert mask[head][p][t] == expected, (layer, head, p, t)


def test_a_head_keeps_its_budget_of_every_chunk(model_path):
    oracle = Oracle(model_path, HALF, get_scorer("key_diff"), **SIZES)
    oracle.logprobs(tokens(3 * C))
    bounds = [0, C - W, 2 * C - W, 3 * C - W]
    for layer, groups in enumerate(HALF.heads):
        for heads, pages in zip(groups, HALF.pages[layer], strict=True):
            for head in heads:
                kept = oracle.kept[layer][head]
                counts = [int(kept[a:b].sum()) for a, b in zip(bounds, bounds[1:], strict=False)]
                assert counts == [min(pages * P, C - W), pages * P, pages * P]
                assert kept[:S].all() and not kept[bounds[-1] :].any()


def test_a_query_head_reads_the_rows_of_its_kv_head(model_path):
    """Attention under the mask, query by query, over a list of the tokens that are seen."""
    oracle = Oracle(model_path, HALF, Mixed(), **SIZES)
    generator = torch.Generator().manual_seed(3)
    num_tokens, head_size, scale = 2 * C + 5, 16, 0.3
    query, key, value = (
        torch.randn(heads, num_tokens, head_size, generator=generator)
        for heads in (QUERY_HEADS, KV_HEADS, KV_HEADS)
    )
    oracle.kept = []
    out = [oracle._attend(layer, query, key, value, scale) for layer in range(LAYERS)]
    for layer, query_head in itertools.product(range(LAYERS), range(QUERY_HEADS)):
        head = query_head // 2
        kept = kept_by_definition(layer, head, num_tokens)
        for p in range(num_tokens):
            seen = [t for t in range(p + 1) if t >= C * (p // C) - W or t in kept]
            weights = [math.exp(scale * float(query[query_head, p] @ key[head, t])) for t in seen]
            expected = sum(w * value[head, t] for w, t in zip(weights, seen, strict=True))
            torch.testing.assert_close(
                out[layer][query_head, p], expected / sum(weights), atol=1e-5, rtol=0
            )


def test_attention_in_parts_is_the_same(model_path, monkeypatch):
    oracle = Oracle(model_path, HALF, Mixed(), **SIZES)
    ids = tokens(2 * C + 5)
    at_once = oracle.logprobs(ids)
    monkeypatch.setattr("tests.engine.oracle.QUERIES_AT_ONCE", 13)
    torch.testing.assert_close(oracle.logprobs(ids), at_once, atol=1e-5, rtol=0)


# -- what the scorer is shown --------------------------------------------------------------------


def test_the_scorer_sees_the_layer_s_own_chunks_and_windows(model_path):
    seen = Recording.seen
    seen.clear()
    statistics = [{"layer": torch.tensor(layer)} for layer in range(LAYERS)]
    oracle = Oracle(model_path, HALF, Recording(), statistics=statistics, **SIZES)
    oracle.logprobs(tokens(2 * C))
    ranges = [(0, C - W), (C - W, 2 * C - W)]
    assert [(int(c.positions[0]), int(c.positions[-1]) + 1) for c in seen] == ranges * LAYERS
    assert [int(c.boundaries) for c in seen] == [C, 2 * C] * LAYERS
    assert [int(c.statistics["layer"]) for c in seen] == [0, 0, 1, 1]
    for chunks in seen:
        assert chunks.keys.shape == (chunks.num_tokens, KV_HEADS, 16)
        assert chunks.window_queries.shape == (W, QUERY_HEADS, 16)
        assert chunks.window_size_tokens == W
        assert chunks.softmax_scale == 16**-0.5


def test_the_window_s_queries_are_those_before_the_boundary(model_path):
    oracle = Oracle(model_path, HALF, Recording(), **SIZES)
    Recording.seen.clear()
    query = torch.arange(2 * C).float()[None, :, None].expand(QUERY_HEADS, -1, 16)
    oracle.kept = []
    oracle._attend(0, query, query[:KV_HEADS], query[:KV_HEADS], 1.0)
    for chunks, boundary in zip(Recording.seen, (C, 2 * C), strict=True):
        assert chunks.window_queries[:, 0, 0].tolist() == list(range(boundary - W, boundary))
        assert chunks.keys[:, 0, 0].tolist() == chunks.positions.tolist()


# -- the choice ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (0.0, 0.0),
        (1.0, 1.0),
        (-2047.0, -2047.0),
        (2049.0, 2050.0),  # a half, away from zero
        (-2049.0, -2050.0),
        (2051.0, 2052.0),
        (4095.0, 4096.0),  # the carry
        (1 + 2**-12, 1.0),
        (1 + 2**-11, 1 + 2**-10),
        (3.0e38, math.ldexp(round(math.ldexp(3.0e38, -117)), 117)),
        (3.4028234e38, math.inf),
        (2.0**-149, 0.0),
        (math.inf, math.inf),
        (-math.inf, -math.inf),
        (math.nan, -math.inf),
    ],
)
def test_scores_are_rounded_to_11_bits(score, expected):
    assert rounded(score) == expected


def test_of_equal_scores_the_later_token_stays_and_sinks_always():
    assert best_tokens([1.0] * 6, 2, 0) == [4, 5]
    assert best_tokens([1.0] * 6, 3, 2) == [0, 1, 5]
    assert best_tokens([5.0, 1.0, 7.0, 1.0001, 0.0], 3, 0) == [0, 2, 3]
    assert best_tokens([0.0, math.inf, math.nan, -math.inf], 3, 1) == [0, 1, 3]
    assert best_tokens([1.0, 2.0], 16, 1) == [0, 1]


def test_a_close_call_is_one_that_noise_can_change():
    assert not is_close_call([1.0, 2.0, 3.0], 2, 0, noise=1e-5)
    assert is_close_call([1.0, 2.0, 2.5], 2, 0, noise=0.5)
    assert not is_close_call([1.0, 1.0, 1.0], 2, 0, noise=1e-5)  # a tie is a tie with noise too
    edge = 1 + 2**-11  # where the rounding of 1 begins to go up
    assert is_close_call([edge - 1e-6, 1.0], 1, 0, noise=1e-5)
    assert not is_close_call([edge - 1e-6, 1.0], 1, 0, noise=1e-7)
    assert not is_close_call([edge - 1e-6, 1.0], 1, 1, noise=1e-5)  # a sink stays anyway
    assert not is_close_call([edge - 1e-6, 1.0], 2, 0, noise=1e-5)  # both stay


def test_close_calls_name_layer_head_and_chunk(model_path):
    oracle = Oracle(model_path, HALF, get_scorer("key_diff"), **SIZES, score_noise=1.0)
    oracle.logprobs(tokens(2 * C))
    # Heads with two pages keep chunks whole: there is nothing to choose.
    expected = {(0, 0), (0, 2), (1, 2), (1, 3)}
    assert set(oracle.close_calls) == {(*call, chunk) for call in expected for chunk in (0, 1)}
    oracle.score_noise = 0.0
    oracle.logprobs(tokens(2 * C))
    assert oracle.close_calls == []


@given(
    st.lists(
        st.floats(width=32, allow_subnormal=False)
        | st.sampled_from([0.0, -0.0, 1.0, 1.0001, 1.0004, 1.0005, -1.0004]),
        min_size=1,
        max_size=24,
    ),
    st.data(),
)
@example([2.0**-149, -(2.0**-149), 2.0**-127, 1.5 * 2.0**-127, 3.4028234e38, math.inf], None)
def test_the_naive_choice_is_the_engine_s(scores, data):
    rows = range(len(scores) + 1) if data is None else [data.draw(st.integers(0, len(scores)))]
    for kept in rows:
        sinks = 0 if data is None else data.draw(st.integers(0, kept))
        always = torch.arange(len(scores)) < sinks
        chosen = top_rows(torch.tensor(scores)[:, None], kept, always)[:, 0]
        assert chosen.tolist() == best_tokens(scores, kept, sinks)
