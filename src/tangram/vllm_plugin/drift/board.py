"""How a worker's drift reaches the engine core, which may be another process: a few shared bytes.

The worker makes a small file whose name both know, and writes eight bytes at a time into its
mapping. The engine core maps it too and takes the name away, so that nothing is left behind
whatever way either of them ends; where nobody asks for statistics, the worker does at its end.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import uuid
import weakref
from pathlib import Path
from typing import Any, NamedTuple

LEAST_CHUNKS = 16
"""Sampled chunks before which nothing is said."""


class DriftReading(NamedTuple):
    """What a worker has found.

    Attributes:
        sampled_chunks: chunks sampled so far.
        deviation: mean over heads of how far their mean share is off, in deviations.
        heads_over_budget: share of heads whose mean share is above their budget.
        expected_over_budget: the same of calibration's samples.
        limit: deviation beyond which calibration does not cover the traffic.
    """

    sampled_chunks: float
    deviation: float
    heads_over_budget: float
    expected_over_budget: float
    limit: float


_BYTES = 8 * len(DriftReading._fields)


_ENGINE = "TANGRAM_DRIFT_ENGINE"


def name_engine() -> None:
    """Give the engine that this process is about to start a name of its own, in the environment.

    The configuration would do, but its ids are made anew in every process that it is copied to, and
    what is added to it changes the key under which vLLM caches compiled graphs.
    """
    os.environ[_ENGINE] = uuid.uuid4().hex


def engine_name() -> str:
    """The name, in any process of the engine that is on the machine where it was started."""
    return os.environ.get(_ENGINE, "")


def board_path(engine: str, vllm_config: Any) -> Path:
    """Where the worker of an engine makes the file; both ends are on one machine."""
    # Of a dense model the ranks are engines of their own, whose `data_parallel_rank` is 0.
    rank = vllm_config.parallel_config.data_parallel_index
    return Path(tempfile.gettempdir()) / f"tangram-drift-{engine}-{rank}"


class DriftBoard:
    """One reading in shared memory; a reader may see fields of two readings in a row.

    Args:
        path: the file.
        create: whether to make it anew; else it is opened, and its name taken away.

    Raises:
        OSError: it cannot be made, or is not there.
    """

    def __init__(self, path: Path, *, create: bool) -> None:
        flags = os.O_RDWR | os.O_NOFOLLOW
        if create:
            path.unlink(missing_ok=True)
            flags |= os.O_CREAT | os.O_EXCL
        descriptor = os.open(path, flags, 0o600)
        try:
            if create:
                os.ftruncate(descriptor, _BYTES)
            self._memory = mmap.mmap(descriptor, _BYTES)
        finally:
            os.close(descriptor)
        if create:
            weakref.finalize(self, path.unlink, missing_ok=True)
        else:
            path.unlink()
        self._fields = memoryview(self._memory).cast("d")

    def write(self, reading: DriftReading) -> None:
        """Put a reading up."""
        for index, value in enumerate(reading):
            self._fields[index] = value

    def read(self) -> DriftReading:
        """The last reading; zeros before the first."""
        return DriftReading(*self._fields)


class DriftReader:
    """The engine core's end.

    Args:
        path: the worker's file; None where drift is not sampled.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._board: DriftBoard | None = None
        self._told = 0.0

    def read(self) -> DriftReading | None:
        """The last reading, its `sampled_chunks` those since the one before; None without one."""
        if self._path is None:
            return None
        if self._board is None:
            try:
                self._board = DriftBoard(self._path, create=False)
            except OSError:  # not yet, or a worker on another machine
                return None
        reading = self._board.read()
        new, self._told = reading.sampled_chunks - self._told, reading.sampled_chunks
        return reading._replace(sampled_chunks=new) if self._told else None
