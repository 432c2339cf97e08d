"""How a step's tokens are cut, so that no cutting by the scheduler can change a result.

A request that computes positions [n0, n1) in one step is cut at multiples of C. All queries of a
segment see the same sealed chunks and the same first raw token; they differ only causally.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tangram.geometry import Geometry

IntArray = np.ndarray


@dataclass(frozen=True)
class Segments:
    """Queries of one step, cut at multiples of C.

    Attributes:
        request: [segments] int64, row of the batch.
        first_query: [segments] int64, index of the first query in the step's flat token order.
        num_queries: [segments] int64, from 1 to C.
        position: [segments] int64, position of the first query in its sequence.
    """

    request: IntArray
    first_query: IntArray
    num_queries: IntArray
    position: IntArray

    def __len__(self) -> int:
        return len(self.request)

    def take(self, index: IntArray) -> Segments:
        """The segments at `index`, in that order."""
        return Segments(
            self.request[index],
            self.first_query[index],
            self.num_queries[index],
            self.position[index],
        )


@dataclass(frozen=True)
class SealingChunks:
    """Chunks that a step completes.

    Attributes:
        request: [chunks] int64, row of the batch.
        chunk: [chunks] int64, index of the chunk in its sequence.
    """

    request: IntArray
    chunk: IntArray

    def __len__(self) -> int:
        return len(self.request)

    def take(self, index: IntArray) -> SealingChunks:
        """The chunks at `index`."""
        return SealingChunks(self.request[index], self.chunk[index])


def _ranges(starts: IntArray, counts: IntArray) -> tuple[IntArray, IntArray]:
    """(owner, value): for every i the values starts[i], starts[i] + 1 ... counts[i] of them."""
    owner = np.repeat(np.arange(len(starts)), counts)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return owner, starts[owner] + within


def cut_step(
    geometry: Geometry, query_start: IntArray, num_tokens: IntArray
) -> tuple[Segments, SealingChunks]:
    """Cut a step into segments and list the chunks that it completes.

    Args:
        geometry: the layout; only C matters here.
        query_start: [requests + 1] int64, where each request's queries begin in the flat order.
        num_tokens: [requests] int64, tokens computed after the step (vLLM's `seq_lens`).

    Returns:
        The segments in flat order, and the chunks to seal before any of them attends.
    """
    C = geometry.chunk_size_tokens
    num_queries = query_start[1:] - query_start[:-1]
    rows = np.flatnonzero(num_queries > 0)
    stop = num_tokens[rows]
    start = stop - num_queries[rows]

    first_chunk, last_chunk = start // C, (stop - 1) // C
    owner, chunk = _ranges(first_chunk, last_chunk - first_chunk + 1)
    position = np.maximum(start[owner], chunk * C)
    end = np.minimum(stop[owner], (chunk + 1) * C)
    segments = Segments(
        request=rows[owner],
        first_query=query_start[rows][owner] + position - start[owner],
        num_queries=end - position,
        position=position,
    )
    owner, sealed = _ranges(first_chunk, stop // C - first_chunk)
    return segments, SealingChunks(request=rows[owner], chunk=sealed)
