"""Cutting a step into tiles on the device, from its lengths.

Not here: anything that looks at a length on the host.
"""

# Triton's functions have no types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from tangram.kernels.cache_view import CacheView
from tangram.kernels.extend.tables import (
    LEAST_REQUESTS,
    TILE_COLUMNS,
    ExtendTables,
    ExtendWorkspace,
    num_tiles,
)
from tangram.kernels.launch import remember_compiled
from tangram.kernels.sizes import power_of_two

_ELEMENTS = 4096  # of a comparison of tiles with requests


@triton.jit
def _of_request(values, is_own):
    """[tiles], what the request of every tile says."""
    return tl.sum(tl.where(is_own, values[None, :], 0), 1)


@remember_compiled
@triton.jit(do_not_specialize=["num_requests"])
def _cut(
    query_start_ptr,  # [num_requests + 1] int32
    seq_lens_ptr,  # [num_requests] int32
    tiles_ptr,  # [tiles, COLUMNS] int32
    ends_ptr,  # [tiles] int32
    decode_lens_ptr,  # [num_requests] int32
    num_requests,
    C: tl.constexpr,
    PER_TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    REQUESTS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Some tiles of the step, which are those of one request after the other."""
    requests = tl.arange(0, REQUESTS)
    is_request = requests < num_requests
    begin = tl.load(query_start_ptr + requests, is_request, 0)
    count = tl.load(query_start_ptr + requests + 1, is_request, 0) - begin
    after = tl.load(seq_lens_ptr + requests, is_request, 0)
    count = tl.minimum(count, after)  # none of a padded row
    before = after - count
    # A query at a boundary may see a chunk that this very step seals for another request: it
    # attends with the prompts, after sealing.
    is_decode = (count == 1) & (before % C != 0)
    if tl.program_id(0) == 0:
        tl.store(decode_lens_ptr + requests, tl.where(is_decode, after, 0), is_request)

    # Tiles of the first chunk that a request has queries in, of those between, and of the last.
    first_chunk, last_chunk = before // C, tl.maximum(after - 1, 0) // C
    first_end = tl.minimum((first_chunk + 1) * C, after)
    of_first = tl.cdiv(first_end - before, PER_TILE)
    OF_CHUNK: tl.constexpr = (C + PER_TILE - 1) // PER_TILE
    of_later = tl.cdiv(after - last_chunk * C, PER_TILE)
    of_later += (last_chunk - first_chunk - 1) * OF_CHUNK
    took = of_first + tl.where(last_chunk > first_chunk, of_later, 0)
    took = tl.where((count > 0) & (is_decode == 0), took, 0)
    ends = tl.cumsum(took, 0)

    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    is_tile = tile < tl.max(ends)
    request = tl.sum((ends[None, :] <= tile[:, None]).to(tl.int32), 1)
    is_own = requests[None, :] == request[:, None]
    nth = tile - _of_request(ends - took, is_own)
    own_before, own_after = _of_request(before, is_own), _of_request(after, is_own)
    own_first = _of_request(of_first, is_own)
    later = nth - own_first
    chunk = own_before // C + 1 + later // OF_CHUNK
    position = tl.where(
        later < 0, own_before + nth * PER_TILE, chunk * C + later % OF_CHUNK * PER_TILE
    )
    end = tl.minimum(tl.minimum(position + PER_TILE, (position // C + 1) * C), own_after)
    line = tiles_ptr + tile * COLUMNS
    tl.store(line, request, is_tile)
    tl.store(line + 1, _of_request(begin, is_own) + position - own_before, is_tile)
    tl.store(line + 2, end - position, is_tile)
    tl.store(line + 3, position, is_tile)
    tl.store(ends_ptr + tile, tl.where(is_tile, end, 0))


def cut(view: CacheView, tokens: int, tables: ExtendTables, workspace: ExtendWorkspace) -> None:
    """Launch; see `tangram.kernels.extend.cut`."""
    requests = view.seq_lens.shape[0]
    padded, most = max(LEAST_REQUESTS, power_of_two(requests)), num_tiles(tokens)
    assert most <= len(workspace.ends) and requests <= len(workspace.decode_lens)
    assert view.query_start.shape[0] > requests
    block = max(1, min(16, _ELEMENTS // padded))
    _cut[(most // block,)](
        view.query_start,
        view.seq_lens,
        workspace.tiles,
        workspace.ends,
        workspace.decode_lens,
        requests,
        C=tables.geometry.chunk_size_tokens,
        PER_TILE=tables.queries_per_tile,
        COLUMNS=len(TILE_COLUMNS),
        REQUESTS=padded,
        TILES=block,
        num_warps=4,
    )
