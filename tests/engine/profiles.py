"""Profiles of made-up statistics: budgets that differ between heads, without calibrating."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tangram.profile import ModelIdentity, Profile
from tangram.scorers import get_scorer
from tests.engine.harness import MODEL

RATIOS = (0.1, 0.25, 0.5, 1.0)
SHARES = tuple(np.linspace(0, 1, 17))


def identity(model: str = MODEL) -> ModelIdentity:
    """The identity of a model's folder."""
    return ModelIdentity.from_config(json.loads((Path(model) / "config.json").read_text()))


def make_profile(scorer_name: str, *, model: str = MODEL, seed: int = 0) -> Profile:
    """Statistics drawn at random for a model: every level gives uneven budgets."""
    rng = np.random.default_rng(seed)
    who = identity(model)
    samples, heads = 4, (who.num_layers, who.num_kv_heads)
    need = rng.beta(0.6, 1.5, size=heads)
    share = np.stack([np.clip(need * ratio * 3, 0.01, 1) for ratio in RATIOS])
    noise = rng.normal(1, 0.05, size=(len(RATIOS), samples, *heads))
    threshold = np.clip(share[:, None] * noise, 0, 1).astype(np.float32)
    steep = 1 / (0.02 + need)[None, ..., None]
    mass = 1 - (1 - np.array(SHARES)) ** steep
    mass = np.broadcast_to(mass, (samples, *heads, len(SHARES))).astype(np.float32)
    weight = rng.uniform(0.1, 1, size=heads)[None, ..., None]
    queries = (who.num_layers, who.num_query_heads, who.head_size)
    root = rng.normal(0, 0.3, size=(*queries, who.head_size)) / np.sqrt(who.head_size)
    rows = (who.num_layers, who.num_kv_heads, 2 * who.head_size + 4)
    scorer = get_scorer(scorer_name)
    return Profile(
        model=who,
        scorer_name=scorer.name,
        scorer_parameters=scorer.parameters(),
        chunk_size_tokens=256,
        window_size_tokens=32,
        n_sink_tokens=4,
        ratios=RATIOS,
        shares=SHARES,
        data={"sha256": "0" * 64, "n_samples": samples, "description": "made up"},
        arrays={
            "threshold_share/crosslayer": threshold,
            "threshold_share/perlayer": threshold,
            "mass_curve": mass,
            "error_curve": ((1 - mass) * weight).astype(np.float32),
            "query_mean": rng.normal(0, 0.5, size=queries).astype(np.float32),
            "query_covariance": (root @ root.swapaxes(-1, -2)).astype(np.float32),
            "row_weights": rng.normal(0, 0.2, size=rows).astype(np.float32),
            "rope_frequencies": 1e4 ** (-np.arange(0, who.head_size, 2) / who.head_size),
        },
    )
