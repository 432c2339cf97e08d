"""Sealing within one layer's forward: score a chunk, choose each head's rows, pack them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tangram.geometry import Geometry
from tangram.kernels.reference.attend import gather_recent, gather_scores
from tangram.kernels.reference.seal import pack
from tangram.kernels.segments import SealingChunks
from tangram.scorers.base import Chunks, checked_scores
from tangram.scorers.select import top_rows
from tangram.vllm_plugin.worker.runners.step import HostStep, LayerStep

MAX_TOKENS = 1 << 15
"""Tokens of chunks that are scored at once."""


def _alike(geometry: Geometry, sealing: SealingChunks) -> Iterator[SealingChunks]:
    """Chunks of equal length, not too many at once: chunk 0 is shorter than the others."""
    most = max(1, MAX_TOKENS // geometry.chunk_size_tokens)
    for index in (np.flatnonzero(sealing.chunk == 0), np.flatnonzero(sealing.chunk > 0)):
        for begin in range(0, len(index), most):
            yield sealing.take(index[begin : begin + most])


def seal_step(step: LayerStep, host: HostStep) -> None:
    """Write the sealed pages of this layer for every chunk that the step completes."""
    for chunks in _alike(step.sealed.geometry, host.sealing):
        _seal(step, host, chunks)


def sample_drift(step: LayerStep, host: HostStep) -> None:
    """Score the sampled chunk of the step once more, and compare it with the profile.

    To be called before the query ring takes the step's queries.
    """
    monitor, chunks = step.sealed.drift, host.sampled
    if monitor is None or chunks is None:
        return
    raw, position = _raw_rows(step, chunks)
    scores = _score(step, host, chunks, raw, position)
    sinks = position[0] < step.sealed.geometry.n_sink_tokens
    # Steps that vLLM makes up have tables of zeros.
    counts = step.view.sealed_table[int(chunks.request[0]), int(chunks.chunk[0])] != 0
    monitor.add_layer(step.layer, scores[0], sinks, counts)


def _raw_rows(step: LayerStep, chunks: SealingChunks) -> tuple[Tensor, Tensor]:
    """Raw rows [chunks, kv_heads, tokens, 2 * head_size] and positions [chunks, tokens]."""
    g, device = step.sealed.geometry, step.query.device
    request = torch.from_numpy(chunks.request).to(device)
    chunk = torch.from_numpy(chunks.chunk).to(device)
    first, last = g.chunk_range(int(chunks.chunk[0]))
    start = (chunk * g.chunk_size_tokens - g.window_size_tokens).clamp(min=0)
    position = start[:, None] + torch.arange(last - first, device=device)
    return gather_recent(step.view, request, position, g), position


def _stored_scores(step: LayerStep, chunks: SealingChunks, position: Tensor) -> Tensor | None:
    """[chunks, tokens, kv_heads] float32, where scores lie beside raw tokens."""
    if step.view.scores is None:
        return None
    request = torch.from_numpy(chunks.request).to(position.device)
    return gather_scores(step.view, request, position, step.sealed.geometry)


def _score(
    step: LayerStep, host: HostStep, chunks: SealingChunks, raw: Tensor, position: Tensor
) -> Tensor:
    """[chunks, tokens, kv_heads] float32."""
    sealed, g = step.sealed, step.sealed.geometry
    key, value = raw.transpose(1, 2).split(g.head_size, dim=-1)
    window = None if step.view.ring is None else _window_queries(step, host, chunks, step.view.ring)
    return checked_scores(
        sealed.scorer,
        Chunks(
            keys=key,
            values=value,
            positions=position,
            softmax_scale=step.softmax_scale,
            window_queries=window,
            statistics=sealed.statistics(step.layer, raw.device),
            window_size_tokens=g.window_size_tokens,
            stored_scores=_stored_scores(step, chunks, position),
        ),
    )


def _seal(step: LayerStep, host: HostStep, chunks: SealingChunks) -> None:
    g, device = step.sealed.geometry, step.query.device
    raw, position = _raw_rows(step, chunks)
    request = torch.from_numpy(chunks.request).to(device)
    chunk = torch.from_numpy(chunks.chunk).to(device)
    blocks = step.view.sealed_table[request, chunk].long()

    groups = range(len(g.head_groups.heads[step.layer]))
    kept = [g.kept_rows(step.layer, group, int(chunks.chunk[0])) for group in groups]
    scores = None
    if min(kept) < position.shape[1]:
        scores = _score(step, host, chunks, raw, position)
    sinks = position < g.n_sink_tokens
    everything = torch.arange(position.shape[1], device=device)[None, :, None]
    for group, rows in zip(groups, kept, strict=True):
        heads = list(g.head_groups.heads[step.layer][group])
        if rows == position.shape[1]:
            chosen = everything.expand(len(chunks), -1, len(heads))
        else:
            assert scores is not None
            chosen = top_rows(scores[..., heads], rows, sinks)
        pack(step.view.sealed, blocks, raw, chosen, geometry=g, layer=step.layer, group=group)


def _window_queries(step: LayerStep, host: HostStep, chunks: SealingChunks, ring: Tensor) -> Tensor:
    """[chunks, W, query_heads, head_size], the W queries before each chunk's boundary.

    Those that this step computes come from it, older ones from the ring, which still holds them
    because it is written only after the step has sealed.
    """
    g, device = step.sealed.geometry, step.query.device
    W = g.window_size_tokens
    boundary = (chunks.chunk + 1) * g.chunk_size_tokens
    position = boundary[:, None] - W + np.arange(W)
    queries = host.query_start[1:] - host.query_start[:-1]
    computed = (host.num_tokens_after - queries)[chunks.request][:, None]
    index = host.query_start[chunks.request][:, None] + position - computed
    window = step.query[torch.from_numpy(np.maximum(index, 0)).to(device)]
    if (position >= computed).all():
        return window
    assert step.view.ring_table is not None
    slot = torch.from_numpy(position % W).to(device)
    request = torch.from_numpy(chunks.request).to(device)
    R = g.ring_block_tokens
    block = step.view.ring_table[request[:, None], slot // R].long()
    held = ring.select(2, step.layer)[block, slot % R]
    is_held = torch.from_numpy(position < computed).to(device)
    return torch.where(is_held[:, :, None, None], held.to(window.dtype), window)
