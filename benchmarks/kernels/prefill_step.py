"""What the prefill benchmark runs: a step of a long prompt, our ways through it, and the yardstick.

Everything is on the GPU, in bfloat16, with the pool that kernel tests use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tangram.geometry import Geometry
from tangram.kernels.extend import (
    PROGRAMS_PER_SM,
    ExtendTables,
    ExtendWorkspace,
    cut,
    extend_attention,
)
from tangram.kernels.flash import (
    PagedAttention,
    SealedPart,
    SealedStep,
    SealedWorkspace,
    attend_sealed,
)
from tangram.kernels.prefill import Blocks, make_head_table, make_tiles, prefill_attention
from tangram.kernels.reference.attend import attend
from tangram.kernels.segments import Segments, cut_step
from tests.kernels.inputs import Pool, fill_step_chunks, make_pool, relative_error

DTYPE = torch.bfloat16
DEVICE = "cuda"
WORKSPACE = SealedWorkspace(DEVICE)


class Step:
    """One step of the prompt: positions [start, stop), with the cache as the step finds it."""

    def __init__(self, geometry: Geometry, start: int, stop: int, seed: int) -> None:
        self.geometry, self.count, self.stop = geometry, stop - start, stop
        self.pool: Pool = make_pool(
            geometry, [stop], dtype=DTYPE, device=DEVICE, seed=seed, step_tokens=[self.count]
        )
        fill_step_chunks(self.pool, [self.count])
        self.segments, _ = cut_step(geometry, np.array([0, self.count]), np.array([stop]))
        self.query = self.pool.random(self.count, geometry.num_query_heads, geometry.head_size)
        self.out = torch.empty_like(self.query)
        self.scale = geometry.head_size**-0.5
        self.view = self.pool.view()
        self.head_tables = [
            torch.from_numpy(make_head_table(geometry, layer)).to(DEVICE)
            for layer in range(geometry.num_layers)
        ]

    def fill_all_layers(self) -> None:
        """Values instead of NaN everywhere: attention over NaN need not take as long."""
        base = self.pool.sealed_cache._base
        assert base is not None
        base.normal_(generator=self.pool.generator)

    def flops(self) -> tuple[float, float]:
        """Of the products with sealed rows, and with raw ones, that the queries see; all layers."""
        g, position = self.geometry, np.arange(self.stop - self.count, self.stop)
        C = g.chunk_size_tokens
        sealed = position // C
        first_raw = np.maximum(0, sealed * C - g.window_size_tokens)
        raw = g.num_layers * g.num_kv_heads * (position + 1 - first_raw).sum()
        kept = 0
        for layer, groups in enumerate(g.head_groups.pages):
            for group in range(len(groups)):
                rows = sealed * g.budget_rows(layer, group)
                rows -= (sealed > 0) * g.first_row(layer, group, 0)
                kept += g.page_group_size * int(rows.sum())
        per_row = 4.0 * g.head_size * g.queries_per_kv_head
        return per_row * kept, per_row * int(raw)


class Ours:
    """Attention of a step, its sealed part by `attention` where there is one."""

    def __init__(self, step: Step, blocks: Blocks, attention: PagedAttention | None = None) -> None:
        g = step.geometry
        self.step, self.blocks, self.attention = step, blocks, attention
        self.sealed: SealedStep | None = None
        if attention is not None and step.stop > g.chunk_size_tokens:
            self.sealed = SealedStep.make(g, step.segments, DEVICE)
        gathered = None if self.sealed is None else self.sealed.first_gathered
        tiles = make_tiles(step.segments, g, blocks, gathered)
        self.tiles = torch.from_numpy(tiles).to(DEVICE)

    def sealed_part(self, layer: int, attention: PagedAttention) -> SealedPart:
        """The sealed part of one layer."""
        assert self.sealed is not None
        step = self.step
        return attend_sealed(
            step.query,
            self.sealed,
            step.view,
            head_table=step.head_tables[layer],
            softmax_scale=step.scale,
            attention=attention,
            workspace=WORKSPACE,
        )

    def recent(self, layer: int) -> torch.Tensor:
        """Raw tokens of a layer."""
        first = self.step.pool.recent_cache
        return torch.as_strided(first, first.shape, first.stride(), first[0].numel() * layer)

    def layer(self, layer: int) -> None:
        """Attention of one layer."""
        step, part = self.step, None
        if self.sealed is not None and self.attention is not None:
            part = self.sealed_part(layer, self.attention)
        prefill_attention(
            step.query,
            self.tiles,
            step.view.of_layer(self.recent(layer)),
            head_table=step.head_tables[layer],
            softmax_scale=step.scale,
            out=step.out,
            blocks=self.blocks,
            sealed_part=part,
        )

    def run(self, layers: Sequence[int]) -> None:
        """Attention of some layers, one after the other."""
        for layer in layers:
            self.layer(layer)

    def run_sealed(self, layers: Sequence[int], attention: PagedAttention) -> None:
        """The sealed part of some layers."""
        for layer in layers:
            self.sealed_part(layer, attention)

    def check(self) -> float:
        """Relative error of layer 0 at the first and last segments; NaN lies around the rows."""
        step = self.step
        step.out.fill_(torch.nan)
        self.layer(0)
        order = np.arange(len(step.segments))
        some: Segments = step.segments.take(np.unique(np.concatenate([order[:2], order[-2:]])))
        expected = torch.full_like(step.query, torch.nan, dtype=torch.float32)
        attend(
            step.query, some, step.view, geometry=step.geometry, layer=0,
            softmax_scale=step.scale, out=expected,
        )  # fmt: skip
        if step.out.isnan().any():
            return math.nan
        rows = ~expected[:, 0, 0].isnan()
        return relative_error(step.out[rows], expected[rows])


class Extend(Ours):
    """Attention of a small step as it is served: cut and shared out on the device."""

    def __init__(self, step: Step, blocks: Blocks, programs_per_sm: int = PROGRAMS_PER_SM) -> None:
        self.step, g = step, step.geometry
        sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count
        self.tables = ExtendTables.of(g, DEVICE, blocks)
        self.workspace = ExtendWorkspace.allocate(self.tables, sms * programs_per_sm, step.count, 1)
        self.view = step.view._replace(
            query_start=torch.tensor([0, step.count], dtype=torch.int32, device=DEVICE)
        )

    def layer(self, layer: int) -> None:
        """Attention of one layer; the first one cuts the step."""
        step = self.step
        if layer == 0:
            cut(self.view, step.count, self.tables, self.workspace)
        extend_attention(
            step.query,
            self.view.of_layer(self.recent(layer)),
            tables=self.tables,
            layer=layer,
            softmax_scale=step.scale,
            out=step.out,
            workspace=self.workspace,
        )


class FlashAttention:
    """Causal attention of the same step over all tokens so far."""

    def __init__(self, step: Step) -> None:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        g = step.geometry
        pool = step.pool
        self.call: Callable[..., Any] = flash_attn_varlen_func
        self.arguments = dict(
            q=step.query,
            k=pool.random(step.stop, g.num_kv_heads, g.head_size),
            v=pool.random(step.stop, g.num_kv_heads, g.head_size),
            max_seqlen_q=step.count,
            cu_seqlens_q=torch.tensor([0, step.count], dtype=torch.int32, device=DEVICE),
            max_seqlen_k=step.stop,
            cu_seqlens_k=torch.tensor([0, step.stop], dtype=torch.int32, device=DEVICE),
            softmax_scale=step.scale,
            causal=True,
            out=torch.empty_like(step.query),
            fa_version=3,
        )
        position = np.arange(step.stop - step.count, step.stop)
        pairs = g.num_layers * g.num_query_heads * int((position + 1).sum())
        self.flops = 4.0 * g.head_size * pairs

    def run(self, layers: int) -> None:
        """As many calls."""
        for _ in range(layers):
            self.call(**self.arguments)
