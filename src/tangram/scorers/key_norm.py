"""Key norm: the keys of least length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tangram.scorers.base import Chunks, Scorer


@dataclass(frozen=True)
class KeyNorm(Scorer):
    """Keeps the tokens whose keys have the smallest L2 norm: those draw much attention.

    Source: arXiv 2406.11430.
    """

    name: ClassVar[str] = "key_norm"

    def score(self, chunks: Chunks) -> Tensor:
        """Minus the L2 norm of the key."""
        return -torch.linalg.vector_norm(chunks.keys.float(), dim=-1)
