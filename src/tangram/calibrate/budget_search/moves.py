"""What a page is worth to each head group, learned from moves of many pages at once.

The divergence's logarithm is taken to be linear in the logarithms of the groups' pages, near the
budgets where the search stands. A move is drawn from what the model believes so far (Thompson
sampling): where it knows little, draws differ and groups are explored; where it knows much, pages
go from where they are worth least to where they are worth most. Groups of a layer are believed to
be alike, so whole layers are learned before single groups.
"""

from __future__ import annotations

import math

import numpy as np

from tangram.budgets.grouping import scale_to_total

TOTAL_WORTH = 3.0
"""Belief beforehand: fall of log divergence when all pages grow e-fold, dealt in proportion to
pages, as if the budgets begun from were the best; how uncertain that is, the next two tell."""
SPREAD = 1.5
SAME_LAYER = 0.5
NOISE = 0.05
MISFIT = 0.3
"""Deviation of an outcome from linear: a constant, and this part of the outcome."""
DRIFT = 0.02
"""Part of the first uncertainty that comes back with every step taken: the model is local."""
REACH = 0.5
"""Part of a group's pages that one move may change; at least one page."""


class PageWorth:
    """A Gaussian belief about the worth of every group's pages.

    Args:
        pages: [layers, groups], where the search begins.
    """

    def __init__(self, pages: np.ndarray) -> None:
        part = (pages / pages.sum()).reshape(-1)
        self.mean = TOTAL_WORTH * part
        deviation = SPREAD * TOTAL_WORTH * (0.5 / part.size + 0.5 * part)
        layer = np.repeat(np.arange(pages.shape[0]), pages.shape[1])
        alike = np.where(layer[:, None] == layer, SAME_LAYER, 0.0)
        np.fill_diagonal(alike, 1.0)
        self._first = alike * np.outer(deviation, deviation)
        self.covariance = self._first.copy()

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """[groups], a worth that the belief holds possible."""
        return rng.multivariate_normal(
            self.mean, self.covariance, method="eigh", check_valid="ignore"
        )

    def learn(self, before: np.ndarray, after: np.ndarray, fall: float) -> None:
        """Take in that the log divergence fell by `fall` from pages `before` to `after`."""
        change = np.log(after / before).reshape(-1)
        toward = self.covariance @ change
        variance = change @ toward + NOISE**2 + (MISFIT * fall) ** 2
        self.mean = self.mean + toward * ((fall - change @ self.mean) / variance)
        self.covariance = self.covariance - np.outer(toward, toward) / variance

    def step_taken(self) -> None:
        """The search stands elsewhere now."""
        self.covariance = self.covariance + DRIFT * self._first


def move_pages(
    pages: np.ndarray, worth: np.ndarray, count: int, *, floor: int, most: int
) -> np.ndarray:
    """Pages after up to `count` single pages went from where they are worth least to most.

    Args:
        pages: [groups] int64.
        worth: [groups], fall of the log divergence per growth of the log of a group's pages.
        count: pages to move, at most.
        floor: fewest pages of a group.
        most: most pages of a group.

    Returns:
        [groups] int64 with the same sum; each within `REACH` of where it was.
    """
    reach = np.maximum(1, (pages * REACH).astype(np.int64))
    low, high = np.maximum(pages - reach, floor), np.minimum(pages + reach, most)
    made = pages.copy()
    for _ in range(count):
        with np.errstate(divide="ignore"):
            gain = np.where((made < high) & (made >= pages), worth * np.log1p(1 / made), -np.inf)
            loss = worth * (np.log(made) - np.log(made - 1))
        loss = np.where((made > low) & (made <= pages), loss, np.inf)
        receiver = int(gain.argmax())
        loss[receiver] = np.inf
        donor = int(loss.argmin())
        if not gain[receiver] > loss[donor]:
            break
        made[receiver] += 1
        made[donor] -= 1
    return made


def against_all(
    pages: np.ndarray, group: int, change: float, *, floor: int, most: int
) -> np.ndarray:
    """Pages after one group has given to all others, or taken of them, in proportion to theirs.

    Args:
        pages: [groups] int64.
        group: which.
        change: what it takes, in parts of its pages above the floor; negative for what it gives. At
            least a page.
        floor: fewest pages of a group.
        most: most pages of a group.

    Returns:
        [groups] int64 with the same sum; the same pages where nothing can move.
    """
    if pages.size == 1:
        return pages.copy()
    total, others = int(pages.sum()), np.arange(pages.size) != group
    least = total - most * (pages.size - 1), floor
    largest = total - floor * (pages.size - 1), most
    step = max(1, round(abs(change) * (pages[group] - floor)))
    wanted = np.clip(pages[group] + math.copysign(step, change), max(least), min(largest))
    made = pages.copy()
    made[group] = int(wanted)
    made[others] = scale_to_total(pages[others], total - int(wanted), floor, most)
    return made


def between(
    pages: np.ndarray, donor: int, receiver: int, part: float, *, floor: int, most: int
) -> np.ndarray:
    """Pages after one group has given another a part of what it has above the floor, or one page.

    As much as the receiver has room for; else as `against_all`.
    """
    count = max(1, int(part * (pages[donor] - floor)))
    count = int(min(count, pages[donor] - floor, most - pages[receiver]))
    made = pages.copy()
    made[donor] -= count
    made[receiver] += count
    return made


def shake_pages(
    pages: np.ndarray, rng: np.random.Generator, part: float, *, floor: int, most: int
) -> np.ndarray:
    """Pages after a part of those above the floor has gone to other groups at random.

    Args:
        pages: [groups] int64.
        rng: of the pages that go, each as likely as any other, and of where they go.
        part: of the pages above the floor.
        floor: fewest pages of a group.
        most: most pages of a group.

    Returns:
        [groups] int64 with the same sum.
    """
    made = pages.copy()
    free = int((made - floor).sum())
    for _ in range(round(part * free)):
        room = np.flatnonzero(made < most)
        if len(room) == 0:
            break
        made[rng.choice(made.size, p=(made - floor) / free)] -= 1
        made[rng.choice(room)] += 1
    return made
