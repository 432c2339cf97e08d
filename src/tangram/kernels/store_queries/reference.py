"""Storing queries in plain torch, any device."""

from __future__ import annotations

import torch
from torch import Tensor


def store_queries(
    query: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    ring_table: Tensor,
    ring: Tensor,
    window_size_tokens: int,
) -> None:
    """See `tangram.kernels.store_queries.store_queries`."""
    begin, end = query_start[:-1].long(), query_start[1:].long()
    count = torch.minimum(end - begin, seq_lens)
    nth = torch.arange(1, window_size_tokens + 1, device=query.device)
    request, column = torch.nonzero(nth <= count[:, None], as_tuple=True)
    back = nth[column]  # 1 is a request's last query
    slot = (seq_lens[request] - back) % window_size_tokens
    R = ring.shape[1]
    block = ring_table[request, slot // R].long()
    ring[block, slot % R] = query[end[request] - back].to(ring.dtype)
