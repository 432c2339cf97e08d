"""Filling a profile: stock vLLM reads texts with full KV, and the statistics are gathered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tangram.calibrate.recording.learned import LearnedRows
from tangram.calibrate.recording.recorder import Recorders
from tangram.calibrate.recording.resume import Readings
from tangram.calibrate.remaining import Remaining
from tangram.errors import ConfigurationError, ProfileError, ScorerError, UnsupportedError
from tangram.installed import versions
from tangram.profile import QUERY_MEAN, ROW_WEIGHTS, ModelIdentity, Profile
from tangram.scorers import Scorer, get_scorer

if TYPE_CHECKING:
    from tangram.engines.capturing import FullKVEngine, ModelFacts

SAVE_EVERY = 5
"""Samples between two saves of what was gathered."""


def record_profile(
    model: str,
    samples: Sequence[Sequence[int]],
    *,
    scorer_name: str,
    scorer_parameters: Mapping[str, Any] | None = None,
    **options: Any,
) -> Profile:
    """A profile of a model for one scorer, from texts that the engine reads in this process.

    Args:
        model: folder or name of the model.
        samples: token ids of the texts; those of C tokens or fewer say nothing about rows.
        scorer_name: whose rows the statistics are about.
        scorer_parameters: of its parameters those that are not to have their defaults.
        **options: further arguments of `record_profiles`, and the errors are its own.
    """
    scorer = get_scorer(scorer_name, **(scorer_parameters or {}))
    (profile,) = record_profiles(model, samples, [scorer], **options)
    return profile


def record_profiles(
    model: str,
    samples: Sequence[Sequence[int]],
    scorers: Sequence[Scorer],
    *,
    later: Sequence[Sequence[int]] | None = None,
    chunk_size_tokens: int = 256,
    window_size_tokens: int = 32,
    n_sink_tokens: int = 4,
    description: str,
    seed: int = 0,
    partial: Path | None = None,
    weights: str = "",
    save_every: int = SAVE_EVERY,
    progress: Callable[[int], None] = lambda done: None,
    left_out: Callable[[str, str], None] = lambda name, reason: None,
    **engine: Any,
) -> list[Profile]:
    """A profile of a model for each scorer, from texts that the engine reads in this process.

    Texts are read one at a time, so that the result depends on no batch size, and once for all
    scorers. If one of them needs statistics of queries they are read once more before, and so if
    one needs weights that are learned; learning keeps rows in memory, and begins anew if it is
    broken off.

    Args:
        model: folder or name of the model.
        samples: token ids of the texts; those of C tokens or fewer say nothing about rows.
        scorers: whose rows the statistics are about. Of several, one that the model or the
            samples cannot have is left out, unless it is the last.
        later: for each sample the positions of the queries that generate later answers, rising;
            they weigh half of a sample's curves. None: all queries weigh the same.
        chunk_size_tokens: C; other sizes can be asked of the profile later.
        window_size_tokens: W.
        n_sink_tokens: S.
        description: what the texts are, in words, for the file.
        seed: of whatever was drawn to make the samples.
        partial: file in which to save what was gathered, and to take it up from if it was made
            from the very same things; it is left there when this is done.
        weights: digest of the model's weights, which tells what `partial` was made from.
        save_every: samples between two saves.
        progress: called with the number of samples that are done; those that are read several
            times count in part at each.
        left_out: called with a scorer's name and why it is left out.
        **engine: further keyword arguments of `vllm.LLM`.

    Raises:
        ConfigurationError: no samples.
        ProfileError: no sample is longer than a chunk, or `partial` cannot be written.
        ScorerError: no scorer gets what it needs.
        UnsupportedError: a model that cannot be looked into, or not as any scorer needs it.
    """
    from tangram.calibrate import QueryStatistics
    from tangram.engines.capturing import FullKVEngine

    if not samples:
        raise ConfigurationError("there are no samples to calibrate on: give at least one text")
    reader = FullKVEngine(model, max(map(len, samples)), **engine)
    texts = list(zip(samples, later or [()] * len(samples), strict=True))
    try:
        facts = reader.facts()
        chunk = (chunk_size_tokens, window_size_tokens, n_sink_tokens)
        tried = Remaining({scorer.name: scorer for scorer in scorers}, left_out)
        for name, scorer in tried:
            with tried.leaving_out(name, UnsupportedError):
                _check_frequencies(scorer, facts)
        looks_at_queries = any(QUERY_MEAN in s.needs_statistics for _, s in tried)
        readings = Readings(
            len(samples) * (2 if looks_at_queries else 1),
            partial,
            _digest_of(facts.identity, weights, scorers, chunk, texts, engine),
            save_every,
            lambda done, total: progress(done * len(samples) // total),
        )
        statistics: dict[str, Mapping[str, np.ndarray]] = {}
        if looks_at_queries:
            assert facts.rope_frequencies is not None
            queries = QueryStatistics(facts.identity, facts.rope_frequencies, n_sink_tokens)
            for tokens, _ in readings.over(texts, "queries", queries):
                reader.read(tokens, lambda layer, query, *_: queries.add_layer(layer, query))
            of_queries = queries.arrays()
            statistics = {n: of_queries for n, s in tried if QUERY_MEAN in s.needs_statistics}
        for name, scorer in tried:
            if ROW_WEIGHTS in scorer.needs_statistics:
                with tried.leaving_out(name, ProfileError):  # samples too short to learn from
                    statistics[name] = readings.at_once(
                        "learned", lambda: _learn(reader, facts, chunk, texts)
                    )
        stores_scores = any(scorer.stores_scores for _, scorer in tried)
        recorders = _recorders(tried, facts, chunk, statistics)
        for tokens, positions in readings.over(texts, "statistics", recorders):
            recorders.begin_sample(positions)
            reader.read(tokens, recorders.add_layer, hidden_states=stores_scores)
            recorders.finish_sample()
    finally:
        reader.close()
    digest = hashlib.sha256(repr([list(sample) for sample in samples]).encode()).hexdigest()
    data = {"sha256": digest, "description": description}
    return [recorder.profile(data, seed=seed) for recorder in recorders.each.values()]


def _recorders(
    tried: Remaining[Scorer],
    facts: ModelFacts,
    chunk: tuple[int, int, int],
    statistics: Mapping[str, Mapping[str, np.ndarray]],
) -> Recorders:
    """What takes in the statistics of every scorer that is left."""
    from tangram.calibrate import StatisticsRecorder

    made: dict[str, StatisticsRecorder] = {}
    factors: dict[int, torch.Tensor] = {}
    for name, scorer in tried:
        with tried.leaving_out(name, ScorerError):
            made[name] = StatisticsRecorder(
                facts.identity,
                scorer,
                chunk_size_tokens=chunk[0],
                window_size_tokens=chunk[1],
                n_sink_tokens=chunk[2],
                softmax_scale=facts.softmax_scale,
                output_projections=facts.output_projections,
                statistics=statistics.get(name),
                factors=factors,
            )
    return Recorders(made)


def _learn(
    reader: FullKVEngine, facts: ModelFacts, chunk: tuple[int, int, int], texts: Any
) -> dict[str, np.ndarray]:
    """What the scorer `learned` needs, from one pass over the texts."""
    assert facts.rope_frequencies is not None
    rows = LearnedRows(
        facts.identity,
        facts.rope_frequencies,
        chunk_size_tokens=chunk[0],
        window_size_tokens=chunk[1],
        softmax_scale=facts.softmax_scale,
        num_samples=len(texts),
    )
    for tokens, positions in texts:
        rows.begin_sample(positions)
        reader.read(tokens, lambda layer, *rest: rows.add_layer(layer, *rest[:3]))
    return rows.arrays(facts.output_projections[0].device)


def _check_frequencies(scorer: Scorer, facts: ModelFacts) -> None:
    """Raise UnsupportedError for a scorer that needs what is before RoPE where it is not known."""
    if scorer.needs_statistics and facts.rope_frequencies is None:
        raise UnsupportedError(
            f"--compression-scorer {scorer.name} needs queries or keys before RoPE, and those of "
            f"{facts.identity.architecture} cannot be had: its RoPE is not of NeoX style, or has "
            "factors for short and long texts: choose another --compression-scorer"
        )


def _digest_of(
    identity: ModelIdentity,
    weights: str,
    scorers: Sequence[Scorer],
    chunk: Any,
    texts: Any,
    engine: Any,
) -> str:
    """SHA-256 of everything that the statistics come from."""
    parts = {
        "model": identity.to_dict(),
        "weights": weights,
        "scorers": [[scorer.name, scorer.identity()] for scorer in scorers],
        "chunk": chunk,
        "texts": texts,
        "engine": engine,
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
