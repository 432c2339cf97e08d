"""Attention of many queries at once, over sealed pages and raw tokens, on a GPU.

`make_head_table` is built once a layer, `make_tiles` once a step; `prefill_attention` runs a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tangram.kernels.cache_view import CacheView
from tangram.kernels.prefill.tables import Blocks, choose_blocks, make_head_table, make_tiles

if TYPE_CHECKING:
    from tangram.kernels.flash import SealedPart

__all__ = ["Blocks", "choose_blocks", "make_head_table", "make_tiles", "prefill_attention"]


def prefill_attention(
    query: Tensor,
    tiles: Tensor,
    view: CacheView,
    *,
    head_table: Tensor,
    softmax_scale: float,
    out: Tensor,
    blocks: Blocks | None = None,
    sealed_part: SealedPart | None = None,
) -> None:
    """See `tangram.kernels.prefill.kernel.prefill_attention`; imports Triton when first used."""
    from tangram.kernels.prefill import kernel

    kernel.prefill_attention(
        query,
        tiles,
        view,
        head_table=head_table,
        softmax_scale=softmax_scale,
        out=out,
        blocks=blocks,
        sealed_part=sealed_part,
    )
