"""FlashAttention's contract in plain torch, for machines that do not have it."""

from __future__ import annotations

import torch
from torch import Tensor


def paged_attention(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    seqused_k: Tensor,
    max_seqlen_k: int,
    block_table: Tensor,
    softmax_scale: float,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """See `tangram.kernels.flash.PagedAttention`; refuses what FlashAttention 3 would."""
    queries, heads, head_size = q.shape
    pages, page_rows, kv_heads, _ = k.shape
    sequences = len(seqused_k)
    assert k.shape == v.shape == (pages, page_rows, 1, head_size) and kv_heads == 1
    assert out.shape == q.shape and q.dtype == k.dtype == v.dtype == out.dtype
    assert all(t.stride(-1) == 1 for t in (q, k, v, out, block_table))
    for table in (cu_seqlens_q, seqused_k, block_table):
        assert table.dtype == torch.int32 and table.device == q.device
    assert cu_seqlens_q.is_contiguous() and cu_seqlens_q.shape == (sequences + 1,)
    assert seqused_k.is_contiguous() and block_table.shape[0] == sequences
    assert block_table.shape[1] * page_rows >= max_seqlen_k
    starts, used = cu_seqlens_q.tolist(), seqused_k.tolist()
    assert starts[0] == 0 and starts[-1] == queries and 0 < max(used) <= max_seqlen_k
    lse_ln = torch.full((heads, queries), torch.nan, device=q.device)
    for sequence, rows in enumerate(used):
        span = slice(starts[sequence], starts[sequence + 1])
        assert 0 < span.stop - span.start <= max_seqlen_q
        table = block_table[sequence, : -(-rows // page_rows)].long()
        key, value = (part[table].flatten(0, 2)[:rows].float() for part in (k, v))
        scores = q[span].float() @ key.T * softmax_scale
        out[span] = (scores.softmax(dim=-1) @ value).to(out.dtype)
        lse_ln[:, span] = scores.logsumexp(dim=-1).T
    return out, lse_ln
