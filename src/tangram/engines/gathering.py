"""Final states of whole texts, picked out of steps that compute several in any order."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Gathering:
    """The states that are wanted of some samples, and those that were found.

    A text is computed once, however many samples have it; each has positions of its own.

    Args:
        samples: token ids of each text.
        positions: positions of each sample whose states are wanted.
    """

    def __init__(
        self, samples: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]
    ) -> None:
        self._samples: dict[tuple[int, ...], list[int]] = {}
        for number, text in enumerate(samples):
            self._samples.setdefault(tuple(text), []).append(number)
        self._positions = [list(where) for where in positions]
        self._found: dict[int, Tensor] = {}
        assert len(samples) == len(positions), (len(samples), len(positions))

    @property
    def texts(self) -> list[tuple[int, ...]]:
        """The texts to compute, none of them twice."""
        return list(self._samples)

    def add(self, tokens: Sequence[int], positions: Sequence[int], states: Tensor) -> None:
        """Pick what is wanted out of a step; its other tokens are passed over.

        Args:
            tokens: [tokens], of texts one after another, each whole.
            positions: [tokens], of each in its text, from 0.
            states: [tokens, hidden].
        """
        starts = [index for index, position in enumerate(positions) if position == 0]
        for begin, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            for number in self._samples.get(tuple(tokens[begin:end]), ()):
                self._found[number] = states[begin:end][self._positions[number]].clone()

    def states(self) -> list[Tensor]:
        """For each sample [positions, hidden]."""
        assert len(self._found) == len(self._positions), "a text was not computed whole in one step"
        return [self._found[number] for number in range(len(self._positions))]
