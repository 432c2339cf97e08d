"""Attention over sealed pages and recent blocks in plain torch, float32, any device."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tangram.geometry import Geometry
from tangram.kernels.cache_view import CacheView
from tangram.kernels.segments import Segments

MAX_ELEMENTS = 1 << 24
"""Attention scores, and elements of rows, held at once; segments are taken together until then."""


def attend(
    query: Tensor,
    segments: Segments,
    view: CacheView,
    *,
    geometry: Geometry,
    layer: int,
    softmax_scale: float,
    out: Tensor,
) -> None:
    """Attend every query to its sealed rows and raw tokens, and write the result to `out`.

    Args:
        query: [tokens, query_heads, head_size], after RoPE.
        segments: the step, cut at multiples of C.
        view: the cache of the layer.
        geometry: the layout.
        layer: attention layer.
        softmax_scale: factor on query times key.
        out: [tokens, query_heads, head_size], written at the segments' tokens only.
    """
    for part in _parts(geometry, layer, segments):
        _attend_part(query, part, view, geometry, layer, softmax_scale, out)


def _parts(geometry: Geometry, layer: int, segments: Segments) -> Iterator[Segments]:
    """Segments of like size together, so that little is padded, and not too many at once."""
    g = geometry
    sealed = segments.position // g.chunk_size_tokens
    order = np.lexsort((sealed, segments.num_queries))
    budget = max(g.head_groups.pages[layer]) * g.page_size_rows
    rows = np.maximum.accumulate(sealed[order]) * budget + g.chunk_size_tokens
    rows += g.window_size_tokens
    scores = segments.num_queries[order] * g.num_query_heads
    elements = np.maximum(scores, g.num_kv_heads * g.row_elements) * rows
    begin = 0
    while begin < len(order):
        # The last of a part is its widest, and the others are padded to it.
        padded = elements[begin:] * np.arange(1, len(order) - begin + 1)
        end = begin + max(1, int(np.searchsorted(padded, MAX_ELEMENTS, side="right")))
        yield segments.take(order[begin:end])
        begin = end


def _attend_part(
    query: Tensor,
    part: Segments,
    view: CacheView,
    geometry: Geometry,
    layer: int,
    softmax_scale: float,
    out: Tensor,
) -> None:
    g, device = geometry, query.device
    request, first_query, num_queries, position = (
        torch.from_numpy(a).to(device)
        for a in (part.request, part.first_query, part.num_queries, part.position)
    )
    chunks = position // g.chunk_size_tokens  # [S]

    step = torch.arange(int(part.num_queries.max()), device=device)
    is_query = step < num_queries[:, None]  # [S, Q]
    tokens = torch.where(is_query, first_query[:, None] + step, 0)
    q = query[tokens].float() * softmax_scale  # [S, Q, Hq, D]

    raw_start = (chunks * g.chunk_size_tokens - g.window_size_tokens).clamp(min=0)
    raw_count = position + num_queries - raw_start
    raw_step = torch.arange(int(raw_count.max()), device=device)
    raw_position = raw_start[:, None] + raw_step
    in_reach = raw_step < raw_count[:, None]
    raw = gather_recent(view, request, raw_position * in_reach, g).float()
    # A weight of zero does not undo a NaN, and what lies where nobody looks is anybody's.
    raw.masked_fill_(~in_reach[:, None, :, None], 0)
    query_position = position[:, None] + step
    sees_raw = in_reach[:, None] & (raw_position[:, None] <= query_position[:, :, None])

    max_chunks = int(part.position.max()) // g.chunk_size_tokens
    blocks = view.sealed_table[request, :max_chunks].long()  # [S, k]
    chunk = torch.arange(max_chunks, device=device)[:, None]
    result = torch.empty_like(q)
    for group, heads in enumerate(g.head_groups.heads[layer]):
        budget = g.budget_rows(layer, group)
        kept = _gather_sealed(view.sealed, blocks, g, layer, group).float()
        row = torch.arange(budget, device=device)
        in_use = (chunk > 0) | (row >= g.first_row(layer, group, 0))  # [k, budget]
        in_use = (in_use & (chunk < chunks[:, None, None])).flatten(1)  # [S, k * budget]
        kept.masked_fill_(~in_use[:, None, :, None], 0)
        sees = torch.cat([in_use[:, None].expand(-1, len(step), -1), sees_raw], dim=2)

        members = list(heads)
        per = g.queries_per_kv_head
        query_heads = [head * per + i for head in heads for i in range(per)]
        grouped = q[:, :, query_heads].unflatten(2, (len(heads), per))  # [S, Q, H_p, per, D]
        grouped = grouped.permute(0, 2, 3, 1, 4).flatten(2, 3)  # [S, H_p, per * Q, D]
        mixed = _softmax_attention(grouped, (kept, raw[:, members]), sees, per, g.head_size)
        mixed = mixed.unflatten(2, (per, -1)).permute(0, 3, 1, 2, 4)
        result[:, :, query_heads] = mixed.flatten(2, 3)
    out[tokens[is_query]] = result[is_query].to(out.dtype)


def _softmax_attention(
    query: Tensor, parts: tuple[Tensor, ...], sees: Tensor, per: int, head_size: int
) -> Tensor:
    """Attention over rows that lie in several tensors, as if they were one.

    Args:
        query: [S, H_p, per * Q, head_size], scaled.
        parts: each [S, H_p, rows, 2 * head_size], [K | V].
        sees: [S, Q, all rows] bool.
        per: query heads of a KV head.
        head_size: elements of a key.

    Returns:
        [S, H_p, per * Q, head_size].
    """
    split = [part.split(head_size, dim=-1) for part in parts]
    scores = torch.cat([query @ key.transpose(2, 3) for key, _ in split], dim=-1)
    scores = scores.unflatten(2, (per, -1)).masked_fill_(~sees[:, None, None], -torch.inf)
    weights = scores.softmax(dim=-1).flatten(2, 3)
    by_part = weights.split([part.shape[2] for part in parts], dim=-1)
    mixed = [weight @ value for weight, (_, value) in zip(by_part, split, strict=True)]
    return torch.stack(mixed).sum(dim=0)


def _gather_sealed(
    sealed_cache: Tensor, blocks: Tensor, g: Geometry, layer: int, group: int
) -> Tensor:
    """[S, H_p, k * budget, 2 * head_size], the rows of a head group in the blocks [S, k]."""
    first = g.page_offsets[layer][group]
    pages = sealed_cache[:, first : first + g.head_groups.pages[layer][group]].transpose(1, 2)
    member = torch.arange(pages.shape[1], device=blocks.device)
    return pages[blocks[:, None], member[None, :, None]].flatten(2, 4)


def gather_recent(view: CacheView, request: Tensor, position: Tensor, g: Geometry) -> Tensor:
    """Raw rows by position.

    Args:
        view: the cache of the layer.
        request: [n] int64, row of the table.
        position: [n, tokens] int64.
        g: the layout.

    Returns:
        [n, kv_heads, tokens, 2 * head_size], in the cache's type.
    """
    R = g.recent_block_tokens
    blocks = view.recent_table[request[:, None], position // R].long()
    heads = torch.arange(g.num_kv_heads, device=blocks.device)
    return view.recent[blocks[:, None], heads[None, :, None], (position % R)[:, None]]


def gather_scores(view: CacheView, request: Tensor, position: Tensor, g: Geometry) -> Tensor:
    """Scores that lie beside raw tokens, by request and position: see `gather_recent`.

    Returns:
        [n, tokens, kv_heads] float32.
    """
    assert view.scores is not None, "a layout without stored scores"
    R = g.recent_block_tokens
    blocks = view.recent_table[request[:, None], position // R].long()
    return view.scores[blocks, :, position % R]
