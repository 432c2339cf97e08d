"""Measuring budgets: the engine itself tells which of them stays closest to full KV."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tangram.budgets import MEASURED, BudgetProblem, MeasuredEntry, with_entry
from tangram.calibrate.budget_search.search import Found, check_samples, search_budgets
from tangram.calibrate.remaining import Remaining
from tangram.errors import ConfigurationError
from tangram.geometry import HeadGroups
from tangram.plan.compression_plan import PAGE_SIZE_ROWS, group_size
from tangram.plan.options import CompressionOptions
from tangram.profile import Profile

if TYPE_CHECKING:
    from torch import Tensor

TOKENS_AT_ONCE = 32768
"""Tokens of samples that the engine computes in one step, where one sample is not longer."""


@dataclass(frozen=True)
class Measured:
    """A profile with the budgets that were found so far.

    Attributes:
        profile: with an entry of `extra["measured"]` for each ratio.
        divergences: ratio -> [samples], in nats, on those that no move has seen.
    """

    profile: Profile
    divergences: Mapping[float, np.ndarray]


def measure_budgets(
    profile: Profile,
    model: str,
    samples: Sequence[Sequence[int]],
    *,
    found: Callable[[Profile], None] = lambda profile: None,
    **options: Any,
) -> Profile:
    """The profile with measured budgets in `extra["measured"]`, one entry a ratio.

    Entries of other ratios and sizes stay in the profile.

    Args:
        profile: statistics of the model, which candidates are made from; its scorer is the one
            that budgets are measured with.
        model: folder or name of the model.
        samples: token ids of whole conversations, held back from the statistics; at least 3.
        found: called after each ratio with the profile so far.
        **options: further arguments of `measure_profiles`, and the errors are its own.
    """
    (measured,) = measure_profiles(
        [profile], model, samples, found=lambda each: found(each[0].profile), **options
    )
    return measured.profile


def measure_profiles(
    profiles: Sequence[Profile],
    model: str,
    samples: Sequence[Sequence[int]],
    *,
    later: Sequence[Sequence[int]] | None = None,
    ratios: Sequence[float],
    page_group_size: int | None = None,
    chunk_size_tokens: int | None = None,
    window_size_tokens: int | None = None,
    n_sink_tokens: int | None = None,
    weights: str | None = None,
    time_limit_s: float,
    max_evaluations: int | None = None,
    tokens_at_once: int = TOKENS_AT_ONCE,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
    found: Callable[[list[Measured]], None] = lambda each: None,
    left_out: Callable[[str, str], None] = lambda name, reason: None,
    **engine: Any,
) -> list[Measured]:
    """Profiles of one model and several scorers, with measured budgets.

    Stock vLLM reads the samples once with full KV. Then, for every ratio and scorer, an engine of
    this process reads them again and again, with other budgets each time (`search`); the divergence
    is KL(full || compressed) of the next token's distribution, in nats, the mean over a sample's
    positions and then over samples.

    Args:
        profiles: statistics of the model, of one scorer each. Of several, one that the engine
            refuses is left out, unless it is the last.
        model: folder or name of the model.
        samples: token ids of whole conversations, held back from the statistics; at least 3.
        later: for each sample, the positions whose next-token distributions count, those of later
            turns: questions' ends and answers. None: the last eighth of every sample.
        ratios: ratios to measure at; they and the scorers share the time equally.
        page_group_size: H_p; the size that engines take by themselves when absent.
        chunk_size_tokens: C; the profile's when absent, and so for the next two.
        window_size_tokens: W.
        n_sink_tokens: S.
        weights: file of the scorer's gates, where it has some; the profile has but a digest of it.
        time_limit_s: seconds for all searches together, without the start of engines. The first
            rule of each is measured in any case.
        max_evaluations: readings (of some samples) in each search, at most.
        tokens_at_once: tokens of a step; activations of so many must fit beside the KV cache.
        seed: of the moves that the search draws.
        progress: told in words what goes on.
        found: called after each ratio with what was found so far.
        left_out: called with a scorer's name and why it is left out.
        **engine: further keyword arguments of `vllm.LLM`; both kinds of engine get them.

    Raises:
        ConfigurationError: samples, positions or options that cannot be measured; names them.
        BudgetError: a ratio for which there are no budgets.
        ProfileError: the profile is of another model.
        UnsupportedError: a model that gives no final states.

    Source: docs/budgets.md.
    """
    check_samples(len(samples))
    positions = _positions(samples, later)
    sizes = {
        "page_group_size": page_group_size,
        "compression_chunk_size": chunk_size_tokens,
        "compression_window_size": window_size_tokens,
        "compression_n_sink_tokens": n_sink_tokens,
    }
    asked = sorted(set(ratios), reverse=True)
    options_of = partial(_options, sizes=sizes, weights=weights)
    for profile in profiles:  # what cannot be is told before an engine starts
        for ratio in asked:
            _problem(profile, options_of(profile, ratio))
    engine = {**engine, "tokens_at_once": tokens_at_once}
    progress(f"reading {len(samples)} samples with full KV")
    texts = _read_full(model, samples, positions, engine)
    tried = Remaining({each.scorer_name: Measured(each, {}) for each in profiles}, left_out)
    left_s = time_limit_s
    for done, ratio in enumerate(asked):
        now = list(tried)
        for place, (name, each) in enumerate(now):
            # What is found at one ratio is a candidate at the next.
            options = options_of(each.profile, ratio)
            problem = _problem(each.profile, options)
            title = f"ratio {ratio:g}" if len(profiles) == 1 else f"{name}, ratio {ratio:g}"
            searches = len(now) - place + len(tried) * (len(asked) - done - 1)
            with tried.leaving_out(name, ConfigurationError):
                budgets, seconds = _search(
                    each.profile,
                    model,
                    options,
                    problem,
                    texts,
                    engine,
                    time_limit_s=left_s / searches,
                    max_evaluations=max_evaluations,
                    seed=seed,
                    progress=partial(_tell, progress, title),
                )
                left_s -= seconds
                entry = _entry(problem, options, budgets, len(samples))
                divergences = {**each.divergences, ratio: np.array(budgets.each)}
                tried.replace(name, Measured(with_entry(each.profile, entry), divergences))
        found([each for _, each in tried])
    return [each for _, each in tried]


def _options(
    profile: Profile, ratio: float, *, sizes: Mapping[str, int | None], weights: str | None
) -> CompressionOptions:
    """What is served to measure at a ratio; sizes that are None are the profile's."""
    return CompressionOptions.from_mapping(
        {
            "compression_ratio": ratio,
            "compression_chunk_size": profile.chunk_size_tokens,
            "compression_window_size": profile.window_size_tokens,
            "compression_n_sink_tokens": profile.n_sink_tokens,
            **{name: size for name, size in sizes.items() if size is not None},
            "compression_scorer": profile.scorer_name,
            "compression_scorer_parameters": {
                **profile.scorer_parameters,
                **({} if weights is None else {"weights": weights}),
            },
        }
    )


