"""From a profile to what the sealing kernel reads."""

import numpy as np
import pytest
import torch

from tangram.bundled import recall_model_path
from tangram.errors import ScorerError
from tangram.kernels.seal_decode import SealScorer
from tangram.profile import Profile
from tangram.scorers import get_scorer
from tangram.scorers.expected_attention import average_rotation
from tests.kernels.inputs import make_geometry

CPU = torch.device("cpu")
GEOMETRY = make_geometry([[4, 4]] * 6, num_kv_heads=4, chunk_size_tokens=256)


@pytest.fixture(scope="module")
def profile():
    return Profile.load(recall_model_path() / "expected_attention.profile")


def test_a_row_for_every_boundary_that_a_request_can_reach(profile):
    scorer = get_scorer("expected_attention", n_future_tokens=7, epsilon=0.25)
    found = SealScorer.of(scorer, profile.arrays, GEOMETRY, 4000, CPU).moments
    assert found.epsilon == 0.25
    assert len(found.rotation) > 4000 // 256
    frequencies = torch.from_numpy(profile.arrays["rope_frequencies"].copy())
    for chunk, row in enumerate(found.rotation):
        expected = average_rotation(frequencies, torch.tensor((chunk + 1) * 256), 7)
        assert torch.equal(torch.view_as_complex(row), expected)
    assert np.array_equal(found.mean.numpy(), profile.arrays["query_mean"])
    covariance = torch.from_numpy(profile.arrays["query_covariance"].copy())
    torch.testing.assert_close(found.factor @ found.factor.mT, covariance, rtol=1e-4, atol=1e-5)


def test_other_scorers_need_none():
    assert SealScorer.of(get_scorer("key_diff"), {}, GEOMETRY, 4000, CPU).moments is None


def test_frequencies_of_another_model_are_refused(profile):
    arrays = {**profile.arrays, "rope_frequencies": np.ones(33)}
    with pytest.raises(ScorerError, match="rope_frequencies has shape .33,., expected at most 32"):
        SealScorer.of(get_scorer("expected_attention"), arrays, GEOMETRY, 4000, CPU)
