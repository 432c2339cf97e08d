"""Everything that the page tells, as one JSON object: figures, facts and warnings."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from tangram.budgets.threshold import samples_at
from tangram.cli.report.cautions import cautions, remarks
from tangram.cli.report.layouts import (
    Settings,
    head_pages,
    layouts,
    memory_bytes,
)
from tangram.cli.report.retention import (
    QUANTILES,
    boxes,
    curve_bands,
    overflow,
    rank_stability,
)
from tangram.cli.report.search_log import measured_log
from tangram.errors import ScorerError
from tangram.geometry import Geometry
from tangram.plan.capacity import head_skew
from tangram.plan.options import CompressionOptions, flag
from tangram.printable import printable_json
from tangram.profile import ERROR_CURVE, MASS_CURVE, Profile, threshold_share
from tangram.profile.scorer_choice import ScorerChoice
from tangram.scorers import get_scorer
from tangram.scorers.gates import DIGEST
from tangram.version import VERSION

SCOPES = ("crosslayer", "perlayer")
DEFAULT_LEVELS = ("measured", "error", "mass", "crosslayer", "perlayer", "uniform")
"""The level that the page opens with: the first that the profile has."""
STEPS = 10000
"""Shares are whole numbers of this many parts: four digits, and small to write down."""


def report_data(profile: Profile, settings: Settings, path: Path) -> dict[str, Any]:
    """The page's contents.

    Args:
        profile: what the page is about.
        settings: ratios, group size, dtype and GPU.
        path: the profile's file, as it was asked for.

    Returns:
        A JSON object without NaN and control characters. Shares are whole numbers of `steps` parts.
        Arrays over heads are flat, layer by layer.

    Raises:
        ConfigurationError: the profile's chunk, window and sinks do not fit each other.
    """
    try:
        scorer = get_scorer(profile.scorer_name)
        has = dict(
            has_query_ring=scorer.needs_window_queries, has_stored_scores=scorer.stores_scores
        )
        scorer_known = True
    except ScorerError:
        has, scorer_known = {}, False
    found, missing = layouts(profile, settings, **has)
    samples = _samples(profile, settings)
    data: dict[str, Any] = {
        "profile": {"path": str(path), "facts": facts(profile), "scorer": profile.scorer_name},
        "heads": {"layers": profile.model.num_layers, "kv_heads": profile.model.num_kv_heads},
        "chunk": profile.chunk_size_tokens,
        "page_group_size": settings.page_group_size,
        "serve_flags": serve_flags(profile),
        "itemsize_bytes": settings.itemsize_bytes,
        "steps": STEPS,
        "ratios": list(settings.ratios),
        "known_ratios": list(profile.ratios),
        "start": _start(settings, found),
        "missing_levels": missing,
        "levels": {
            level: {
                "rows": [_rows(layout) for layout in of_ratio],
                "skew": [round(head_skew(layout)["mean"], 3) for layout in of_ratio],
            }
            for level, of_ratio in found.items()
        },
        "scopes": {scope: _retention(shares, found) for scope, shares in samples.items()},
        "curves": _curves(profile),
        "memory": memory_bytes(found["uniform"]),
        "measured": measured_log(profile),
        "sample_kinds": _sample_kinds(profile, samples),
        "version": VERSION,
    }
    data["warnings"] = cautions(profile, data, scorer_known=scorer_known)
    data["remarks"] = remarks(data)
    return printable_json(data)


def facts(profile: Profile) -> list[tuple[str, str]]:
    """(name, value) of what the profile says about itself, the page's title first."""
    model, data = profile.model, profile.data
    parameters = ", ".join(f"{k} = {v}" for k, v in sorted(profile.scorer_parameters.items()))
    kinds = profile.extra.get("sample_kinds")
    counted = Counter(map(str, kinds if isinstance(kinds, list) else ()))
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(counted.items()))
    digest = data.get("sha256")
    name = profile.extra.get("model_name")
    choice = ScorerChoice.of(profile.extra)
    entries: dict[str, str] = {"Model": model.architecture}
    if isinstance(name, str) and name:
        entries = {"Model": name, "Architecture": model.architecture}
    entries |= {
        "Attention": f"{model.num_layers} layers, {model.num_kv_heads} KV heads and "
        f"{model.num_query_heads} query heads of {model.head_size}",
        "Width and vocabulary": f"{model.hidden_size:,} and {model.vocab_size:,}",
        "Config": model.config_sha256[:12] if model.config_sha256 else "not known",
        "Scorer": f"{profile.scorer_name}" + (f" ({parameters})" if parameters else ""),
        **({"Scorers tried": str(choice)} if choice else {}),
        "Chunk": f"{profile.chunk_size_tokens} tokens, window of {profile.window_size_tokens}, "
        f"{profile.n_sink_tokens} sinks",
        "Samples": f"{data.get('n_samples', 'number not known')}" + (f": {listed}" * bool(listed)),
        "Texts": str(data.get("description", "not described")),
        "Texts' digest": str(digest)[:12] if digest else "not known",
        "Seed": str(profile.seed),
        "Written by": f"Tangram {profile.tangram_version}",
    }
    return list(entries.items())