@dataclass(frozen=True)
class _Texts:
    """Samples, the positions that count, and the full-KV states there."""

    samples: Sequence[Sequence[int]]
    positions: Sequence[Sequence[int]]
    full: Sequence[Tensor]

    @property
    def lengths(self) -> list[int]:
        return [len(sample) for sample in self.samples]


def _read_full(
    model: str,
    samples: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    engine: Mapping[str, Any],
) -> _Texts:
    from tangram.engines.reading import ReadingEngine

    reader = ReadingEngine(model, [len(sample) for sample in samples], compression=None, **engine)
    try:
        return _Texts(samples, positions, [s.cpu() for s in reader.states(samples, positions)])
    finally:
        reader.close()


def _search(
    profile: Profile,
    model: str,
    options: CompressionOptions,
    problem: BudgetProblem,
    texts: _Texts,
    engine: Mapping[str, Any],
    **limits: Any,
) -> tuple[Found, float]:
    """(what was found with an engine of one ratio, seconds that the search took)."""
    from tangram.engines.reading import ReadingEngine

    with tempfile.TemporaryDirectory() as folder:
        # Of the profile the engine wants the scorer's statistics; budgets are swapped in.
        path = Path(folder) / "statistics.profile"
        profile.save(path)
        compression = {
            **options.to_mapping(),
            "compression_profile": str(path),
            "compression_level": "uniform",
        }
        reader = ReadingEngine(model, texts.lengths, compression=compression, **engine)

    def divergence(budgets: HeadGroups, chosen: Sequence[int]) -> list[float]:
        reader.swap_budgets(budgets)
        states = reader.states(
            [texts.samples[index] for index in chosen],
            [texts.positions[index] for index in chosen],
        )
        return list(map(reader.divergence, (texts.full[index] for index in chosen), states))

    begun = time.monotonic()
    try:
        found = search_budgets(problem, divergence, len(texts.samples), **limits)
    finally:
        reader.close()
    return found, time.monotonic() - begun


def _tell(progress: Callable[[str], None], title: str, line: str) -> None:
    progress(f"{title}: {line}")


def _problem(profile: Profile, options: CompressionOptions) -> BudgetProblem:
    return BudgetProblem(
        level=MEASURED,
        num_layers=profile.model.num_layers,
        num_kv_heads=profile.model.num_kv_heads,
        ratio=options.compression_ratio,
        chunk_size_tokens=options.compression_chunk_size,
        page_size_rows=PAGE_SIZE_ROWS,
        page_group_size=group_size(options, profile.model.num_kv_heads),
        n_sink_tokens=options.compression_n_sink_tokens,
        profile=profile,
    )


def _entry(
    problem: BudgetProblem, options: CompressionOptions, found: Found, n_samples: int
) -> MeasuredEntry:
    return MeasuredEntry(
        ratio=problem.ratio,
        page_group_size=problem.page_group_size,
        chunk_size_tokens=problem.chunk_size_tokens,
        page_size_rows=problem.page_size_rows,
        n_sink_tokens=problem.n_sink_tokens,
        window_size_tokens=options.compression_window_size,
        head_groups=found.head_groups,
        log={
            "origin": found.origin,
            "moved_pages": found.moved_pages,
            "divergence": found.divergence,
            "evaluations": found.evaluations,
            "n_samples": n_samples,
            "within_noise": list(found.within_noise),
            "check_samples": found.check_samples,
            "candidates": [asdict(trial) for trial in found.trials],
        },
    )


def _positions(
    samples: Sequence[Sequence[int]], later: Sequence[Sequence[int]] | None
) -> list[list[int]]:
    """[samples][positions], checked."""
    if later is None:
        return [
            list(range(len(sample) - max(1, len(sample) // 8), len(sample))) for sample in samples
        ]
    if len(later) != len(samples):
        raise ConfigurationError(
            f"positions are given for {len(later)} samples and there are {len(samples)}: give both "
            "for each"
        )
    for number, (sample, where) in enumerate(zip(samples, later, strict=True)):
        if not where or min(where) < 0 or max(where) >= len(sample):
            raise ConfigurationError(
                f"sample {number} of {len(sample)} tokens: positions of later turns must lie in "
                f"it, one at least, got {len(where)} from {min(where, default=None)} to "
                f"{max(where, default=None)}"
            )
    return [list(where) for where in later]
