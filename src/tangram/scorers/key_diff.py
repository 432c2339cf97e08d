"""KeyDiff: the keys least like the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from tangram.scorers.base import Chunks, Scorer


@dataclass(frozen=True)
class KeyDiff(Scorer):
    """Keeps the keys that point away from the mean direction (the anchor) of the chunk's keys.

    A key, or an anchor, of length 0 has no direction and scores 0.

    Source: arXiv 2504.15364.
    """

    name: ClassVar[str] = "key_diff"

    def score(self, chunks: Chunks) -> Tensor:
        """Minus the cosine between the key and the mean of the normalised keys."""
        directions = F.normalize(chunks.keys.float(), dim=-1)
        anchor = F.normalize(directions.mean(dim=-3, keepdim=True), dim=-1)
        return -(directions * anchor).sum(dim=-1)
