"""Readings that are broken off anywhere give what unbroken ones give."""

import numpy as np
import pytest

from tangram.calibrate.recording.resume import Readings

SAMPLES = [3, 1, 4, 1, 5]


class Sum:
    """Gathers a sum and how often it was asked to take something in."""

    def __init__(self):
        self.total, self.taken = 0, 0

    def take(self, value):
        self.total = self.total * 10 + value
        self.taken += 1

    def state(self):
        return {"total": np.array(self.total)}

    def restore(self, state):
        self.total = int(state["total"])


class Stop(Exception):
    pass


def read(path, digest="d", stop_after=None, save_every=1):
    """Two passes over the samples; (totals, how many samples were read, progress)."""
    taken, told = 0, []
    gatherers = Sum(), Sum()
    readings = Readings(10, path, digest, save_every, lambda *step: told.append(step))
    for name, gatherer in zip("ab", gatherers, strict=True):
        for value in readings.over(SAMPLES, name, gatherer):
            if stop_after is not None and taken == stop_after:
                raise Stop
            gatherer.take(value)
            taken += 1
    return [gatherer.total for gatherer in gatherers], taken, told


@pytest.mark.parametrize("save_every", [1, 2, 3, 100])
@pytest.mark.parametrize("stop_after", range(10))
def test_taking_it_up_again_gives_the_same(tmp_path, stop_after, save_every):
    path = tmp_path / "partial"
    with pytest.raises(Stop):
        read(path, stop_after=stop_after, save_every=save_every)
    totals, taken, told = read(path, save_every=save_every)
    assert totals == [31415, 31415]
    # What was saved last is not read again; the end of a pass is always saved.
    saved = max((s for s in (0, 5, *range(0, 10, save_every)) if s <= stop_after), default=0)
    assert taken == 10 - saved
    assert told[-1] == (10, 10)


def test_another_digest_begins_again(tmp_path):
    path = tmp_path / "partial"
    with pytest.raises(Stop):
        read(path, stop_after=7)
    assert read(path, digest="other")[:2] == ([31415, 31415], 10)


def test_a_damaged_file_begins_again(tmp_path):
    path = tmp_path / "partial"
    path.write_bytes(b"cut off")
    assert read(path)[:2] == ([31415, 31415], 10)


def test_without_a_file_nothing_is_saved(tmp_path):
    assert read(None)[:2] == ([31415, 31415], 10)
    assert list(tmp_path.iterdir()) == []
