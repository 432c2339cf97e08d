"""StreamingLLM: the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tangram.scorers.base import Chunks, Scorer


@dataclass(frozen=True)
class StreamingLLM(Scorer):
    """Keeps the last tokens of the chunk; the sinks are kept with chunk 0 under any scorer.

    Source: arXiv 2309.17453.
    """

    name: ClassVar[str] = "streaming_llm"

    def score(self, chunks: Chunks) -> Tensor:
        """Index of the token in its chunk."""
        index = torch.arange(chunks.num_tokens, dtype=torch.float32, device=chunks.keys.device)
        return index.unsqueeze(-1).expand(chunks.keys.shape[:-1]).contiguous()
