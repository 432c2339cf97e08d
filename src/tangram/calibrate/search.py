"""Budgets by trial: the best of many candidates, improved by moving pages while it helps.

The caller measures; here it is only decided what to measure next. Samples are in two parts. On the
first, candidates are compared and pages moved; the second, which no move has seen, has the last
word, and tells when moving begins to fit the samples instead of the model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from tangram.budgets import BudgetProblem
from tangram.calibrate.candidates import blends, nearby, single_rules
from tangram.calibrate.moves import PageWorth, move_pages, pair_moves
from tangram.errors import ConfigurationError
from tangram.geometry import HeadGroups

Divergence = Callable[[HeadGroups, Sequence[int]], float]
"""(budgets, samples by index) -> mean divergence from full KV on them, in nats."""

CHECK_PART = 3
"""Every third sample belongs to the part that has the last word."""
CANDIDATE_PART = 1 / 3
"""Part of the limits after which no more blends are tried."""
HOPELESS = 1.1
"""Where half of the first part diverges by this factor more than the best, the rest is spared."""
ROUND = 25
"""Moves tried between two looks at the second part; a quarter of the groups if that is more."""
PATIENCE = 4
"""Rounds without a better second part after which moving ends."""
FIRST_STEP, LARGEST_STEP = 0.08, 0.2
"""Part of all pages that a move may take; it grows by GROWTH with success and shrinks without."""
GROWTH, SHRINKAGE = 1.4, 0.9
IMPROVED = "improved"
DRAWS = 50
"""Moves drawn in a row that were all tried before, after which moving ends."""
SMALLEST = 1e-9
"""Divergences below count as this: their logarithm is taken."""


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
        trials: all rules and blends, in the order tried, then the improved budgets.
        evaluations: calls of the divergence.
    """

    head_groups: HeadGroups
    origin: str
    moved_pages: int
    divergence: float
    trials: tuple[Trial, ...]
    evaluations: int


