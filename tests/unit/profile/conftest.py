"""A small profile with every array in it."""

import numpy as np
import pytest

from tangram.profile import ModelIdentity, Profile

MODEL = ModelIdentity(
    architecture="TinyForCausalLM",
    num_layers=2,
    num_kv_heads=3,
    num_query_heads=6,
    head_size=8,
    hidden_size=48,
    vocab_size=100,
    config_sha256="ab" * 32,
)


@pytest.fixture
def make_profile():
    def make(**changes):
        random = np.random.default_rng(0)
        arrays = {
            "threshold_share/crosslayer": random.random((2, 4, 2, 3)),
            "threshold_share/perlayer": random.random((2, 4, 2, 3)),
            "mass_curve": np.sort(random.random((4, 2, 3, 5))),
            "error_curve": np.sort(random.random((4, 2, 3, 5)))[..., ::-1],
            "query_mean": random.random((2, 6, 8)),
            "query_covariance": random.random((2, 6, 8, 8)),
            "rope_frequencies": random.random(4),
        }
        fields = {
            "model": MODEL,
            "scorer_name": "keydiff",
            "scorer_parameters": {"a": 1, "b": [1.5, None]},
            "chunk_size_tokens": 256,
            "window_size_tokens": 32,
            "n_sink_tokens": 4,
            "ratios": (0.25, 0.5),
            "shares": (0, 0.25, 0.5, 0.75, 1),
            "data": {"sha256": "00", "n_samples": 4, "description": "notes"},
            "seed": 7,
            "extra": {"further": {"x": 1}},
            "arrays": arrays,
        }
        return Profile(**(fields | changes))

    return make
