"""Filling a profile: stock vLLM reads texts with full KV, and the statistics are gathered."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from tangram.errors import ConfigurationError
from tangram.profile import Profile


def record_profile(
    model: str,
    samples: Sequence[Sequence[int]],
    *,
    scorer_name: str,
    chunk_size_tokens: int = 256,
    window_size_tokens: int = 32,
    n_sink_tokens: int = 4,
    description: str,
    progress: Callable[[int], None] = lambda done: None,
    **engine: Any,
) -> Profile:
    """A profile of a model for one scorer, from texts that the engine reads in this process.

    Args:
        model: folder or name of the model.
        samples: token ids of the texts; those of C tokens or fewer say nothing about rows.
        scorer_name: whose rows the statistics are about.
        chunk_size_tokens: C; other sizes can be asked of the profile later.
        window_size_tokens: W.
        n_sink_tokens: S.
        description: what the texts are, in words, for the file.
        progress: called with the number of samples that are done.
        **engine: further keyword arguments of `vllm.LLM`.

    Raises:
        ConfigurationError: no samples.
        ScorerError: an unknown scorer.
        ProfileError: no sample is longer than a chunk.
        UnsupportedError: a model that cannot be looked into.
    """
    from tangram.calibrate import QueryStatistics, StatisticsRecorder
    from tangram.scorers import get_scorer
    from tangram.vllm_plugin.capture import FullKVEngine

    if not samples:
        raise ConfigurationError("there are no samples to calibrate on: give at least one text")
    scorer = get_scorer(scorer_name)
    reader = FullKVEngine(model, max(map(len, samples)), **engine)
    try:
        facts = reader.facts()
        statistics = None
        if scorer.needs_statistics and facts.rope_frequencies is not None:
            queries = QueryStatistics(facts.identity, facts.rope_frequencies, n_sink_tokens)
            for sample in samples:
                reader.read(sample, lambda layer, query, *_: queries.add_layer(layer, query))
            statistics = queries.arrays()
        recorder = StatisticsRecorder(
            facts.identity,
            scorer,
            chunk_size_tokens=chunk_size_tokens,
            window_size_tokens=window_size_tokens,
            n_sink_tokens=n_sink_tokens,
            softmax_scale=facts.softmax_scale,
            rope_frequencies=facts.rope_frequencies,
            output_projections=facts.output_projections,
            statistics=statistics,
        )
        for done, sample in enumerate(samples, start=1):
            reader.read(sample, recorder.add_layer)
            recorder.finish_sample()
            progress(done)
    finally:
        reader.close()
    digest = hashlib.sha256(repr([list(sample) for sample in samples]).encode()).hexdigest()
    return recorder.profile(
        {"sha256": digest, "n_samples": len(samples), "description": description}
    )