class _Meter:
    """Measures and remembers, and says when the limits are reached."""

    def __init__(
        self,
        divergence: Divergence,
        n_samples: int,
        seconds: float,
        max_evaluations: float,
        clock: Callable[[], float],
    ) -> None:
        self._divergence, self._clock = divergence, clock
        self._seconds, self._max_evaluations = seconds, max_evaluations
        self._begun = clock()
        self.evaluations = 0
        self._known: dict[tuple[HeadGroups, tuple[int, ...]], float] = {}
        self._check = tuple(range(CHECK_PART - 1, n_samples, CHECK_PART))
        choose = [index for index in range(n_samples) if index not in self._check]
        half = -(-len(choose) // 2)
        self._halves = tuple(choose[:half]), tuple(choose[half:])

    def spent(self, part: float = 1.0) -> bool:
        """Whether this part of a limit is used up."""
        return (
            self._clock() - self._begun >= part * self._seconds
            or self.evaluations >= part * self._max_evaluations
        )

    def check(self, budgets: HeadGroups) -> float:
        """Divergence on the second part of the samples."""
        return self._of(budgets, self._check)

    def whole(self, budgets: HeadGroups) -> float:
        """Divergence on the first part of the samples."""
        weights = [len(half) for half in self._halves]
        return float(np.average([self._of(budgets, h) for h in self._halves], weights=weights))

    def ratio(self, budgets: HeadGroups, rival: HeadGroups) -> tuple[float, bool]:
        """Divergence over the rival's, and whether on all of the first part or only on half."""
        half = self._of(budgets, self._halves[0]) / self._of(rival, self._halves[0])
        if half > HOPELESS:
            return half, False
        return self.whole(budgets) / self.whole(rival), True

    def _of(self, budgets: HeadGroups, samples: tuple[int, ...]) -> float:
        key = budgets, samples
        if key not in self._known:
            self.evaluations += 1
            self._known[key] = max(self._divergence(budgets, samples), SMALLEST)
        return self._known[key]


def check_samples(n_samples: int) -> None:
    """Raise ConfigurationError where there are too few samples to search with."""
    if n_samples < CHECK_PART:
        raise ConfigurationError(
            f"budgets are measured on {n_samples} sample(s): give at least {CHECK_PART}, so that "
            "some can judge what was chosen on the others"
        )


def search_budgets(
    problem: BudgetProblem,
    divergence: Divergence,
    n_samples: int,
    *,
    time_limit_s: float,
    max_evaluations: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """The budgets that diverge least from full KV among all that the limits let it try.

    With the same divergences the result is the same, as far as `time_limit_s` does not end the
    search. On the second part of the samples no single rule is better than it.

    Args:
        problem: sizes, ratio and profile; total, floor and ceiling hold for all budgets tried.
        divergence: measures budgets.
        n_samples: samples that it can measure on.
        time_limit_s: seconds after which no more candidates and moves are tried. The rules
            themselves are always measured, on both parts.
        max_evaluations: calls of `divergence` after which the same holds.
        progress: told in words what was found.
        clock: seconds.

    Raises:
        ConfigurationError: fewer than three samples.

    Source: docs/budgets.md.
    """
    check_samples(n_samples)
    limit = math.inf if max_evaluations is None else max_evaluations
    meter = _Meter(divergence, n_samples, time_limit_s, limit, clock)
    rules = single_rules(problem)
    trials, origin, start = _best_candidate(problem, meter, rules, progress)
    improved = _improve(problem, meter, start, progress)
    improved = _polish(problem, meter, improved, progress)

    finals = {**rules, origin: start, IMPROVED: improved}
    checked = {name: meter.check(budgets) for name, budgets in finals.items()}
    trials = [replace(trial, checked=checked.get(trial.name)) for trial in trials]
    trials.append(Trial(IMPROVED, meter.whole(improved), checked[IMPROVED]))
    winner = min(reversed(finals), key=checked.__getitem__)  # of equal ones the improved
    progress(f"taken: {winner}, {checked[winner]:.6f} on the samples that no move has seen")
    moved = winner == IMPROVED and improved != start
    return Found(
        head_groups=finals[winner],
        origin=origin if winner == IMPROVED else winner,
        moved_pages=int(np.abs(_pages(improved) - _pages(start)).sum()) // 2 if moved else 0,
        divergence=checked[winner],
        trials=tuple(trials),
        evaluations=meter.evaluations,
    )


def _best_candidate(
    problem: BudgetProblem,
    meter: _Meter,
    rules: dict[str, HeadGroups],
    progress: Callable[[str], None],
) -> tuple[list[Trial], str, HeadGroups]:
    """(all that were tried, name and budgets of the best on the first part)."""
    value = {name: meter.whole(budgets) for name, budgets in rules.items()}
    ranked = sorted(value, key=value.__getitem__)
    trials = [Trial(name, value[name], None) for name in ranked]
    for name in ranked:
        progress(f"{name}: {value[name]:.6f}")
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
    return trials, best, seen[best]


def _improve(
    problem: BudgetProblem, meter: _Meter, start: HeadGroups, progress: Callable[[str], None]
) -> HeadGroups:
    """Move pages while the first part's divergence falls; what the second part likes best of it."""
    rng = np.random.default_rng(0)
    belief = PageWorth(_pages(start))
    current = best = start
    seen, step, since_look, rounds_left = {start}, FIRST_STEP, 0, PATIENCE
    while rounds_left > 0 and not meter.spent():
        trial = _draw_move(problem, belief, rng, current, step, seen)
        if trial is None:
            break
        seen.add(trial)
        ratio, whole = meter.ratio(trial, current)
        belief.learn(_pages(current), _pages(trial), -math.log(ratio))
        if whole and ratio < 1:
            current = trial
            belief.step_taken()
            step = min(step * GROWTH, LARGEST_STEP)
            progress(f"moved: {meter.whole(current):.6f}")
        else:
            step = max(step * SHRINKAGE, 1 / problem.total_pages)
        since_look += 1
        if since_look == max(ROUND, problem.num_groups // 4):
            since_look, rounds_left = 0, rounds_left - 1
            if meter.check(current) < meter.check(best):
                best, rounds_left = current, PATIENCE
    return min(current, best, key=meter.check)


def _polish(
    problem: BudgetProblem, meter: _Meter, start: HeadGroups, progress: Callable[[str], None]
) -> HeadGroups:
    """Move pages between two groups at a time until no such move helps; as `_improve` else.

    A belief that is linear near one point misses what only helps together; pairs miss less.
    """
    rng = np.random.default_rng(0)
    current = best = start
    rounds_left, helped = PATIENCE, True
    while helped and rounds_left > 0:
        helped = False
        moves = pair_moves(
            _pages(current).reshape(-1), rng, floor=problem.floor_pages, most=problem.max_pages
        )
        for donor, receiver, count in moves:
            if meter.spent():
                return min(current, best, key=meter.check)
            pages = _pages(current).copy()
            pages.flat[donor] -= count
            pages.flat[receiver] += count
            if pages.flat[donor] < problem.floor_pages or pages.flat[receiver] > problem.max_pages:
                continue  # a move before it has changed these groups
            trial = HeadGroups.from_lists(current.to_lists()[0], pages.tolist())
            ratio, whole = meter.ratio(trial, current)
            if not whole or ratio >= 1:
                continue
            current, helped = trial, True
            progress(f"moved between two: {meter.whole(current):.6f}")
            rounds_left -= 1
            if meter.check(current) < meter.check(best):
                best, rounds_left = current, PATIENCE
            if rounds_left == 0:
                break
    return best


def _draw_move(
    problem: BudgetProblem,
    belief: PageWorth,
    rng: np.random.Generator,
    current: HeadGroups,
    step: float,
    seen: set[HeadGroups],
) -> HeadGroups | None:
    """Budgets that were not tried yet, or None when none are found."""
    pages = _pages(current)
    count = max(1, round(step * problem.total_pages))
    for _ in range(DRAWS):
        moved = move_pages(
            pages.reshape(-1),
            belief.draw(rng),
            count,
            floor=problem.floor_pages,
            most=problem.max_pages,
        )
        trial = HeadGroups.from_lists(current.to_lists()[0], moved.reshape(pages.shape).tolist())
        if trial not in seen:
            return trial
    return None


def _pages(head_groups: HeadGroups) -> np.ndarray:
    """[layers, groups] int64."""
    return np.asarray(head_groups.pages)
