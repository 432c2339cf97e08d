"""Packing chosen rows into pages in plain torch, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from tangram.geometry import Geometry


def pack(
    sealed_cache: Tensor,
    blocks: Tensor,
    raw: Tensor,
    chosen: Tensor,
    *,
    geometry: Geometry,
    layer: int,
    group: int,
) -> None:
    """Write the chosen rows of one head group to its pages; rows not in use become zero.

    The rows end at the last row of the pages, in the order given: see `Geometry.first_row`.

    Args:
        sealed_cache: [blocks, pages_per_block, H_p, P, 2 * head_size].
        blocks: [chunks] int64, the block that each chunk is sealed into.
        raw: [chunks, kv_heads, tokens, 2 * head_size], all tokens of the chunks.
        chosen: [chunks, rows, H_p] int64, tokens that each head keeps, ascending.
        geometry: the layout.
        layer: attention layer.
        group: head group of the layer.
    """
    g = geometry
    heads = list(g.head_groups.heads[layer][group])
    budget = g.budget_rows(layer, group)
    index = chosen.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, g.row_elements)
    rows = raw[:, heads].gather(2, index)  # [chunks, H_p, rows, 2D]
    padded = torch.nn.functional.pad(rows, (0, 0, budget - rows.shape[2], 0))
    pages = padded.unflatten(2, (-1, g.page_size_rows)).transpose(1, 2)
    first_page = g.page_offsets[layer][group]
    sealed_cache[blocks, first_page : first_page + pages.shape[1]] = pages.to(sealed_cache.dtype)
