"""Which states are picked out of the steps that an engine computes."""

import pytest
import torch

from tangram.engines.gathering import Gathering


def step(*texts):
    """(tokens, positions, states) of texts computed together; a state is [token, position]."""
    pairs = [(token, position) for text in texts for position, token in enumerate(text)]
    tokens, positions = (list(column) for column in zip(*pairs, strict=True))
    return tokens, positions, torch.tensor(pairs, dtype=torch.float32)


def test_equal_texts_have_positions_of_their_own():
    one, two = (5, 6, 7, 8), (9, 6)
    gathering = Gathering([one, two, list(one)], [[0], [1], [2, 3]])
    assert gathering.texts == [one, two]
    gathering.add(*step((1, 2), two, one))
    first, other, last = gathering.states()
    assert first.tolist() == [[5, 0]]
    assert other.tolist() == [[6, 1]]
    assert last.tolist() == [[7, 2], [8, 3]]


def test_texts_may_come_in_any_step_and_order():
    gathering = Gathering([(1, 2), (3,), (4, 5, 6)], [[1], [0], [0, 2]])
    gathering.add(*step((4, 5, 6)))
    gathering.add(*step((3,), (1, 2)))
    assert [found.tolist() for found in gathering.states()] == [
        [[2, 1]], [[3, 0]], [[4, 0], [6, 2]],
    ]  # fmt: skip


def test_what_is_found_does_not_change_with_the_engines_buffer():
    gathering = Gathering([(1, 2)], [[1]])
    tokens, positions, states = step((1, 2))
    gathering.add(tokens, positions, states)
    states.zero_()
    assert gathering.states()[0].tolist() == [[2, 1]]


def test_a_text_that_was_cut_is_not_found():
    gathering = Gathering([(1, 2, 3)], [[1]])
    gathering.add(*step((1, 2)))
    with pytest.raises(AssertionError, match="not computed whole"):
        gathering.states()
