"""Attention of a decode step: one query a request, over what every head kept and the raw tokens."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tangram.kernels.cache_view import CacheView
from tangram.kernels.decode.split_map import (
    THREAD_BLOCKS_PER_SM,
    Balance,
    SplitMap,
    make_split_map,
)
from tangram.kernels.decode.tables import DecodeTables, DecodeWorkspace

__all__ = [
    "THREAD_BLOCKS_PER_SM",
    "Balance",
    "DecodeTables",
    "DecodeWorkspace",
    "SplitMap",
    "decode_attention",
    "make_split_map",
]


def decode_attention(
    query: Tensor,
    view: CacheView,
    *,
    tables: DecodeTables,
    softmax_scale: float,
    out: Tensor,
    workspace: DecodeWorkspace,
) -> None:
    """Attend the last token of every request to what it sees, and write the result to `out`.

    The query at p = seq_len - 1 sees the rows kept of every chunk j < p // C, and all tokens of
    [max(0, C * (p // C) - W), p]. On CUDA nothing is allocated, no length is read on the host, and
    the grid follows from the tables alone, so the call can be captured in a graph.

    Args:
        query: [B, query_heads, head_size], after RoPE.
        view: the cache of the layer; the first B requests are those of the queries.
        tables: the layer's work for a batch of B requests or more; how a request is cut is the same
            for all, so that fewer leave no trace.
        softmax_scale: factor on query times key.
        out: [B, query_heads, head_size]; zero in padded rows.
        workspace: where parts of the result wait for each other; one call at a time may use it.
    """
    run: Callable[..., None]
    if query.is_cuda:
        from tangram.kernels.decode.kernel import decode_attention as run
    else:
        from tangram.kernels.decode.reference import decode_attention as run
    run(query, view, tables=tables, softmax_scale=softmax_scale, out=out, workspace=workspace)
