"""From budgets to better ones: pages moved between head groups while the divergence falls.

Moves are judged by the first part of the samples; the second tells when they begin to fit the
samples instead of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from tangram.budgets import BudgetProblem
from tangram.calibrate.budget_search.meter import Meter
from tangram.calibrate.budget_search.moves import (
    PageWorth,
    against_all,
    between,
    move_pages,
    shake_pages,
)
from tangram.geometry import HeadGroups

ROUND = 25
"""Moves tried between two looks at the second part; a quarter of the groups if that is more."""
PATIENCE = 4
"""Rounds without a better second part after which moving ends."""
FIRST_STEP, LARGEST_STEP = 0.08, 0.2
"""Part of all pages that a move may take; it grows by GROWTH with success and shrinks without."""
GROWTH, SHRINKAGE = 1.4, 0.9
AGAINST_ALL = (-1.0, -0.5, 0.5, 1.0)
"""What one group gives all others or takes of them, in parts of its pages above the floor."""
BETWEEN = (0.0, 0.5, 1.0)
"""What one group gives another, in such parts; 0: one page."""
SHAKEN_PART = 0.3
"""Part of the pages above the floor that a restart moves at random."""
RESTARTS = 8
"""Restarts in a row that found nothing better, after which the search ends."""
DRAWS = 50
"""Moves drawn in a row that were all tried before, after which moving ends."""


def search_around(
    problem: BudgetProblem,
    meter: Meter,
    start: HeadGroups,
    seed: int,
    progress: Callable[[str], None],
) -> HeadGroups:
    """Search from the start, then again from the best with pages shaken, while that helps."""
    descent = _Descent(problem, meter, np.random.default_rng(seed), progress)
    best, failures = descent.run(start), 0
    while failures < RESTARTS and not meter.spent():
        found = descent.run(descent.shaken(best))
        failures += 1
        if meter.whole(found) < meter.whole(best):
            best, failures = found, 0
        progress(f"shaken: {meter.whole(found):.6f}, the best {meter.whole(best):.6f}")
    return best


@dataclass(frozen=True)
class _Descent:
    """Moves pages while that helps; its draws go on from one run to the next."""

    problem: BudgetProblem
    meter: Meter
    rng: np.random.Generator
    progress: Callable[[str], None]

    def run(self, start: HeadGroups) -> HeadGroups:
        """Budgets that no move tried makes better."""
        return self._polish(self._improve(start))

    def shaken(self, budgets: HeadGroups) -> HeadGroups:
        """Budgets with a part of the pages above the floor moved at random."""
        return self._moved(budgets, partial(shake_pages, rng=self.rng, part=SHAKEN_PART))

    def _moved(self, budgets: HeadGroups, move: Callable[..., np.ndarray]) -> HeadGroups:
        """The same groups of heads with the pages that a move makes of theirs."""
        pages, problem = pages_of(budgets), self.problem
        moved = move(pages.reshape(-1), floor=problem.floor_pages, most=problem.max_pages)
        return HeadGroups.from_lists(budgets.to_lists()[0], moved.reshape(pages.shape).tolist())

    def _improve(self, start: HeadGroups) -> HeadGroups:
        """Move while the first part's divergence falls; what the second likes best of it."""
        problem, meter = self.problem, self.meter
        belief = PageWorth(pages_of(start))
        current = best = start
        seen, step, since_look, rounds_left = {start}, FIRST_STEP, 0, PATIENCE
        while rounds_left > 0 and not meter.spent():
            trial = self._draw_move(belief, current, step, seen)
            if trial is None:
                break
            seen.add(trial)
            ratio, whole = meter.ratio(trial, current)
            belief.learn(pages_of(current), pages_of(trial), -math.log(ratio))
            if whole and ratio < 1:
                current = trial
                belief.step_taken()
                step = min(step * GROWTH, LARGEST_STEP)
                self.progress(f"moved: {meter.whole(current):.6f}")
            else:
                step = max(step * SHRINKAGE, 1 / problem.total_pages)
            since_look += 1
            if since_look == max(ROUND, problem.num_groups // 4):
                since_look, rounds_left = 0, rounds_left - 1
                if meter.check(current) < meter.check(best):
                    best, rounds_left = current, PATIENCE
        return min(current, best, key=meter.check)

    def _draw_move(
        self, belief: PageWorth, current: HeadGroups, step: float, seen: set[HeadGroups]
    ) -> HeadGroups | None:
        """Budgets that were not tried yet, or None when none are found."""
        count = max(1, round(step * self.problem.total_pages))
        for _ in range(DRAWS):
            move = partial(move_pages, worth=belief.draw(self.rng), count=count)
            trial = self._moved(current, move)
            if trial not in seen:
                return trial
        return None

    def _polish(self, start: HeadGroups) -> HeadGroups:
        """Move pages of one group at a time until no such move helps; as `_improve` else.

        A belief that is linear near one point misses what only helps when it is whole.
        """
        meter = self.meter
        current = best = start
        rounds_left, helped = PATIENCE, True
        while helped and rounds_left > 0:
            helped = False
            for move in _single_moves(self.problem.num_groups, self.rng):
                if meter.spent():
                    return min(current, best, key=meter.check)
                trial = self._moved(current, move)
                if trial == current:
                    continue
                ratio, whole = meter.ratio(trial, current)
                if not whole or ratio >= 1:
                    continue
                current, helped = trial, True
                self.progress(f"moved: {meter.whole(current):.6f}")
                rounds_left -= 1
                if meter.check(current) < meter.check(best):
                    best, rounds_left = current, PATIENCE
                if rounds_left == 0:
                    break
        return best


def _single_moves(num_groups: int, rng: np.random.Generator) -> Iterator[Callable[..., np.ndarray]]:
    """First every group against all others, then every pair, each in random order."""
    for group in rng.permutation(num_groups):
        for change in AGAINST_ALL:
            yield partial(against_all, group=group, change=change)
    for pair in rng.permutation(num_groups * num_groups):
        donor, receiver = divmod(int(pair), num_groups)
        if donor != receiver:
            for part in BETWEEN:
                yield partial(between, donor=donor, receiver=receiver, part=part)


def pages_of(head_groups: HeadGroups) -> np.ndarray:
    """[layers, groups] int64."""
    return np.asarray(head_groups.pages)
