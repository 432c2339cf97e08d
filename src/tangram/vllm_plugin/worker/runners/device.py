"""One layer's step on a GPU: the kernels, and the constant tables that they read.

Everything that a decode step needs is on the device or constant, and all that a small step with
prefill needs too, so that such a step can be captured in a CUDA graph: which requests seal, how
their tokens are cut, and how far each one attends, the kernels find out themselves. Only a large
step with prefill is cut on the host, as it is on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tangram.geometry import Geometry
from tangram.kernels.decode import (
    PROGRAMS_PER_SM,
    DecodeTables,
    DecodeWorkspace,
    decode_attention,
    schedule,
)
from tangram.kernels.flash import (
    MAX_PAGE_NUMBERS,
    MIN_PAIRS,
    PagedAttention,
    SealedStep,
    SealedWorkspace,
    attend_sealed,
    page_numbers,
    sealed_pairs,
)
from tangram.kernels.prefill import choose_blocks, make_head_table, make_tiles, prefill_attention
from tangram.kernels.seal_decode import (
    SealScorer,
    SealTables,
    seal_decode,
)
from tangram.kernels.segments import Segments
from tangram.kernels.sizes import shared_bytes
from tangram.vllm_plugin.worker.runners.sealing import sample_drift
from tangram.vllm_plugin.worker.runners.small_steps import SmallSteps
from tangram.vllm_plugin.worker.runners.step import HostStep, LayerStep, harmless_step

if TYPE_CHECKING:
    from tangram.vllm_plugin.worker.storage import QueryRing, SealedCache


class DeviceKernels:
    """The kernels with the tables of all layers; one a worker, a `LayerRunner`.

    Args:
        geometry: the layout.
        scorer: what decides which rows are kept.
        device: a CUDA device.
        max_requests: of a step.
        recent_caches: gives the recent cache of every layer, once they are bound.
        flash: FlashAttention for the sealed part of large steps, on layouts that fit it; or None.
        max_step_tokens: tokens of a step for which FlashAttention's buffers have room from the
            warm-up on, when vLLM still looks at how much memory is taken.
    """

    is_device = True

    def __init__(
        self,
        geometry: Geometry,
        scorer: SealScorer,
        device: torch.device,
        max_requests: int,
        recent_caches: Callable[[], list[Tensor]],
        flash: PagedAttention | None = None,
        max_step_tokens: int = 0,
    ) -> None:
        self.geometry, self.scorer, self.device = geometry, scorer, device
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._tables = DecodeTables.of(geometry, device)
        self._workspace = DecodeWorkspace.allocate(self._tables, sms * PROGRAMS_PER_SM)
        self._small_steps = SmallSteps(
            geometry, device, sms, max_requests, self._tables, self._workspace
        )
        self._seal_tables: list[SealTables] = []
        self._all_layers: SealTables | None = None
        self._recent_caches = recent_caches
        self._is_warm = False
        self._max_requests = max_requests
        self._heads = [
            torch.from_numpy(make_head_table(geometry, layer)).to(device)
            for layer in range(geometry.num_layers)
        ]
        self._blocks = choose_blocks(
            geometry.head_size, geometry.itemsize_bytes, shared_bytes(device)
        )
        self._flash, self._flash_workspace = flash, SealedWorkspace(device)
        self._max_step_tokens = max_step_tokens

    def for_layout(self, geometry: Geometry) -> DeviceKernels:
        """The same kernels with the tables of another layout, on the same caches."""
        return DeviceKernels(
            geometry,
            self.scorer,
            self.device,
            self._max_requests,
            self._recent_caches,
            self._flash,
            self._max_step_tokens,
        )

    def forget_caches(self) -> None:
        """Drop the tables that hold addresses of caches, which are about to be made anew.

        vLLM captures graphs once on a small cache, to see what they take, before it makes the real
        one. Kernels are loaded anew for that: strides of a large pool can need more bits.
        """
        self._is_warm = False
        self._seal_tables.clear()
        self._all_layers = None

    @torch.inference_mode()
    def warm_up(self, sealed: SealedCache, ring: QueryRing | None) -> None:
        """Make what steps read and load what they run, by steps that touch no request.

        Else the first prompt would wait for it. Tables made while a graph is captured would be
        copied from host memory that is gone at the replay. Does nothing from the second call on,
        until `forget_caches`.
        """
        if self._is_warm:
            return
        self._is_warm = True
        caches = self._recent_caches()
        self._all_layers = SealTables.of(self.geometry, range(len(caches)), caches)
        self._seal_tables = [
            SealTables.of(self.geometry, [layer], [cache]) for layer, cache in enumerate(caches)
        ]
        step, host = harmless_step(sealed, caches[0], ring)
        host.tiles, _ = self.cut_segments(host.segments)
        self._seal_layer(step)
        step.store_queries()
        self._attend_mixed(step, host)
        self._small_steps.load(step)
        if self._flash is not None:
            rows = max(1, self._max_step_tokens), *step.query.shape[1:]
            for name in ("queries", "out"):
                self._flash_workspace.give(name, step.query.dtype, *rows)
            host.tiles, host.sealed_step = self._cut(host.segments, flash=True)
            self._attend_mixed(step, host)

    def cut(self, host: HostStep) -> None:
        """Tell a step's decodes, which lead, from the rest, and put the rest on the device.

        Where a batch is not sorted, a few more requests count as prefill, and no harm done.
        """
        counts = host.query_start[1:] - host.query_start[:-1]
        host.num_decodes = int(np.cumprod(counts == 1).sum())
        rest = np.flatnonzero(host.segments.request >= host.num_decodes)
        host.tiles, host.sealed_step = self.cut_segments(host.segments.take(rest))

    def cut_segments(self, segments: Segments) -> tuple[Tensor, SealedStep | None]:
        """Segments on the device, the same for all layers.

        Returns:
            The tiles, and what FlashAttention takes of them where that is worth it.
        """
        pays = (
            self._flash is not None
            and sealed_pairs(self.geometry, segments) >= MIN_PAIRS
            and page_numbers(self.geometry, segments) <= MAX_PAGE_NUMBERS
        )
        return self._cut(segments, flash=pays)

    def _cut(self, segments: Segments, *, flash: bool) -> tuple[Tensor, SealedStep | None]:
        sealed = SealedStep.make(self.geometry, segments, self.device) if flash else None
        gathered = None if sealed is None else sealed.first_gathered
        tiles = make_tiles(segments, self.geometry, self._blocks, gathered)
        return torch.from_numpy(tiles).to(self.device, non_blocking=True), sealed

    def run(self, step: LayerStep) -> None:
        """Store the step's rows, seal what they complete, attend."""
        step.store_rows()
        if step.host is not None:
            self._run_mixed(step, step.host)
        elif step.is_decode:
            self._run_decode(step)
        else:
            self._small_steps.attend(step, lambda: self._seal_and_keep(step))

    def _run_decode(self, step: LayerStep) -> None:
        """One token a request: attend first, and seal all layers in one launch after the last.

        The query does not see the chunk that its own token completes, and nobody else hits it in
        this step: see `SealedManager.cache_blocks`.
        """
        step.store_queries()
        self._attend_decodes(step, len(step.query))
        if step.layer == self.geometry.num_layers - 1:
            assert self._all_layers is not None, "warm_up comes first"
            self._seal(step, self._all_layers, query=None)

    def _run_mixed(self, step: LayerStep, host: HostStep) -> None:
        """A step cut on the host: every layer seals before it attends, queries see the result.

        The host knows which chunks those are: no token is taken back, as speculation would.
        """
        if len(host.sealing):
            self._seal_layer(step)
            sample_drift(step, host)
        step.store_queries()
        self._attend_mixed(step, host)

    def _seal_and_keep(self, step: LayerStep) -> None:
        self._seal_layer(step)
        step.store_queries()

    def _seal_layer(self, step: LayerStep) -> None:
        query = None if step.view.ring is None else step.query
        self._seal(step, self._seal_tables[step.layer], query)

    def _attend_mixed(self, step: LayerStep, host: HostStep) -> None:
        if host.num_decodes:
            self._attend_decodes(step, host.num_decodes)
        if host.tiles is not None:
            self.attend_prefills(step, host.tiles, host.sealed_step)

    def attend_prefills(self, step: LayerStep, tiles: Tensor, sealed: SealedStep | None) -> None:
        """Attend the queries of a step's tiles, both as `cut` gave them."""
        part, heads = None, self._heads[step.layer]
        if sealed is not None:
            assert self._flash is not None
            part = attend_sealed(
                step.query,
                sealed,
                step.view,
                head_table=heads,
                softmax_scale=step.softmax_scale,
                attention=self._flash,
                workspace=self._flash_workspace,
            )
        prefill_attention(
            step.query,
            tiles,
            step.view,
            head_table=heads,
            softmax_scale=step.softmax_scale,
            out=step.out,
            blocks=self._blocks,
            sealed_part=part,
        )

    def _seal(self, step: LayerStep, tables: SealTables, query: Tensor | None) -> None:
        seal_decode(
            tables,
            step.view,
            scorer=self.scorer,
            softmax_scale=step.softmax_scale,
            query=query,
        )

    def _attend_decodes(self, step: LayerStep, count: int) -> None:
        """Attend the first `count` requests, one token each; the step's first layer schedules."""
        if step.layer == 0:
            schedule(step.view, count, self._tables, self._workspace)
        decode_attention(
            step.query[:count],
            step.view,
            tables=self._tables,
            layer=step.layer,
            softmax_scale=step.softmax_scale,
            out=step.out[:count],
            workspace=self._workspace,
        )
