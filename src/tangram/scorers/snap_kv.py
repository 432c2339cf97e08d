"""SnapKV: the tokens that the observation window attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from tangram.errors import ScorerError
from tangram.scorers.base import Chunks, Scorer, attention_over_chunk, check_whole


@dataclass(frozen=True)
class SnapKV(Scorer):
    """Mean attention of the window's queries, smoothed over neighbouring tokens.

    The softmax runs over the chunk's tokens only, so that a chunk's rows depend on nothing before
    it. Beyond the chunk's ends the smoothing reads zeros.

    Attributes:
        kernel_size: tokens that are averaged, odd; 1 does not smooth.

    Source: arXiv 2404.14469.
    """

    name: ClassVar[str] = "snap_kv"
    needs_window_queries: ClassVar[bool] = True

    kernel_size: int = 5

    def __post_init__(self) -> None:
        check_whole(self.name, "kernel_size", self.kernel_size, least=1)
        if self.kernel_size % 2 == 0:
            raise ScorerError(
                f"{self.name}: kernel_size is {self.kernel_size}, expected an odd number, so "
                "that as many tokens are averaged before a token as after it"
            )

    def score(self, chunks: Chunks) -> Tensor:
        """Attention, averaged over window, neighbours and the KV head's query heads."""
        attention = attention_over_chunk(self.window_queries(chunks), chunks)
        mean = attention.mean(dim=(-3, -2))  # [..., kv_heads, tokens]
        smooth = F.avg_pool1d(
            mean.reshape(-1, 1, chunks.num_tokens),
            self.kernel_size,
            stride=1,
            padding=self.kernel_size // 2,
        )
        return smooth.reshape(mean.shape).mT.contiguous()
