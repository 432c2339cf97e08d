"""Sealing the chunks that a step completes in plain torch, chunk by chunk, any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tangram.geometry import Geometry
from tangram.kernels.cache_view import CacheView
from tangram.kernels.reference.attend import gather_recent
from tangram.kernels.reference.seal import pack
from tangram.kernels.segments import cut_step

Choose = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(requests [1], positions [1, tokens], raw rows [1, kv_heads, tokens, 2 * head_size], rows) to
the tokens that each head keeps, [1, rows, kv_heads] int64, ascending. A scorer and `top_rows`."""


def seal_decode(
    view: CacheView,
    *,
    geometry: Geometry,
    layer: int,
    choose: Choose,
) -> None:
    """Seal every chunk that the step completes, of one layer.

    Args:
        view: the cache of the layer.
        geometry: the layout.
        layer: attention layer.
        choose: which tokens each head keeps.
    """
    g, device = geometry, view.recent.device
    query_start, seq_lens = (t.cpu().long().numpy() for t in (view.query_start, view.seq_lens))
    _, sealing = cut_step(g, query_start, seq_lens)
    for row, chunk in zip(sealing.request.tolist(), sealing.chunk.tolist(), strict=True):
        request = torch.tensor([row], device=device)
        position = torch.arange(*g.chunk_range(chunk), device=device)[None]
        raw = gather_recent(view, request, position, g)
        blocks = view.sealed_table[request, chunk].long()
        for group, members in enumerate(g.head_groups.heads[layer]):
            kept = choose(request, position, raw, g.kept_rows(layer, group, chunk))
            chosen = kept[..., list(members)]
            pack(view.sealed, blocks, raw, chosen, geometry=g, layer=layer, group=group)
