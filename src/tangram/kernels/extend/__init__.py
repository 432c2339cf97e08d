"""Attention of a small step with new tokens of prompts, cut and shared out on the device.

`cut` once a step, then `extend_attention` for every layer. Requests that compute one token are left
to decode attention, but where it is the first one after a chunk: the step itself may seal that for
another request, so that it has to be attended to after sealing. No length is read on the host and
no grid depends on one, so that a captured graph serves every step of its tokens; larger steps go to
`tangram.kernels.prefill`.
"""

from __future__ import annotations

from torch import Tensor

from tangram.kernels.cache_view import CacheView
from tangram.kernels.extend.tables import (
    LEAST_REQUESTS,
    LEAST_TILES,
    MAX_STEP_TOKENS,
    PROGRAMS_PER_SM,
    ExtendTables,
    ExtendWorkspace,
    num_tiles,
)

__all__ = [
    "LEAST_REQUESTS",
    "LEAST_TILES",
    "MAX_STEP_TOKENS",
    "PROGRAMS_PER_SM",
    "ExtendTables",
    "ExtendWorkspace",
    "cut",
    "extend_attention",
    "num_tiles",
]


def cut(view: CacheView, tokens: int, tables: ExtendTables, workspace: ExtendWorkspace) -> None:
    """Cut a step into tiles, and find where the programs of all layers start.

    Two small launches. Afterwards `workspace.decode_lens` has the lengths of the requests that are
    left to decode attention.

    Args:
        view: the cache of any layer; a request without a query has as many tokens as before.
        tokens: of the step, padding included.
        tables: of all layers.
        workspace: of the calls of `extend_attention` that follow.
    """
    from tangram.kernels.decode import schedule_kernel
    from tangram.kernels.extend import cut_kernel

    cut_kernel.cut(view, tokens, tables, workspace)
    tiles = view._replace(seq_lens=workspace.ends)
    schedule_kernel.schedule(tiles, num_tiles(tokens), tables.heads, workspace.parts)


def extend_attention(
    query: Tensor,
    view: CacheView,
    *,
    tables: ExtendTables,
    layer: int,
    softmax_scale: float,
    out: Tensor,
    workspace: ExtendWorkspace,
) -> None:
    """Attend the queries of all requests but those left to decode attention, and write `out`.

    The query at position p sees the rows kept of every chunk j < p // C, and all tokens of
    [max(0, C * (p // C) - W), p]. Every program reads as many rows, whatever the lengths; how a
    tile is cut, and so the last bits of its result, hang on the other tiles of the step.

    Args:
        query: [tokens, query_heads, head_size], after RoPE.
        view: the cache of the layer; it is sealed as far as the step completes chunks.
        tables: of all layers.
        layer: the layer.
        softmax_scale: factor on query times key.
        out: [tokens, query_heads, head_size], written at the tiles' tokens; zero in padded rows,
            those from `query_start[-1]` on.
        workspace: cut for this step; one call at a time may use it.
    """
    from tangram.kernels.extend import kernel

    kernel.extend_attention(
        query,
        view,
        tables=tables,
        layer=layer,
        softmax_scale=softmax_scale,
        out=out,
        workspace=workspace,
    )
