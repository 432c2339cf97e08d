"""Budgets that kernel benchmarks run with: those of real heads, or of heads of the same spread."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tangram.budgets import allocate
from tangram.geometry import Geometry
from tangram.profile import ModelIdentity, Profile, threshold_share
from tangram.scorers import Scorer, get_scorer

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


def retention(
    path: Path | None, model: str, budgets: str, sizes: Shape | ModelIdentity, seed: int = 0
) -> np.ndarray:
    """[samples, layers, kv_heads], share of its tokens that each head keeps.

    Args:
        path: an .npz of arrays `<model>/<scorer>/<scope>`; a log-normal draw without one, and for a
            model that it does not have.
        model: its name.
        budgets: `<scorer>/<scope>`.
        sizes: layers and KV heads of the model.
        seed: of the draw.
    """
    found = {} if path is None else np.load(path)
    if f"{model}/{budgets}" in found:
        return found[f"{model}/{budgets}"].astype(np.float32)
    median, of_heads, of_layers = MADE_UP[budgets.split("/")[1]]
    draw = np.random.default_rng(seed)
    logarithm = draw.normal(0, of_layers, (sizes.num_layers, 1))
    logarithm = logarithm + draw.normal(0, of_heads, (sizes.num_layers, sizes.num_kv_heads))
    return np.clip(median * np.exp(logarithm), 0, 1).astype(np.float32)[None]


def make_benchmark_profile(
    path: Path | None,
    model: str,
    budgets: str,
    *,
    identity: ModelIdentity,
    scorer: Scorer,
    seed: int,
) -> Profile:
    """The shares as a profile that a server of `scorer` takes: speed asks only for the budgets."""
    scope = budgets.split("/")[1]
    return Profile(
        model=identity,
        scorer_name=scorer.name,
        scorer_parameters=scorer.parameters(),
        chunk_size_tokens=256,
        window_size_tokens=32,
        n_sink_tokens=4,
        ratios=(FILE_RATIO,),
        data={"description": f"shares of {budgets} for benchmarks"},
        seed=seed,
        arrays={threshold_share(scope): retention(path, model, budgets, identity, seed)[None]},
    )


def make_benchmark_geometry(
    path: Path | None,
    model: str,
    budgets: str,
    *,
    ratio: float = 0.25,
    chunk_size_tokens: int = 256,
    head_size: int | None = None,
    seed: int = 0,
) -> Geometry:
    """A model's layout at H_p = 4: mean plus two deviations, exact total.

    Args:
        path: of shares, see `retention`.
        model: its name.
        budgets: `<scorer>/<scope>`.
        ratio: share of all rows that is kept.
        chunk_size_tokens: C.
        head_size: another than the model's.
        seed: of made-up shares.
    """
    shape = SHAPES[model]
    if head_size is not None:
        shape = replace(shape, head_size=head_size)
    identity = ModelIdentity(
        architecture=model,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        num_query_heads=shape.num_query_heads,
        head_size=shape.head_size,
        hidden_size=shape.num_query_heads * shape.head_size,
        vocab_size=1,
    )
    profile = make_benchmark_profile(
        path, model, budgets, identity=identity, scorer=get_scorer("snap_kv"), seed=seed
    )
    groups = allocate(
        budgets.split("/")[1],
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        ratio=ratio,
        chunk_size_tokens=chunk_size_tokens,
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
        chunk_size_tokens=chunk_size_tokens,
        window_size_tokens=32,
        n_sink_tokens=4,
    )