def serve_flags(profile: Profile) -> list[str]:
    """Flags that serve with the profile's scorer and chunk, as far as they are not by default."""
    usual = CompressionOptions()
    asked = {
        "compression_chunk_size": profile.chunk_size_tokens,
        "compression_window_size": profile.window_size_tokens,
        "compression_n_sink_tokens": profile.n_sink_tokens,
    }
    differing = {name: value for name, value in asked.items() if value != getattr(usual, name)}
    flags = [f"{flag(name)} {value}" for name, value in differing.items()]
    if parameters := _changed_parameters(profile):
        if str(parameters.get("weights", "")).startswith(DIGEST):  # it tells of no place
            parameters["weights"] = "FILE"
        name = flag("compression_scorer_parameters")
        flags.insert(0, f"{name} {shlex.quote(json.dumps(parameters))}")
    return flags


def _changed_parameters(profile: Profile) -> dict[str, Any]:
    """The scorer's parameters that are not at their defaults; all of them where it is not known."""
    try:
        defaults = get_scorer(profile.scorer_name).parameters()
    except ScorerError:
        defaults = {}
    given = profile.scorer_parameters
    return {n: value for n, value in given.items() if n not in defaults or value != defaults[n]}


def _start(settings: Settings, found: dict[str, list[Geometry]]) -> dict[str, Any]:
    """What is chosen when the page opens: what a server takes that is told nothing else."""
    usual = CompressionOptions().compression_ratio
    nearest = min(settings.ratios, key=lambda ratio: abs(ratio - usual))
    level = next(level for level in (*DEFAULT_LEVELS, *found) if level in found)
    return {"level": level, "ratio": settings.ratios.index(nearest)}


def _rows(layout: Geometry) -> list[int]:
    return (head_pages(layout.head_groups) * layout.page_size_rows).ravel().tolist()


def _samples(profile: Profile, settings: Settings) -> dict[str, list[np.ndarray]]:
    """scope -> [ratios] arrays [samples, layers, kv_heads], of the scopes that there are."""
    return {
        scope: [
            samples_at(profile.arrays[threshold_share(scope)], profile.ratios, ratio)
            for ratio in settings.ratios
        ]
        for scope in SCOPES
        if threshold_share(scope) in profile.arrays
    }


def _retention(shares: list[np.ndarray], found: dict[str, list[Geometry]]) -> dict[str, Any]:
    """Figures of one scope: `boxes` and `ranks` by ratio, `overflow` by level and ratio."""
    return {
        "samples": len(shares[0]),
        "boxes": [_parts(boxes(each)).tolist() for each in map(_flat, shares)],
        "ranks": [_ranks(each) for each in shares],
        "overflow": {
            level: [_overflow(each, layout) for each, layout in zip(shares, of_ratio, strict=True)]
            for level, of_ratio in found.items()
        },
    }


def _flat(samples: np.ndarray) -> np.ndarray:
    return samples.reshape(len(samples), -1)


def _ranks(samples: np.ndarray) -> dict[str, Any]:
    found = rank_stability(samples)
    return {
        "samples": [round(r, 4) if np.isfinite(r) else None for r in found.samples.tolist()],
        "mean": found.mean,
        "lowest": found.lowest,
    }


def _overflow(samples: np.ndarray, layout: Geometry) -> dict[str, Any]:
    chunk = layout.chunk_size_tokens
    budgets = head_pages(layout.head_groups) * layout.page_size_rows / chunk
    found = overflow(samples, budgets)
    return {
        "often": found.often.ravel().tolist(),
        "rows": np.round(found.excess.ravel() * chunk, 1).tolist(),
        "short": _parts(found.short).tolist(),
    }


def _curves(profile: Profile) -> dict[str, Any]:
    """mass, error -> mean and quantiles over the heads, to five digits."""
    found: dict[str, Any] = {"shares": list(profile.shares), "quantiles": list(QUANTILES)}
    for name, array in (("mass", MASS_CURVE), ("error", ERROR_CURVE)):
        if array in profile.arrays:
            mean, bands = curve_bands(profile.arrays[array])
            digits = [[float(f"{value:.5g}") for value in line] for line in (mean, *bands)]
            found[name] = {"mean": digits[0], "bands": digits[1:]}
    return found


def _sample_kinds(profile: Profile, samples: dict[str, list[np.ndarray]]) -> list[str] | None:
    """What each sample is, where the profile tells it of exactly these samples."""
    kinds = profile.extra.get("sample_kinds")
    counts = {len(shares[0]) for shares in samples.values()}
    if isinstance(kinds, list) and counts == {len(kinds)}:
        return [str(kind) for kind in kinds]
    return None


def _parts(shares: np.ndarray) -> np.ndarray:
    return np.round(shares * STEPS).astype(np.int64)
