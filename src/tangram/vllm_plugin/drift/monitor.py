"""Whether the traffic's heads keep what calibration's samples let expect: sampled while serving.

For a sampled chunk, a threshold over the scores of the level's scope (all layers, or each) at the
serving ratio gives each head's share of the tokens above it. The mean share over the last sampled
chunks is compared with the profile's statistic of the same name: how far it is off, in the
deviations of the samples, and how many heads would have wanted more than their budget.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from tangram.kernels.segments import SealingChunks
from tangram.plan.drift_reference import DriftReference
from tangram.scorers.select import score_ranks
from tangram.scorers.shares import threshold_shares
from tangram.vllm_plugin.drift.board import LEAST_CHUNKS, DriftBoard, DriftReading

logger = logging.getLogger("vllm.tangram")

LIMITS = {"crosslayer": 2.5, "perlayer": 1.15}
"""Mean deviation beyond which calibration does not cover the traffic, by scope; how they were found
is in docs/metrics.md."""
HORIZON_CHUNKS = 64
"""Sampled chunks that the running mean looks back on."""
CHUNKS_BETWEEN_WARNINGS = 4096


class DriftMonitor:
    """Samples chunks of one worker; the host never waits for the device.

    Args:
        reference: what calibration lets expect.
        every: of so many sealed chunks one is sampled.
        device: where scores are.
        board: where others read the result.

    Attributes:
        is_due: a chunk was due in a step of which none can be sampled.
    """

    def __init__(
        self, reference: DriftReference, every: int, device: torch.device, board: DriftBoard
    ) -> None:
        self.reference, self._every, self._board = reference, every, board
        self._mean, self._deviation, self._budget = (
            torch.from_numpy(array.astype(np.float32)).to(device)
            for array in (reference.mean, reference.deviation, reference.budget)
        )
        self._running = torch.zeros_like(self._mean)
        self._taken = torch.zeros((), dtype=torch.int64, device=device)
        self._ranks: list[Tensor] = []
        self._sealed = self._sampled = 0
        self._warn_at = 0
        self.is_due = False
        self._pending: tuple[Tensor, torch.cuda.Event | None] | None = None

    def choose(self, sealing: SealingChunks) -> SealingChunks | None:
        """The chunk of a step that is sampled, if any: at most one, and never a chunk 0.

        Sinks and the start of a text are a larger part of a chunk 0 than of calibration's samples.
        """
        later = np.flatnonzero(sealing.chunk > 0)
        before, self._sealed = self._sealed, self._sealed + len(later)
        due = later[self._every - 1 - before % self._every :: self._every]
        if self.is_due:  # since a step of which none could be
            due = later
        if len(due) == 0:
            return None
        self.is_due = False
        return sealing.take(due[[self._sampled % len(due)]])

    def pass_over(self, sealing: SealingChunks) -> None:
        """Count the chunks of a step of which none can be sampled; `is_due` says to make up for it.

        A step that is part of a CUDA graph runs nothing but what was captured.
        """
        before = self._sealed
        self._sealed += int(np.count_nonzero(sealing.chunk > 0))
        self.is_due |= self._sealed // self._every > before // self._every

    def add_layer(self, layer: int, scores: Tensor, sinks: Tensor, counts: Tensor) -> None:
        """Take the sampled chunk's scores of one layer; layers come in order.

        Args:
            layer: attention layer; 0 begins a chunk.
            scores: [tokens, kv_heads] float32.
            sinks: [tokens] bool, tokens that are kept whatever their score.
            counts: [] bool, whether the chunk is one of a request, and not of a step that vLLM
                makes up to warm up, or to keep step with other engines.
        """
        if layer == 0:
            self._ranks.clear()
        ranks = score_ranks(scores).masked_fill(sinks[:, None], torch.iinfo(torch.int32).max)
        self._ranks.append(ranks.T)
        if layer == len(self._mean) - 1:
            self._add_chunk(torch.stack(self._ranks), counts)
            self._ranks.clear()

    def _add_chunk(self, ranks: Tensor, counts: Tensor) -> None:
        r = self.reference
        shares = threshold_shares(ranks, (r.ratio,))[r.scope][0].float()
        self._sampled += 1
        self._taken += counts
        weight = counts / self._taken.clamp(1, HORIZON_CHUNKS)
        self._running += (shares - self._running) * weight
        off = ((self._running - self._mean).abs() / self._deviation).mean()
        over = (self._running > self._budget).float().mean()
        self._publish()
        if self._pending is None:
            result = torch.stack([off.double(), over.double(), self._taken.double()])
            event = None
            if result.is_cuda:
                result = result.to("cpu", non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            self._pending = result, event
        self._publish()

    def _publish(self) -> None:
        """Tell what has arrived on the host."""
        if self._pending is None:
            return
        result, event = self._pending
        if event is not None and not event.query():
            return
        self._pending = None
        off, over, taken = result.tolist()
        sampled = int(taken)
        if sampled == 0:
            return
        limit = LIMITS[self.reference.scope]
        expected = float((self.reference.mean > self.reference.budget).mean())
        self._board.write(DriftReading(sampled, off, over, expected, limit))
        if sampled >= LEAST_CHUNKS and off > limit and self._sealed >= self._warn_at:
            self._warn_at = self._sealed + CHUNKS_BETWEEN_WARNINGS
            logger.warning(
                "the traffic is not what the compression profile was calibrated on: the heads' "
                "shares are off by %.1f deviations of its samples on average (limit %g), and "
                "%.0f %% of the heads want more than their budget (%.0f %% in calibration). "
                "Calibrate a --compression-profile on text like this traffic",
                off, limit, 100 * over, 100 * expected,
            )  # fmt: skip
