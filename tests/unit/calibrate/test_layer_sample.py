"""The curves against loops that follow the definition, one query and one token at a time."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tangram.calibrate.recording.layer_sample import later_positions, later_queries
from tangram.scorers import Chunks, get_scorer, top_rows

SCALE = 0.4


def kept_by_definition(scorer, sample, share, chunk, window, sinks):
    """{(kv head, token)} that are in sealed chunks and kept, and the sealed tokens."""
    queries, keys, values, _ = sample
    kept, sealed = set(), []
    for j in range(len(keys) // chunk):
        start, stop = max(0, j * chunk - window), (j + 1) * chunk - window
        positions = torch.arange(start, stop)
        scores = scorer.score(
            Chunks(
                keys[start:stop],
                values[start:stop],
                positions,
                SCALE,
                window_size_tokens=window,
                window_queries=queries[stop : stop + window],
            )
        )
        rows = top_rows(scores, min(round(share * chunk), stop - start), positions < sinks)
        sealed += positions.tolist()
        for head in range(keys.shape[1]):
            kept |= {(head, start + t) for t in rows[:, head].tolist()}
    return kept, sealed


def curves_by_definition(scorer, sample, projection, share, chunk, window, sinks, positions):
    queries, keys, values, norms = (x.double().numpy() for x in sample)
    kept, _ = kept_by_definition(scorer, sample, share, chunk, window, sinks)
    kv_heads, size = keys.shape[1:]
    group = queries.shape[1] // kv_heads
    mass, error = np.zeros(kv_heads), np.zeros(kv_heads)
    for head in range(kv_heads):
        for p in positions:
            raw_from = chunk * (p // chunk) - window
            changes = []
            for query_head in range(head * group, (head + 1) * group):
                logits = np.array([queries[p, query_head] @ keys[t, head] for t in range(p + 1)])
                weights = np.exp(SCALE * logits)
                seen = np.array([t >= raw_from or (head, t) in kept for t in range(p + 1)])
                full = weights @ values[: p + 1, head] / weights.sum()
                cut = weights[seen] @ values[: p + 1, head][seen] / weights[seen].sum()
                changes.append(full - cut)
                mass[head] += weights[:raw_from][seen[:raw_from]].sum() / weights[:raw_from].sum()
            part = projection[:, head * group * size : (head + 1) * group * size].double().numpy()
            error[head] += np.linalg.norm(part @ np.concatenate(changes)) / norms[p]
    return mass / len(positions) / group, error / len(positions)


@pytest.mark.parametrize("scorer", ["key_diff", "snap_kv", "streaming_llm", "tova", "key_norm"])
@pytest.mark.parametrize(
    ("num_tokens", "window", "sinks"), [(51, 4, 2), (48, 0, 0), (17, 4, 3), (40, 11, 5)]
)
def test_curves_follow_the_definition(
    make_recorder, make_sample, record, projections, scorer, num_tokens, window, sinks
):
    if scorer in ("snap_kv", "tova") and window == 0:
        window = 1
    sample = make_sample(num_tokens)
    recorder = make_recorder(
        scorer, window_size_tokens=window, n_sink_tokens=sinks, max_later_queries=9
    )
    profile = record(recorder, sample)
    positions = later_positions(num_tokens, 16, 9).tolist()
    for layer in range(2):
        for point, share in enumerate(profile.shares):
            mass, error = curves_by_definition(
                get_scorer(scorer),
                sample[layer],
                projections[layer],
                share,
                16,
                window,
                sinks,
                positions,
            )
            found = profile.arrays["mass_curve"][0, layer, :, point]
            np.testing.assert_allclose(found, mass, rtol=1e-4, atol=1e-6)
            found = profile.arrays["error_curve"][0, layer, :, point]
            np.testing.assert_allclose(found, error, rtol=1e-4, atol=1e-5)


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(num_tokens=st.integers(17, 80), grid=st.integers(1, 20), seed=st.integers(0, 99))
def test_mass_rises_from_none_to_all_and_the_error_ends_at_zero(
    make_recorder, make_sample, record, num_tokens, grid, seed
):
    profile = record(make_recorder(share_grid=grid), make_sample(num_tokens, seed))
    mass, error = profile.arrays["mass_curve"], profile.arrays["error_curve"]
    assert (mass[..., 0] == 0).all()
    np.testing.assert_allclose(mass[..., -1], 1.0, atol=1e-6)
    assert (np.diff(mass, axis=-1) >= 0).all()
    assert (error >= 0).all()
    assert (error[..., -1] == 0).all()


@settings(max_examples=50, deadline=None)
@given(num_tokens=st.integers(17, 400), at_most=st.integers(1, 50))
def test_later_queries_are_past_the_boundary_and_spread_evenly(num_tokens, at_most):
    positions = later_positions(num_tokens, 16, at_most)
    assert len(positions) == min(at_most, num_tokens - 16)
    assert positions.min() >= 16
    assert positions.max() < num_tokens
    gaps = positions.diff()
    assert (gaps > 0).all()
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("at_most", [9, 40])
def test_queries_of_later_answers_weigh_half(
    make_recorder, make_sample, record, projections, at_most
):
    sample, turns = make_sample(60), [5, 20, 21, 40]
    recorder = make_recorder(max_later_queries=at_most)
    recorder.begin_sample(turns)
    profile = record(recorder, sample)
    halves = [[20, 21, 40], later_positions(60, 16, at_most - at_most // 2).tolist()]
    for layer in range(2):
        parts = [
            curves_by_definition(
                get_scorer("key_diff"), sample[layer], projections[layer], 0.5, 16, 4, 2, half
            )
            for half in halves
        ]
        mass, error = np.mean(parts, axis=0)
        arrays, point = profile.arrays, profile.shares.index(0.5)
        np.testing.assert_allclose(arrays["mass_curve"][0, layer, :, point], mass, rtol=1e-4)
        np.testing.assert_allclose(
            arrays["error_curve"][0, layer, :, point], error, rtol=1e-4, atol=1e-5
        )


@settings(max_examples=50, deadline=None)
@given(
    num_tokens=st.integers(17, 400),
    at_most=st.integers(1, 50),
    turns=st.lists(st.integers(0, 399), unique=True),
)
def test_weights_of_later_queries(num_tokens, at_most, turns):
    turns = sorted(p for p in turns if p < num_tokens)
    positions, weights = later_queries(num_tokens, 16, at_most, turns)
    assert len(positions) == len(weights) <= at_most
    assert positions.min() >= 16 and positions.max() < num_tokens
    assert float(weights.sum()) == pytest.approx(1)
    if at_most > 1 and any(p >= 16 for p in turns):
        count = min(at_most // 2, sum(p >= 16 for p in turns))
        assert set(positions[:count].tolist()) <= set(turns)
        assert float(weights[:count].sum()) == pytest.approx(0.5)
