"""Budgets that kernel benchmarks run with: those of real heads, or of heads of the same spread."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tangram.budgets import allocate
from tangram.geometry import Geometry
from tangram.profile import ModelIdentity, Profile
from tangram.profile.profile import threshold_share

FILE_RATIO = 0.3
"""Ratio that the shares of a retention file are for."""
MADE_UP = {"perlayer": (0.2, 0.65, 0.1), "crosslayer": (0.1, 2.2, 1.5)}
"""Without a file: median share, and deviation of its logarithm between the heads of a layer and
between layers, by scope. The defaults give the spread of Qwen3-4B's and Llama-3.1-8B's heads."""


@dataclass(frozen=True)
class Shape:
    """Attention layers of a model."""

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_size: int


SHAPES = {"qwen3-4b": Shape(36, 32, 8, 128), "llama-3.1-8b": Shape(32, 32, 8, 128)}
BUDGETS = ("snapkv/perlayer", "fastkvzip/crosslayer")


def retention(path: Path | None, model: str, budgets: str, seed: int = 0) -> np.ndarray:
    """[samples, layers, kv_heads], share of its tokens that each head keeps.

    Args:
        path: an .npz of arrays `<model>/<scorer>/<scope>`; a log-normal draw without one.
        model: a key of `SHAPES`.
        budgets: `<scorer>/<scope>`.
        seed: of the draw.
    """
    if path is not None:
        return np.load(path)[f"{model}/{budgets}"].astype(np.float32)
    shape = SHAPES[model]
    median, of_heads, of_layers = MADE_UP[budgets.split("/")[1]]
    draw = np.random.default_rng(seed)
    logarithm = draw.normal(0, of_layers, (shape.num_layers, 1))
    logarithm = logarithm + draw.normal(0, of_heads, (shape.num_layers, shape.num_kv_heads))
    return np.clip(median * np.exp(logarithm), 0, 1).astype(np.float32)[None]


def make_benchmark_geometry(
    path: Path | None, model: str, budgets: str, *, ratio: float = 0.25, seed: int = 0
) -> Geometry:
    """A model's layout at C = 256 and H_p = 4: mean plus two deviations, exact total."""
    shape = SHAPES[model]
    scope = budgets.split("/")[1]
    share = retention(path, model, budgets, seed)
    profile = Profile(
        model=ModelIdentity(
            architecture=model,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            num_query_heads=shape.num_query_heads,
            head_size=shape.head_size,
            hidden_size=shape.num_query_heads * shape.head_size,
            vocab_size=1,
        ),
        scorer_name=budgets.split("/")[0],
        chunk_size_tokens=256,
        window_size_tokens=32,
        n_sink_tokens=4,
        ratios=(FILE_RATIO,),
        arrays={threshold_share(scope): share[None]},
    )
    groups = allocate(
        scope,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        ratio=ratio,
        chunk_size_tokens=256,
        page_size_rows=16,
        page_group_size=4,
        n_sink_tokens=4,
        profile=profile,
    )
    return Geometry(
        head_groups=groups,
        num_query_heads=shape.num_query_heads,
        head_size=shape.head_size,
        itemsize_bytes=2,
        chunk_size_tokens=256,
        window_size_tokens=32,
        n_sink_tokens=4,
    )
