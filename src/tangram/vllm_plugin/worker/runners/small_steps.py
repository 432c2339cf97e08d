"""Small steps with prefill on a GPU: cut on the device, so that a CUDA graph serves them whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from tangram.geometry import Geometry
from tangram.kernels.cache_view import CacheView
from tangram.kernels.decode import DecodeTables, DecodeWorkspace, decode_attention, schedule
from tangram.kernels.decode.tables import LEAST_REQUESTS as SCHEDULED_AT_LEAST
from tangram.kernels.extend import (
    LEAST_REQUESTS,
    LEAST_TILES,
    MAX_STEP_TOKENS,
    PROGRAMS_PER_SM,
    ExtendTables,
    ExtendWorkspace,
    cut,
    extend_attention,
)
from tangram.kernels.sizes import powers_of_two
from tangram.vllm_plugin.worker.runners.step import LayerStep


class SmallSteps:
    """Attention of small steps, for all layers.

    Args:
        geometry: the layout.
        device: a CUDA device.
        num_processors: multiprocessors of the device.
        max_requests: of a step.
        tables: of decode attention, which serves what the cut leaves to it.
        workspace: of decode attention; free while a small step runs.
    """

    def __init__(
        self,
        geometry: Geometry,
        device: torch.device,
        num_processors: int,
        max_requests: int,
        tables: DecodeTables,
        workspace: DecodeWorkspace,
    ) -> None:
        self._device, self._max_requests = device, max_requests
        self._decode_tables, self._decode_workspace = tables, workspace
        self._tables = ExtendTables.of(geometry, device)
        self._workspace = ExtendWorkspace.allocate(
            self._tables, num_processors * PROGRAMS_PER_SM, MAX_STEP_TOKENS, max_requests
        )
        self._beside = torch.cuda.Stream(device) if device.type == "cuda" else None

    def load(self, step: LayerStep) -> None:
        """Load what cuts and schedules, compiled for powers of two, and what attends: to nothing.

        Args:
            step: whose caches and type the kernels are for.
        """
        most = self._max_requests
        zeros = step.view.seq_lens.new_zeros(most + 1)
        nothing = step.view._replace(seq_lens=zeros[:most], query_start=zeros)
        for requests in powers_of_two(SCHEDULED_AT_LEAST, most):
            schedule(nothing, min(requests, most), self._decode_tables, self._decode_workspace)
        for requests in powers_of_two(LEAST_REQUESTS, most):
            some = nothing._replace(seq_lens=zeros[: min(requests, most)])
            cut(some, LEAST_TILES, self._tables, self._workspace)
        for tokens in powers_of_two(LEAST_TILES, MAX_STEP_TOKENS):
            cut(nothing, tokens, self._tables, self._workspace)
        empty = LayerStep(**{**vars(step), "view": nothing})
        self.attend(empty, lambda: None)

    def attend(self, step: LayerStep, seal: Callable[[], None]) -> None:
        """Seal what the step completes and attend; the step's first layer cuts it.

        Args:
            step: one layer; its rows are stored.
            seal: seals the layer, before the tiles' queries attend.
        """
        view = step.view
        decodes = view._replace(seq_lens=self._workspace.decode_lens)
        if step.layer == 0:
            cut(view, len(step.query), self._tables, self._workspace)
            requests = len(view.seq_lens)
            schedule(decodes, requests, self._decode_tables, self._decode_workspace)
        with self._decoding_beside(step, decodes):
            seal()
            extend_attention(
                step.query,
                view,
                tables=self._tables,
                layer=step.layer,
                softmax_scale=step.softmax_scale,
                out=step.out,
                workspace=self._workspace,
            )

    @contextmanager
    def _decoding_beside(self, step: LayerStep, decodes: CacheView) -> Iterator[None]:
        """Decodes attend meanwhile; in a graph that is captured, at the same time.

        They see no chunk that this step seals: tokens that could are the first after a chunk, and
        cut into tiles.
        """
        beside, current = self._beside, None
        if beside is not None and torch.cuda.is_current_stream_capturing():
            current = torch.cuda.current_stream(self._device)
            beside.wait_stream(current)
        with torch.cuda.stream(beside if current else None):
            decode_attention(
                step.query,
                decodes,
                tables=self._decode_tables,
                layer=step.layer,
                softmax_scale=step.softmax_scale,
                out=step.out[: len(step.query)],
                workspace=self._decode_workspace,
                among_others=True,
            )
        yield
        if beside is not None and current is not None:
            current.wait_stream(beside)
