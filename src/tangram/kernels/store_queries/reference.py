"""Storing queries in plain torch, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from tangram.kernels.cache_view import CacheView


def store_queries(query: Tensor, view: CacheView, layer: int, window_size_tokens: int) -> None:
    """See `tangram.kernels.store_queries.store_queries`."""
    assert view.ring is not None and view.ring_table is not None
    ring, ring_table, seq_lens = view.ring.select(2, layer), view.ring_table, view.seq_lens
    begin, end = view.query_start[:-1].long(), view.query_start[1:].long()
    count = torch.minimum(end - begin, seq_lens)
    nth = torch.arange(1, window_size_tokens + 1, device=query.device)
    request, column = torch.nonzero(nth <= count[:, None], as_tuple=True)
    back = nth[column]  # 1 is a request's last query
    slot = (seq_lens[request] - back) % window_size_tokens
    R = ring.shape[1]
    block = ring_table[request, slot // R].long()
    ring[block, slot % R] = query[end[request] - back].to(ring.dtype)
