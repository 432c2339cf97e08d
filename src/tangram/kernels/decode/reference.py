"""Decode attention on the reference for any step: one segment of one query a request."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from tangram.kernels.cache_view import CacheView
from tangram.kernels.decode.tables import DecodeTables, DecodeWorkspace
from tangram.kernels.reference.attend import attend
from tangram.kernels.segments import cut_step


def decode_attention(
    query: Tensor,
    view: CacheView,
    *,
    tables: DecodeTables,
    layer: int,
    softmax_scale: float,
    out: Tensor,
    workspace: DecodeWorkspace | None = None,
    among_others: bool = False,
) -> None:
    """See `tangram.kernels.decode.decode_attention`; needs no workspace."""
    requests = len(view.seq_lens) if among_others else len(query)
    lengths = view.seq_lens[:requests].cpu().numpy().astype(np.int64)
    rows = np.flatnonzero(lengths > 0)
    if not among_others:
        out.zero_()
    if len(rows) == 0:
        return
    query_start = np.concatenate([[0], np.cumsum(lengths > 0)])
    segments, _ = cut_step(tables.geometry, query_start, lengths)
    if among_others:
        rows = view.query_start.cpu().numpy()[rows]
    result = out[rows]
    attend(
        query[rows],
        segments,
        view,
        geometry=tables.geometry,
        layer=layer,
        softmax_scale=softmax_scale,
        out=result,
    )
    out[rows] = result
