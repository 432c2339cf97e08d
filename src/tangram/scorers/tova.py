"""TOVA: the tokens that the last query attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tangram.scorers.base import Chunks, Scorer, attention_over_chunk


@dataclass(frozen=True)
class Tova(Scorer):
    """Attention of the last query before the boundary, averaged over all heads of the layer.

    One decision for the whole layer, as in the paper: every KV head gets the same scores. The
    softmax runs over the chunk's tokens only.

    Source: arXiv 2401.06104.
    """

    name: ClassVar[str] = "tova"
    needs_window_queries: ClassVar[bool] = True

    def score(self, chunks: Chunks) -> Tensor:
        """Mean attention over the layer's query heads, the same for every KV head."""
        last = self.window_queries(chunks)[..., -1:, :, :]
        attention = attention_over_chunk(last, chunks)
        mean = attention.mean(dim=(-4, -3, -2))  # [..., tokens]
        return mean.unsqueeze(-1).expand(chunks.keys.shape[:-1]).contiguous()
