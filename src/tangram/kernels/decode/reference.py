"""Decode attention on the reference for any step: one segment of one query a request."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from tangram.kernels.decode.tables import DecodeTables, DecodeWorkspace
from tangram.kernels.reference.attend import attend
from tangram.kernels.segments import cut_step


def decode_attention(
    query: Tensor,
    sealed_cache: Tensor,
    sealed_table: Tensor,
    recent_cache: Tensor,
    recent_table: Tensor,
    seq_lens: Tensor,
    *,
    tables: DecodeTables,
    softmax_scale: float,
    out: Tensor,
    workspace: DecodeWorkspace | None = None,
) -> None:
    """See `tangram.kernels.decode.decode_attention`; needs no workspace."""
    lengths = seq_lens.cpu().numpy().astype(np.int64)
    rows = np.flatnonzero(lengths > 0)
    out.zero_()
    if len(rows) == 0:
        return
    query_start = np.concatenate([[0], np.cumsum(lengths > 0)])
    segments, _ = cut_step(tables.geometry, query_start, lengths)
    result = out[rows]
    attend(
        query[rows],
        segments,
        sealed_cache,
        sealed_table,
        recent_cache,
        recent_table,
        geometry=tables.geometry,
        layer=tables.layer,
        softmax_scale=softmax_scale,
        out=result,
    )
    out[rows] = result
