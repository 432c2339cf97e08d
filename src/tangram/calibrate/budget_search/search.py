"""Budgets by trial: the best of many candidates, improved by moving pages while it helps.

The caller measures; here it is only decided what to measure next. Samples are in two parts. On the
first, candidates are compared and pages moved; the second, which no move has seen, has the last
word (`choice`), and tells when moving begins to fit the samples instead of the model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from tangram.budgets import BudgetProblem
from tangram.calibrate.budget_search.candidates import blends, nearby, single_rules
from tangram.calibrate.budget_search.choice import choose
from tangram.calibrate.budget_search.descent import pages_of, search_around
from tangram.calibrate.budget_search.meter import LARGEST, LEAST_SAMPLES, Divergence, Meter
from tangram.errors import ConfigurationError
from tangram.geometry import HeadGroups

CANDIDATE_PART = 1 / 3
"""Part of the limits after which no more blends are tried."""
IMPROVED = "improved"


@dataclass(frozen=True)
class Trial:
    """One candidate: its name, and its divergence on each part (None: not looked at, or spared)."""

    name: str
    divergence: float | None
    checked: float | None


@dataclass(frozen=True)
class Found:
    """What a search ends with.

    Attributes:
        head_groups: the winner.
        origin: rule or blend that it is, or that it began from.
        moved_pages: pages that differ from the origin's.
        divergence: the winner's, on the second part of the samples, in nats.
        each: [samples], the same on each of them.
        trials: all rules and blends that were tried, then the improved budgets.
        evaluations: calls of the divergence.
        within_noise: names of other budgets that the second part cannot tell from the winner.
        check_samples: samples of the second part.
    """

    head_groups: HeadGroups
    origin: str
    moved_pages: int
    divergence: float
    each: tuple[float, ...]
    trials: tuple[Trial, ...]
    evaluations: int
    within_noise: tuple[str, ...]
    check_samples: int


def check_samples(n_samples: int) -> None:
    """Raise ConfigurationError where there are too few samples to search with."""
    if n_samples < LEAST_SAMPLES:
        raise ConfigurationError(
            f"budgets are measured on {n_samples} sample(s): give at least {LEAST_SAMPLES}, so "
            "that some can judge what was chosen on the others"
        )


def search_budgets(
    problem: BudgetProblem,
    divergence: Divergence,
    n_samples: int,
    *,
    time_limit_s: float,
    max_evaluations: int | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """The budgets that diverge least from full KV among all that the limits let it try.

    With the same divergences the result is the same, as far as `time_limit_s` does not end the
    search. On the second part of the samples no rule that was tried is better by more than noise.

    Args:
        problem: sizes, ratio and profile; total, floor and ceiling hold for all budgets tried.
        divergence: measures budgets.
        n_samples: samples that it can measure on.
        time_limit_s: seconds after which nothing more is tried. The first rule is measured in any
            case.
        max_evaluations: calls of `divergence` after which the same holds.
        seed: of the moves that are drawn.
        progress: told in words what was found.
        clock: seconds.

    Raises:
        ConfigurationError: fewer than three samples, or no budgets whose divergence is a number.

    Source: docs/budgets.md.
    """
    check_samples(n_samples)
    limit = math.inf if max_evaluations is None else max_evaluations
    meter = Meter(divergence, n_samples, time_limit_s, limit, clock)
    rules = _measured_rules(meter, single_rules(problem), progress)
    trials, origin, start = _best_candidate(problem, meter, rules, progress)
    improved = search_around(problem, meter, start, seed, progress)

    finals = {**_checked_rules(meter, rules), origin: start, IMPROVED: improved}
    each = {name: meter.checked(budgets) for name, budgets in finals.items()}
    checked = {name: float(found.mean()) for name, found in each.items()}
    trials = [replace(trial, checked=checked.get(trial.name)) for trial in trials]
    trials.append(Trial(IMPROVED, meter.whole(improved), checked[IMPROVED]))
    winner, alike = choose(each)  # of equal ones the improved
    _refuse_endless(checked[winner])
    progress(f"taken: {winner}, {checked[winner]:.6f} on the samples that no move has seen")
    within_noise = tuple(name for name in alike if finals[name] != finals[winner])
    if within_noise:
        progress(f"within noise of it on {each[winner].size} samples: {', '.join(within_noise)}")
    moved = winner == IMPROVED and improved != start
    return Found(
        head_groups=finals[winner],
        origin=origin if winner == IMPROVED else winner,
        moved_pages=int(np.abs(pages_of(improved) - pages_of(start)).sum()) // 2 if moved else 0,
        divergence=checked[winner],
        each=tuple(each[winner].tolist()),
        trials=tuple(trials),
        evaluations=meter.evaluations,
        within_noise=within_noise,
        check_samples=each[winner].size,
    )


def _refuse_endless(least: float) -> None:
    if least >= LARGEST:
        raise ConfigurationError(
            "with no budgets does the model give answers that are numbers: measure with another "
            "--dtype, with other texts, or not at all (--no-measure)"
        )


def _measured_rules(
    meter: Meter, rules: dict[str, HeadGroups], progress: Callable[[str], None]
) -> dict[str, HeadGroups]:
    """The rules that there was time for on the first part, the first of them in any case."""
    measured: dict[str, HeadGroups] = {}
    for name, budgets in rules.items():
        if measured and meter.spent():
            left = [name for name in rules if name not in measured]
            progress(f"the time is up before {', '.join(left)}")
            break
        measured[name] = budgets
        progress(f"{name}: {meter.whole(budgets):.6f}")
    return measured


def _checked_rules(meter: Meter, rules: dict[str, HeadGroups]) -> dict[str, HeadGroups]:
    return {name: budgets for name, budgets in rules.items() if meter.has_checked(budgets)}


def _best_candidate(
    problem: BudgetProblem,
    meter: Meter,
    rules: dict[str, HeadGroups],
    progress: Callable[[str], None],
) -> tuple[list[Trial], str, HeadGroups]:
    """(all that were tried, name and budgets of the best on the first part)."""
    value = {name: meter.whole(budgets) for name, budgets in rules.items()}
    ranked = sorted(value, key=value.__getitem__)
    trials = [Trial(name, value[name], None) for name in ranked]
    _refuse_endless(value[ranked[0]])
    best, seen = ranked[0], dict(rules)
    for name, budgets in chain(nearby(problem), blends(problem, ranked)):
        if meter.spent(CANDIDATE_PART):
            break
        if budgets in seen.values():
            continue
        ratio, whole = meter.ratio(budgets, seen[best])
        seen[name] = budgets
        trials.append(Trial(name, meter.whole(budgets) if whole else None, None))
        progress(f"{name}: {ratio:.3f} of the best" + ("" if whole else ", on half of the samples"))
        if whole and ratio < 1:
            best = name
    for name in ranked:  # before the moves, which go on until the time is up
        if meter.spent():
            break
        meter.check(rules[name])
    return trials, best, seen[best]
