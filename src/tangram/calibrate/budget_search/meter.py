"""The divergence of budgets on the parts of the samples, remembered, and the limits on asking."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tangram.geometry import HeadGroups

Divergence = Callable[[HeadGroups, Sequence[int]], Sequence[float]]
"""(budgets, samples by index) -> divergence from full KV on each of them, in nats."""

CHECK_PART = 2
"""Every second sample belongs to the part that has the last word."""
LEAST_SAMPLES = 3
"""One that has the last word, and one in each half of the others."""
HOPELESS = 1.1
"""Where half of the first part diverges by this factor more than the best, the rest is spared."""
SMALLEST = 1e-9
"""Divergences below count as this: their logarithm is taken."""
LARGEST = 1e9
"""Divergences above count as this, and so does what is no number: such budgets are never taken."""


class Meter:
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
        self._known: dict[tuple[HeadGroups, tuple[int, ...]], np.ndarray] = {}
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
        """Mean divergence on the second part of the samples."""
        return float(self.checked(budgets).mean())

    def has_checked(self, budgets: HeadGroups) -> bool:
        """Whether the second part was looked at."""
        return (budgets, self._check) in self._known

    def checked(self, budgets: HeadGroups) -> np.ndarray:
        """[samples], divergences on the second part."""
        return self._of(budgets, self._check)

    def whole(self, budgets: HeadGroups) -> float:
        """Mean divergence on the first part of the samples."""
        return float(np.concatenate([self._of(budgets, half) for half in self._halves]).mean())

    def ratio(self, budgets: HeadGroups, rival: HeadGroups) -> tuple[float, bool]:
        """Divergence over the rival's, and whether on all of the first part or only on half."""
        first = self._halves[0]
        half = float(self._of(budgets, first).mean() / self._of(rival, first).mean())
        if half > HOPELESS:
            return half, False
        return self.whole(budgets) / self.whole(rival), True

    def _of(self, budgets: HeadGroups, samples: tuple[int, ...]) -> np.ndarray:
        key = budgets, samples
        if key not in self._known:
            self.evaluations += 1
            found = np.asarray(self._divergence(budgets, samples), dtype=np.float64)
            assert found.shape == (len(samples),), found.shape
            self._known[key] = np.nan_to_num(found, nan=LARGEST).clip(SMALLEST, LARGEST)
        return self._known[key]
