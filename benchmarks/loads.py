"""Batches of requests whose lengths are drawn, for kernels and engines."""

from __future__ import annotations

import math
import random
from typing import NamedTuple


class Drawn(NamedTuple):
    """Log-normal lengths, drawn again where they leave their bounds."""

    count: int
    median: int
    sigma: float
    least: int
    most: int

    def draw(self, source: random.Random) -> list[int]:
        """Lengths in tokens."""
        lengths: list[int] = []
        while len(lengths) < self.count:
            length = round(source.lognormvariate(math.log(self.median), self.sigma))
            if self.least <= length <= self.most:
                lengths.append(length)
        return lengths


def equal(count: int, context_tokens: int) -> Drawn:
    """Half a chunk more, so that there are as many raw tokens as on average."""
    length = context_tokens + 128
    return Drawn(count, length, 0.0, length, length)


def mid(count: int) -> Drawn:
    """Long conversations."""
    return Drawn(count, 46_000, 0.45, 20_000, 100_000)


def short(count: int) -> Drawn:
    """Short ones."""
    return Drawn(count, 6_500, 0.6, 1_500, 20_000)


LOADS = {
    "mid-48": (mid(48),),
    "short-48": (short(48),),
    "short-113": (short(113),),
    "short-160": (short(160),),
    "4x100K-60x4K": (equal(4, 100_000), Drawn(60, 4_000, 0.5, 1_000, 12_000)),
    "1x128K-31x2K": (equal(1, 131_072), Drawn(31, 2_000, 0.5, 600, 6_000)),
    "16x32K": (equal(16, 32_768),),
    "100x8K": (equal(100, 8_192),),
    "4x32K": (equal(4, 32_768),),
}
"""Batches by name, the uneven ones first."""


def draw(load: str, seed: int) -> tuple[int, ...]:
    """The lengths of a batch, the same for the same seed."""
    return tuple(length for part in LOADS[load] for length in part.draw(random.Random(seed)))
