"""Attention of a decode step: one query a request, over what every head kept and the raw tokens.

`schedule` once a step, then `decode_attention` for every layer.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tangram.kernels.cache_view import CacheView
from tangram.kernels.decode.tables import PROGRAMS_PER_SM, DecodeTables, DecodeWorkspace

__all__ = ["PROGRAMS_PER_SM", "DecodeTables", "DecodeWorkspace", "decode_attention", "schedule"]


def schedule(view: CacheView, batch: int, tables: DecodeTables, workspace: DecodeWorkspace) -> None:
    """Find where the programs of all layers start, from the lengths of a step's first requests.

    On CUDA one small launch that reads no length on the host; elsewhere nothing.

    Args:
        view: the cache of any layer.
        batch: requests, at least one.
        tables: of all layers.
        workspace: of the calls of `decode_attention` that follow.
    """
    if view.seq_lens.is_cuda:
        from tangram.kernels.decode import schedule_kernel

        schedule_kernel.schedule(view, batch, tables, workspace)


def decode_attention(
    query: Tensor,
    view: CacheView,
    *,
    tables: DecodeTables,
    layer: int,
    softmax_scale: float,
    out: Tensor,
    workspace: DecodeWorkspace,
    among_others: bool = False,
) -> None:
    """Attend the last token of every request to what it sees, and write the result to `out`.

    The query at p = seq_len - 1 sees the rows kept of every chunk j < p // C, and all tokens of
    [max(0, C * (p // C) - W), p]. On CUDA nothing is allocated, no length is read on the host, and
    the grid follows from the workspace alone, so the call can be captured in a graph that serves
    any lengths. Every program reads as many bytes, whatever the lengths; how a request is cut, and
    so the last bits of its result, hang on those of its neighbours.

    Args:
        query: [B, query_heads, head_size], after RoPE.
        view: the cache of the layer; the first B requests are those of the queries.
        tables: of all layers.
        layer: the layer.
        softmax_scale: factor on query times key.
        out: [B, query_heads, head_size]; zero in padded rows.
        workspace: scheduled for these B requests; one call at a time may use it.
        among_others: a request's row is where its query begins in the step (`view.query_start`);
            `query` and `out` are then [tokens, query_heads, head_size], B is the number of the
            view's requests, and of `out` only the rows of requests with a length are written.
    """
    run: Callable[..., None]
    if query.is_cuda:
        from tangram.kernels.decode.kernel import decode_attention as run
    else:
        from tangram.kernels.decode.reference import decode_attention as run
    run(
        query,
        view,
        tables=tables,
        layer=layer,
        softmax_scale=softmax_scale,
        out=out,
        workspace=workspace,
        among_others=among_others,
    )
