"""Constants of a sealing launch that lie on the device; made once, when the caches are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tangram.geometry import Geometry
from tangram.kernels.cache_view import recent_scores

MAX_CHUNK_TOKENS = 2048
"""Longest chunk that a launch can seal: it is held in registers and shared memory."""


@dataclass(frozen=True)
class SealTables:
    """Where the heads of the layers that a launch seals lie.

    Attributes:
        geometry: the layout.
        layers: attention layers that the launch seals.
        recent_cache: [blocks, kv_heads, R, 2 * head_size] of `layers[0]`.
        scores: [blocks, kv_heads, R] float32 beside them, of a layout with stored scores.
        layer_table: [layers, 2] int64: rows of 2 * head_size elements from `recent_cache` to
            that layer's, and the layer itself.
        head_table: [layers, kv_heads, 3] int32: first page of the head's group in a sealed block,
            its pages, and the head's index in the group.
    """

    geometry: Geometry
    layers: tuple[int, ...]
    recent_cache: Tensor
    layer_table: Tensor
    head_table: Tensor
    scores: Tensor | None = None

    @classmethod
    def of(
        cls, geometry: Geometry, layers: Sequence[int], recent_caches: Sequence[Tensor]
    ) -> SealTables:
        """The tables for some layers, whose caches must not move while the tables are in use.

        Args:
            geometry: the layout.
            layers: attention layers; one, or all to seal the whole model in one launch.
            recent_caches: the recent cache of each, parts of one pool: alike but for the address.
        """
        g, first = geometry, recent_caches[0]
        rows = []
        for layer, cache in zip(layers, recent_caches, strict=True):
            assert cache.shape == first.shape and cache.stride() == first.stride(), cache.shape
            assert cache.dtype == first.dtype and cache.device == first.device
            count, rest = divmod(cache.data_ptr() - first.data_ptr(), g.row_bytes)
            assert rest == 0, "the caches of a pool's layers lie whole rows apart"
            rows.append([count, layer])
        heads = [[[0, 0, 0]] * g.num_kv_heads for _ in layers]
        for index, layer in enumerate(layers):
            groups = g.head_groups
            for group, members in enumerate(groups.heads[layer]):
                for member, head in enumerate(members):
                    pages = groups.pages[layer][group]
                    heads[index][head] = [g.page_offsets[layer][group], pages, member]
        return cls(
            geometry=g,
            layers=tuple(layers),
            recent_cache=first,
            layer_table=torch.tensor(rows, dtype=torch.int64, device=first.device),
            head_table=torch.tensor(heads, dtype=torch.int32, device=first.device),
            scores=recent_scores(first) if g.has_stored_scores else None,
        )
