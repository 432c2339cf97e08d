"""Filling a profile: stock vLLM reads texts with full KV, and the statistics are gathered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tangram.calibrate.recording.resume import Readings
from tangram.errors import ConfigurationError, UnsupportedError
from tangram.installed import versions
from tangram.profile import ModelIdentity, Profile

SAVE_EVERY = 5
"""Samples between two saves of what was gathered."""


def record_profile(
    model: str,
    samples: Sequence[Sequence[int]],
    *,
    later: Sequence[Sequence[int]] | None = None,
    scorer_name: str,
    scorer_parameters: Mapping[str, Any] | None = None,
    chunk_size_tokens: int = 256,
    window_size_tokens: int = 32,
    n_sink_tokens: int = 4,
    description: str,
    seed: int = 0,
    partial: Path | None = None,
    weights: str = "",
    save_every: int = SAVE_EVERY,
    progress: Callable[[int], None] = lambda done: None,
    **engine: Any,
) -> Profile:
    """A profile of a model for one scorer, from texts that the engine reads in this process.

    Texts are read one at a time, so that the result depends on no batch size. A scorer that needs
    query statistics has all of them read twice.

    Args:
        model: folder or name of the model.
        samples: token ids of the texts; those of C tokens or fewer say nothing about rows.
        later: for each sample the positions of the queries that generate later answers, rising;
            they weigh half of a sample's curves. None: all queries weigh the same.
        scorer_name: whose rows the statistics are about.
        scorer_parameters: of its parameters those that are not to have their defaults.
        chunk_size_tokens: C; other sizes can be asked of the profile later.
        window_size_tokens: W.
        n_sink_tokens: S.
        description: what the texts are, in words, for the file.
        seed: of whatever was drawn to make the samples.
        partial: file in which to save what was gathered, and to take it up from if it was made
            from the very same things; it is left there when this is done.
        weights: digest of the model's weights, which tells what `partial` was made from.
        save_every: samples between two saves.
        progress: called with the number of samples that are done; those that are read twice
            count half at each.
        **engine: further keyword arguments of `vllm.LLM`.

    Raises:
        ConfigurationError: no samples.
        ScorerError: an unknown scorer or parameter, or a bad value.
        ProfileError: no sample is longer than a chunk, or `partial` cannot be written.
        UnsupportedError: a model that cannot be looked into, or not as the scorer needs it.
    """
    from tangram.calibrate import QueryStatistics, StatisticsRecorder
    from tangram.engines.capturing import FullKVEngine
    from tangram.scorers import get_scorer

    if not samples:
        raise ConfigurationError("there are no samples to calibrate on: give at least one text")
    scorer = get_scorer(scorer_name, **(scorer_parameters or {}))
    reader = FullKVEngine(model, max(map(len, samples)), **engine)
    texts = list(zip(samples, later or [()] * len(samples), strict=True))
    try:
        facts = reader.facts()
        chunk = (chunk_size_tokens, window_size_tokens, n_sink_tokens)
        frequencies = _frequencies_for(scorer, facts)
        readings = Readings(
            len(samples) * (1 if frequencies is None else 2),
            partial,
            _digest_of(facts.identity, weights, scorer, chunk, texts, engine),
            save_every,
            lambda done, total: progress(done * len(samples) // total),
        )
        statistics = None
        if frequencies is not None:
            queries = QueryStatistics(facts.identity, frequencies, n_sink_tokens)
            for tokens, _ in readings.over(texts, "queries", queries):
                reader.read(tokens, lambda layer, query, *_: queries.add_layer(layer, query))
            statistics = queries.arrays()
        recorder = StatisticsRecorder(
            facts.identity,
            scorer,
            chunk_size_tokens=chunk_size_tokens,
            window_size_tokens=window_size_tokens,
            n_sink_tokens=n_sink_tokens,
            softmax_scale=facts.softmax_scale,
            output_projections=facts.output_projections,
            statistics=statistics,
        )
        for tokens, positions in readings.over(texts, "statistics", recorder):
            recorder.begin_sample(positions)
            reader.read(tokens, recorder.add_layer, hidden_states=scorer.stores_scores)
            recorder.finish_sample()
    finally:
        reader.close()
    digest = hashlib.sha256(repr([list(sample) for sample in samples]).encode()).hexdigest()
    return recorder.profile({"sha256": digest, "description": description}, seed=seed)


def _frequencies_for(scorer: Any, facts: Any) -> Any:
    """What turns queries back to before RoPE; None for a scorer that does not ask for them."""
    if not scorer.needs_statistics:
        return None
    if facts.rope_frequencies is None:
        raise UnsupportedError(
            f"--compression-scorer {scorer.name} needs queries before RoPE, and those of "
            f"{facts.identity.architecture} cannot be had: its RoPE is not of NeoX style, or has "
            "factors for short and long texts: choose another --compression-scorer"
        )
    return facts.rope_frequencies


def _digest_of(
    identity: ModelIdentity, weights: str, scorer: Any, chunk: Any, texts: Any, engine: Any
) -> str:
    """SHA-256 of everything that the statistics come from."""
    parts = {
        "model": identity.to_dict(),
        "weights": weights,
        "scorer": [scorer.name, scorer.identity()],
        "chunk": chunk,
        "texts": texts,
        "engine": engine,
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
