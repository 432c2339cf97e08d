"""Sealing the chunks that a step completes, as the device finds them: fit for a CUDA graph.

Made for decode, where a launch in every step mostly finds nothing to do, but of any step: a request
may compute one token or many.
"""

from __future__ import annotations

from torch import Tensor

from tangram.kernels.seal_decode.moments import QueryStatistics
from tangram.kernels.seal_decode.tables import MAX_CHUNK_TOKENS, SealTables

__all__ = [
    "KERNEL_SCORERS",
    "MAX_CHUNK_TOKENS",
    "QueryStatistics",
    "SealTables",
    "has_kernel",
    "seal_decode",
]

KERNEL_SCORERS = (
    "streaming_llm", "key_norm", "key_diff", "expected_attention", "snap_kv", "tova"
)  # fmt: skip
"""Scorers that the kernel knows, by registry name."""


def has_kernel(scorer_name: str) -> bool:
    """Whether `seal_decode` knows a scorer; chunks may have up to `MAX_CHUNK_TOKENS`."""
    return scorer_name in KERNEL_SCORERS


def seal_decode(
    tables: SealTables,
    sealed_cache: Tensor,
    sealed_table: Tensor,
    recent_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    *,
    scorer: str,
    kernel_size: int = 5,
    softmax_scale: float = 1.0,
    ring: Tensor | None = None,
    ring_table: Tensor | None = None,
    query: Tensor | None = None,
    statistics: QueryStatistics | None = None,
) -> None:
    """Seal every chunk that the step completes, of the layers of `tables`, in one launch on a GPU.

    Request b has computed `seq_lens[b]` tokens, the last `query_start[b + 1] - query_start[b]` of
    them in this step; which chunks that completes is found on the device, and a step that completes
    none ends at once. Nothing is allocated and the host waits for nothing. The step's keys and
    values must have been stored. Rows are those that `top_rows` makes of the scorer's scores.

    A query of this step does not see a chunk that the step's last token of its request completes.
    So a decode step may seal at any time, and all its layers in one launch after the last.

    Args:
        tables: the layers, and where they lie.
        sealed_cache: [blocks, pages_per_block, H_p, P, 2 * head_size].
        sealed_table: [requests, chunks] int32, block of every sealed chunk.
        recent_table: [requests, blocks] int32, block of positions [i * R, (i + 1) * R).
        query_start: [requests + 1] int32; a request without tokens in the step seals nothing.
        seq_lens: [requests] int32; 0 seals nothing.
        scorer: registry name; `has_kernel` says which.
        kernel_size: parameter of `snap_kv`.
        softmax_scale: factor on query times key, for those that look at queries.
        ring: [blocks, ring_block_tokens, layers of the model, query_heads, head_size], the last W
            queries; for `snap_kv` and `tova`.
        ring_table: [requests, ring blocks] int32.
        query: [tokens, query_heads, head_size], the step's queries, when the tables have one layer
            and the ring does not hold them yet. When absent, the ring holds them: right only if
            no request computes more than one token.
        statistics: of all layers of the model; for `expected_attention`.
    """
    from tangram.kernels.seal_decode import kernel

    kernel.seal_decode(
        tables, sealed_cache, sealed_table, recent_table, query_start, seq_lens, scorer=scorer,
        kernel_size=kernel_size, softmax_scale=softmax_scale, ring=ring, ring_table=ring_table,
        query=query, statistics=statistics,
    )  # fmt: skip
