"""Sealing the chunks that a step completes, as the device finds them: fit for a CUDA graph.

Made for decode, where a launch in every step mostly finds nothing to do, but of any step: a request
may compute one token or many.
"""

from __future__ import annotations

from torch import Tensor

from tangram.kernels.cache_view import CacheView
from tangram.kernels.seal_decode.moments import QueryMoments, RowWeights
from tangram.kernels.seal_decode.scorers import KERNELS, SealScorer
from tangram.kernels.seal_decode.tables import MAX_CHUNK_TOKENS, SealTables

__all__ = [
    "KERNEL_SCORERS",
    "MAX_CHUNK_TOKENS",
    "QueryMoments",
    "RowWeights",
    "SealScorer",
    "SealTables",
    "has_kernel",
    "seal_decode",
]

KERNEL_SCORERS = tuple(KERNELS)
"""Scorers that the kernel knows, by registry name."""


def has_kernel(scorer_name: str) -> bool:
    """Whether `seal_decode` knows a scorer; chunks may have up to `MAX_CHUNK_TOKENS`."""
    return scorer_name in KERNELS


def seal_decode(
    tables: SealTables,
    view: CacheView,
    *,
    scorer: SealScorer,
    softmax_scale: float = 1.0,
    query: Tensor | None = None,
) -> None:
    """Seal every chunk that the step completes, of the layers of `tables`, in one launch on a GPU.

    Request b has computed `seq_lens[b]` tokens, the last `query_start[b + 1] - query_start[b]` of
    them in this step; which chunks that completes is found on the device, and a step that completes
    none ends at once. Nothing is allocated and the host waits for nothing. The step's keys and
    values must have been stored. Rows are those that `top_rows` makes of the scorer's scores.

    A query of this step does not see a chunk that the step's last token of its request completes.
    So a decode step may seal at any time, and all its layers in one launch after the last.

    Args:
        tables: the layers, and where their raw tokens lie; the view's are not looked at.
        view: the cache, with a ring for scorers that read queries. A request without tokens in the
            step seals nothing, and nor does one of length 0.
        scorer: what decides; `has_kernel` says which can.
        softmax_scale: factor on query times key, for those that look at queries.
        query: [tokens, query_heads, head_size], the step's queries, when the tables have one layer
            and the ring does not hold them yet. When absent, the ring holds them: right only if
            no request computes more than one token.
    """
    from tangram.kernels.seal_decode import kernel

    kernel.seal_decode(tables, view, scorer=scorer, softmax_scale=softmax_scale, query=query)
