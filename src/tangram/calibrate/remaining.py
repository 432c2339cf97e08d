"""What is tried of several scorers, of which those that cannot be had are left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Generic, TypeVar

from tangram.errors import TangramError

T = TypeVar("T")


class Remaining(Generic[T]):
    """Things by the name of their scorer; one that fails is left out as long as others remain.

    Args:
        each: name of a scorer -> what is tried of it.
        left_out: called with the name and the reason of one that is left out.
    """

    def __init__(self, each: Mapping[str, T], left_out: Callable[[str, str], None]) -> None:
        self._each, self._left_out = dict(each), left_out

    def __iter__(self) -> Iterator[tuple[str, T]]:
        """(name, thing) of those that remain now; more may be left out meanwhile."""
        return iter(list(self._each.items()))

    def __len__(self) -> int:
        return len(self._each)

    def __getitem__(self, name: str) -> T:
        return self._each[name]

    def replace(self, name: str, thing: T) -> None:
        """Have another in the place of one that remains."""
        assert name in self._each, name
        self._each[name] = thing

    @contextmanager
    def leaving_out(self, name: str, *errors: type[TangramError]) -> Iterator[None]:
        """Leave one out where the block raises one of these; the last one's error is raised."""
        try:
            yield
        except errors as error:
            if len(self._each) == 1:
                raise
            del self._each[name]
            self._left_out(name, str(error))
