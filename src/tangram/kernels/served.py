"""Which layouts, scorers and types the GPU kernels serve; others run on the references."""

from __future__ import annotations

import torch

from tangram.geometry import Geometry
from tangram.kernels.decode.tables import MAX_QUERY_HEADS
from tangram.kernels.seal_decode import MAX_CHUNK_TOKENS, has_kernel
from tangram.kernels.sizes import HEAD_SIZES

DTYPES = (torch.bfloat16, torch.float16)


def has_kernels(geometry: Geometry, scorer_name: str, dtype: torch.dtype) -> bool:
    """Whether the GPU kernels serve a layout and a scorer; if not, the references do."""
    return (
        has_kernel(scorer_name)
        and dtype in DTYPES
        and geometry.head_size in HEAD_SIZES
        and geometry.queries_per_kv_head <= MAX_QUERY_HEADS
        and geometry.chunk_size_tokens <= MAX_CHUNK_TOKENS
    )
