"""What the scorer `learned` is made of: labels, and the weights that are nearest to them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tangram.calibrate.recording import learned
from tangram.calibrate.recording.learned import LearnedRows, fit
from tangram.errors import ProfileError
from tangram.profile import ModelIdentity
from tangram.scorers import Chunks, get_scorer
from tangram.scorers.learned import num_features, row_features, turn_back

C, W, SIZE, SCALE = 16, 4, 8, 0.5
MODEL = ModelIdentity(
    architecture="Tiny", num_layers=1, num_query_heads=4, num_kv_heads=2, head_size=SIZE,
    hidden_size=32, vocab_size=10,
)  # fmt: skip
FREQUENCIES = torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)  # six of eight dimensions


def rows_of(num_samples=1, **changed):
    sizes = dict(chunk_size_tokens=C, window_size_tokens=W, softmax_scale=SCALE)
    return LearnedRows(MODEL, FREQUENCIES, num_samples=num_samples, **{**sizes, **changed})


def layer_of(tokens, seed=0):
    random = torch.Generator().manual_seed(seed)
    queries = torch.randn(tokens, 4, SIZE, generator=random)
    keys, values = torch.randn(2, tokens, 2, SIZE, generator=random)
    return queries, keys, values


def naive_labels(queries, keys, values, first):
    """By loops over queries: the largest attention to a token once its chunk is sealed."""
    tokens = len(keys)
    most = torch.zeros(2, tokens)
    for position in range(first, tokens):
        sealed = position // C * C - W
        for head in range(4):
            logits = keys[: position + 1, head // 2] @ queries[position, head] * SCALE
            paid = logits.softmax(dim=0)[:sealed]
            most[head // 2, :sealed] = torch.maximum(most[head // 2, :sealed], paid)
    return most * values.norm(dim=-1).T


@pytest.mark.parametrize("later", [(), (50, 51, 70)])
def test_labels(monkeypatch, later):
    given = []
    monkeypatch.setattr(learned, "fit", lambda x, y: given.append(y) or x[:, 0, 0])
    rows, (queries, keys, values) = rows_of(), layer_of(80)
    rows.begin_sample(later)
    rows.add_layer(0, queries, keys, values)
    rows.arrays()
    labels = naive_labels(queries, keys, values, first=later[0] if later else C)
    # Chunk 0 is shorter, and the tokens after the last boundary are not sealed.
    starts = [C - W, 2 * C - W, 3 * C - W]
    expected = torch.stack([labels[:, start : start + C] for start in starts], dim=1)
    torch.testing.assert_close(given[0], expected)


def test_the_weights_are_those_that_made_the_labels():
    random = torch.Generator().manual_seed(1)
    features = row_features(*torch.randn(2, 2, 60, C, SIZE, generator=random))
    truth = 0.5 * torch.randn(2, features.shape[-1], generator=random)
    labels = torch.einsum("hctf,hf->hct", features, truth).softmax(dim=-1)
    found = fit(features, labels)
    assert found.shape == truth.shape
    exponents = torch.einsum("hctf,hf->hct", features, found)
    # The penalty keeps them a little short.
    assert (exponents.softmax(dim=-1) - labels).abs().max() < 0.05
    torch.testing.assert_close(exponents.mean(dim=(1, 2)), torch.zeros(2), atol=1e-4, rtol=0)


def test_chunks_that_nobody_looks_at_weigh_nothing():
    random = torch.Generator().manual_seed(2)
    features = row_features(*torch.randn(2, 1, 20, C, SIZE, generator=random))
    labels = torch.rand(1, 20, C, generator=random)
    labels[:, 10:] = 0
    some = fit(features, labels)
    others = features.clone()
    others[:, 10:] = others[:, 10:].flip(2)
    torch.testing.assert_close(fit(others, labels), some, atol=1e-3, rtol=1e-2)
    assert torch.isfinite(fit(features, torch.zeros_like(labels))).all()


def test_the_scorer_ranks_as_the_samples_do():
    """Keys that point one way are looked at: their tokens score best, wherever they stand."""
    rows, wanted = rows_of(num_samples=4), torch.zeros(SIZE)
    wanted[6] = 6.0  # a dimension that RoPE does not turn
    for seed in range(4):
        queries, keys, values = layer_of(90, seed)
        needles = torch.arange(5, 90, 9)
        keys[needles] += wanted
        queries[60:] += 3 * wanted
        rows.begin_sample((60,))
        rows.add_layer(0, queries, keys, values)
    statistics = rows.arrays()
    _, keys, values = layer_of(C, seed=9)
    keys[[3, 11]] += wanted
    scores = get_scorer("learned").score(
        Chunks(
            keys=keys, values=values, positions=torch.arange(1000, 1000 + C), softmax_scale=SCALE,
            window_size_tokens=W,
            statistics={
                "row_weights": torch.from_numpy(statistics["row_weights"][0]),
                "rope_frequencies": torch.from_numpy(statistics["rope_frequencies"]),
            },
        )
    )  # fmt: skip
    assert scores.argsort(dim=0, descending=True)[:2].sort(dim=0).values.T.tolist() == [[3, 11]] * 2


def test_what_is_stored():
    rows = rows_of()
    rows.begin_sample(())
    rows.add_layer(0, *layer_of(80))
    arrays = rows.arrays()
    assert arrays["row_weights"].shape == (1, 2, num_features(SIZE))
    assert arrays["row_weights"].dtype == np.float32
    np.testing.assert_array_equal(arrays["rope_frequencies"], FREQUENCIES.numpy())
    again = rows_of()
    again.begin_sample(())
    again.add_layer(0, *layer_of(80))
    np.testing.assert_array_equal(again.arrays()["row_weights"], arrays["row_weights"])


def test_every_sample_has_its_share_of_the_memory(monkeypatch):
    monkeypatch.setattr(learned, "MOST_TOKENS", 4 * C)
    rows = rows_of(num_samples=2)
    assert rows._chunks(1000) == rows._chunks(1000)
    assert len(rows._chunks(1000)) == 2
    assert len(rows._chunks(3 * C)) == 1
    assert rows._chunks(C) == []


def test_samples_too_short_and_rows_not_finite():
    rows = rows_of()
    rows.begin_sample(())
    rows.add_layer(0, *layer_of(C + 2))
    with pytest.raises(ProfileError, match="longer samples, or a smaller --compression-chunk-size"):
        rows.arrays()
    queries, keys, values = layer_of(80)
    rows.add_layer(0, queries, keys, values * torch.inf)
    with pytest.raises(ProfileError, match="not finite"):
        rows.arrays()


def test_turning_back_undoes_rope():
    keys, positions = torch.randn(5, SIZE), torch.tensor([0, 1, 7, 900, 130_000])
    there = turn_back(turn_back(keys, positions, FREQUENCIES), -positions, FREQUENCIES)
    torch.testing.assert_close(there, keys)
    turned = turn_back(keys, positions, FREQUENCIES)
    torch.testing.assert_close(turned[:, 6:], keys[:, 6:])
    assert not torch.allclose(turned[1:, :6], keys[1:, :6])


def test_a_profile_of_another_model_is_refused():
    from tangram.errors import ScorerError

    scorer = get_scorer("learned")
    with pytest.raises(ScorerError, match="of another model"):
        scorer.check_statistics(torch.zeros(2, 9), FREQUENCIES, 2, SIZE)
    assert replace(scorer) == scorer
