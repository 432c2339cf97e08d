"""Measuring budgets: the engine itself tells which of them stays closest to full KV."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tangram.budgets import MEASURED, BudgetProblem, MeasuredEntry, with_entry
from tangram.calibrate.budget_search.search import Found, check_samples, search_budgets
from tangram.errors import ConfigurationError
from tangram.geometry import HeadGroups
from tangram.plan.compression_plan import PAGE_SIZE_ROWS, group_size
from tangram.plan.options import CompressionOptions
from tangram.profile import Profile

if TYPE_CHECKING:
    from torch import Tensor

TOKENS_AT_ONCE = 32768
"""Tokens of samples that the engine computes in one step, where one sample is not longer."""


def measure_budgets(
    profile: Profile,
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
    found: Callable[[Profile], None] = lambda profile: None,
    **engine: Any,
) -> Profile:
    """The profile with measured budgets in `extra["measured"]`, one entry a ratio.

    Stock vLLM reads the samples once with full KV. Then, for every ratio, an engine of this process
    reads them again and again, with other budgets each time (`calibrate.search`); the divergence is
    KL(full || compressed) of the next token's distribution, in nats, the mean over a sample's
    positions and then over samples. Entries of other ratios and sizes stay in the profile.

    Args:
        profile: statistics of the model, which candidates are made from; its scorer is the one
            that budgets are measured with.
        model: folder or name of the model.
        samples: token ids of whole conversations, held back from the statistics; at least 3.
        later: for each sample, the positions whose next-token distributions count, those of later
            turns: questions' ends and answers. None: the last eighth of every sample.
        ratios: ratios to measure at; they share the time equally.
        page_group_size: H_p; the size that engines take by themselves when absent.
        chunk_size_tokens: C; the profile's when absent, and so for the next two.
        window_size_tokens: W.
        n_sink_tokens: S.
        weights: file of the scorer's gates, where it has some; the profile has but a digest of it.
        time_limit_s: seconds for all ratios together, without the start of engines. The first rule
            is measured in any case.
        max_evaluations: readings (of some samples) at each ratio, at most.
        tokens_at_once: tokens of a step; activations of so many must fit beside the KV cache.
        seed: of the moves that the search draws.
        progress: told in words what goes on.
        found: called after each ratio with the profile so far.
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
    parameters = dict(profile.scorer_parameters)
    if weights is not None:
        parameters["weights"] = weights
    asked = [
        CompressionOptions.from_mapping(
            {
                "compression_ratio": ratio,
                "page_group_size": page_group_size,
                "compression_chunk_size": chunk_size_tokens or profile.chunk_size_tokens,
                "compression_window_size": _either(window_size_tokens, profile.window_size_tokens),
                "compression_n_sink_tokens": _either(n_sink_tokens, profile.n_sink_tokens),
                "compression_scorer": profile.scorer_name,
                "compression_scorer_parameters": parameters,
            }
        )
        for ratio in sorted(set(ratios), reverse=True)
    ]
    for options in asked:  # what cannot be is told before an engine starts
        _problem(profile, options)
    engine = {**engine, "tokens_at_once": tokens_at_once}
    progress(f"reading {len(samples)} samples with full KV")
    texts = _read_full(model, samples, positions, engine)
    left = time_limit_s
    for done, options in enumerate(asked):
        # What is found at one ratio is a candidate at the next.
        problem = _problem(profile, options)
        budgets, seconds = _search(
            profile,
            model,
            options,
            problem,
            texts,
            engine,
            time_limit_s=left / (len(asked) - done),
            max_evaluations=max_evaluations,
            seed=seed,
            progress=partial(_tell, progress, options.compression_ratio),
        )
        left -= seconds
        profile = with_entry(profile, _entry(problem, options, budgets, len(samples)))
        found(profile)
    return profile


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


def _either(given: int | None, otherwise: int) -> int:
    return otherwise if given is None else given


def _tell(progress: Callable[[str], None], ratio: float, line: str) -> None:
    progress(f"ratio {ratio:g}: {line}")


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
