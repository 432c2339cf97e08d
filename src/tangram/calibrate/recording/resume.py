"""Readings that can be broken off at any time and taken up again, with the same result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from tangram.calibrate.recording.recorder import with_prefix
from tangram.errors import ProfileError
from tangram.profile import store

_Sample = TypeVar("_Sample")


class Gatherer(Protocol):
    """What gathers something over samples, and can be set to where it was."""

    def state(self) -> dict[str, np.ndarray]:
        """What was gathered so far."""

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from there."""


class Readings:
    """Passes over samples, one after another, saved to one file as they go on.

    Args:
        total: samples of all passes.
        path: the file, or None to save nothing.
        digest: of everything that the result comes from; a file with another is not taken up.
        save_every: samples between two saves.
        progress: called with the samples that are done and the total.
    """

    def __init__(
        self,
        total: int,
        path: Path | None,
        digest: str,
        save_every: int,
        progress: Callable[[int, int], None],
    ) -> None:
        self._total, self._path, self._digest = total, path, digest
        self._save_every, self._progress = save_every, progress
        self._begun = 0  # samples of the passes before this one
        self._finished: dict[str, np.ndarray] = {}
        self._done, self._saved = self._load()

    def over(self, samples: Sequence[_Sample], name: str, gatherer: Gatherer) -> Iterator[_Sample]:
        """The samples of one pass that are still to be read; what was gathered is restored first.

        Args:
            samples: all samples of the pass.
            name: of the pass, other than that of any other.
            gatherer: has taken a sample in when the next one is asked for.
        """
        if self._done > self._begun:
            gatherer.restore(with_prefix(f"{name}/", self._saved))
        first = min(max(self._done - self._begun, 0), len(samples))
        self._progress(self._begun + first, self._total)
        for number in range(first, len(samples)):
            yield samples[number]
            done = self._begun + number + 1
            self._progress(done, self._total)
            if done % self._save_every == 0 or number == len(samples) - 1:
                self._save(done, name, gatherer)
        self._begun += len(samples)
        self._finished |= {f"{name}/{key}": array for key, array in gatherer.state().items()}

    def at_once(
        self, name: str, gather: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """What is gathered between two passes, which is saved with the next one only.

        Args:
            name: other than that of any pass.
            gather: gives the arrays; not called where the file has them.
        """
        arrays = with_prefix(f"{name}/", self._saved) or gather()
        self._finished |= {f"{name}/{key}": array for key, array in arrays.items()}
        return arrays

    def _save(self, done: int, name: str, gatherer: Gatherer) -> None:
        if self._path is not None:
            arrays = {f"{name}/{key}": array for key, array in gatherer.state().items()}
            header = {"digest": self._digest, "done": done}
            store.write(self._path, header, self._finished | arrays)

    def _load(self) -> tuple[int, dict[str, np.ndarray]]:
        if self._path is None or not self._path.exists():
            return 0, {}
        try:
            header, arrays = store.read(self._path)
        except ProfileError:  # cut off, or of another version: begin again
            return 0, {}
        return (header["done"], arrays) if header.get("digest") == self._digest else (0, {})
