import numpy as np
import pytest
import torch

from tangram.calibrate import QueryStatistics
from tangram.calibrate.recording.queries import unrotate
from tangram.errors import ProfileError

FREQUENCIES = torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)


def rotate_by_hand(query, position):
    """RoPE on the first 6 dimensions, pairs (i, i + 3), as complex numbers."""
    rotated = query.copy()
    for i, frequency in enumerate(FREQUENCIES.tolist()):
        turned = complex(query[i], query[i + 3]) * np.exp(1j * frequency * position)
        rotated[i], rotated[i + 3] = turned.real, turned.imag
    return rotated


def rotated(plain):
    return torch.tensor(
        np.array([[rotate_by_hand(q, t) for q in row] for t, row in enumerate(plain)])
    )


def test_unrotate_undoes_rope():
    plain = np.random.default_rng(0).normal(size=(40, 2, 8))
    found = unrotate(rotated(plain), torch.arange(40), FREQUENCIES)
    np.testing.assert_allclose(found.numpy(), plain, atol=1e-12)


def test_mean_and_covariance_are_those_of_the_plain_queries_past_the_sinks(tiny):
    random = np.random.default_rng(1)
    statistics = QueryStatistics(tiny, FREQUENCIES, n_sink_tokens=2)
    seen = {0: [], 1: []}
    for num_tokens in (5, 1500, 2):
        for layer in (1, 0):
            plain = random.normal(3, 1 + layer, size=(num_tokens, 6, 8))
            statistics.add_layer(layer, rotated(plain))
            seen[layer].append(plain[2:])
    arrays = statistics.arrays()
    for layer, parts in seen.items():
        queries = np.concatenate(parts)
        np.testing.assert_allclose(arrays["query_mean"][layer], queries.mean(0), rtol=1e-5)
        for head in range(6):
            expected = np.cov(queries[:, head].T, bias=True)
            np.testing.assert_allclose(
                arrays["query_covariance"][layer, head], expected, rtol=1e-4, atol=1e-5
            )
    np.testing.assert_array_equal(arrays["rope_frequencies"], FREQUENCIES.numpy())


def test_layers_without_tokens_are_named(tiny):
    statistics = QueryStatistics(tiny, FREQUENCIES, n_sink_tokens=2)
    statistics.add_layer(0, torch.ones(3, 6, 8))
    with pytest.raises(ProfileError, match=r"no queries were recorded for the layers \[1\]"):
        statistics.arrays()


def test_more_frequencies_than_dimensions_are_refused(tiny):
    with pytest.raises(ProfileError, match="rope_frequencies must have shape"):
        QueryStatistics(tiny, torch.ones(5), n_sink_tokens=0)
