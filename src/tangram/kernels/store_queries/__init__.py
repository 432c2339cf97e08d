"""Writing a step's last queries to the query ring."""

from __future__ import annotations

from torch import Tensor

from tangram.kernels.cache_view import CacheView
from tangram.kernels.store_queries import reference

__all__ = ["store_queries"]


def store_queries(query: Tensor, view: CacheView, layer: int, window_size_tokens: int) -> None:
    """Keep the last W queries of every request of a step in the query ring of one layer.

    With W = 32 and R = 8, a request of 70 tokens, of which the step computed 2, has its queries at
    positions 68 and 69 put to slots 4 and 5: rows 4 and 5 of the first block in its table.

    On a GPU this is one launch without host synchronisation or allocation, fit for a CUDA graph.

    Args:
        query: [tokens or more, query_heads, head_size], after RoPE.
        view: the cache, with a ring. Nothing is written for a request of no tokens, as padding of
            a captured step is, whatever `query_start` says of it.
        layer: attention layer; the query at position p lies at slot p % W, in block
            `ring_table[request, slot // R]`, row slot % R.
        window_size_tokens: W, a multiple of R.
    """
    if query.device.type == "cpu":
        reference.store_queries(query, view, layer, window_size_tokens)
    else:
        from tangram.kernels.store_queries import kernel

        kernel.store_queries(query, view, layer, window_size_tokens)
