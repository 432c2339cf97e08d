"""Sealing the chunks that a step completes in plain torch, chunk by chunk, any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tangram.geometry import Geometry
from tangram.kernels.reference.attend import gather_recent
from tangram.kernels.reference.seal import pack
from tangram.kernels.segments import cut_step

Choose = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(requests [1], positions [1, tokens], raw rows [1, kv_heads, tokens, 2 * head_size], rows) to
the tokens that each head keeps, [1, rows, kv_heads] int64, ascending. A scorer and `top_rows`."""


def seal_decode(
    sealed_cache: Tensor,
    sealed_table: Tensor,
    recent_cache: Tensor,
    recent_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    *,
    geometry: Geometry,
    layer: int,
    choose: Choose,
) -> None:
    """Seal every chunk that the step completes, of one layer.

    Args:
        sealed_cache: [blocks, pages_per_block, H_p, P, 2 * head_size].
        sealed_table: [requests, chunks].
        recent_cache: [blocks, kv_heads, R, 2 * head_size].
        recent_table: [requests, blocks].
        query_start: [requests + 1], where each request's queries begin in the step.
        seq_lens: [requests], tokens computed after the step.
        geometry: the layout.
        layer: attention layer.
        choose: which tokens each head keeps.
    """
    g, device = geometry, recent_cache.device
    _, sealing = cut_step(g, query_start.cpu().long().numpy(), seq_lens.cpu().long().numpy())
    for row, chunk in zip(sealing.request.tolist(), sealing.chunk.tolist(), strict=True):
        request = torch.tensor([row], device=device)
        position = torch.arange(*g.chunk_range(chunk), device=device)[None]
        raw = gather_recent(recent_cache, recent_table, request, position, g)
        blocks = sealed_table[request, chunk].long()
        for group, members in enumerate(g.head_groups.heads[layer]):
            kept = choose(request, position, raw, g.kept_rows(layer, group, chunk))
            chosen = kept[..., list(members)]
            pack(sealed_cache, blocks, raw, chosen, geometry=g, layer=layer, group=group)
