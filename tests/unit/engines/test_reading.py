"""Comparing next-token distributions, but for the engine that reads."""

import pytest
import torch

from tangram.engines.reading import POSITIONS_AT_ONCE, ReadingEngine


class Identity:
    """Its final states are its logits."""

    def compute_logits(self, states):
        return states


@pytest.fixture
def reader():
    made = object.__new__(ReadingEngine)
    made._model = Identity()
    return made


def test_agreement_counts_positions_with_the_same_likeliest_token(reader):
    positions = 2 * POSITIONS_AT_ONCE + 4
    full = torch.randn(positions, 5, generator=torch.Generator().manual_seed(1))
    other = full * 3  # another distribution with the same order
    assert reader.agreement(full, other) == 1
    quarter = positions // 4
    other[:quarter] = -other[:quarter]
    assert reader.agreement(full, other) == 1 - quarter / positions


def test_divergence_is_kl_of_the_first_from_the_second(reader):
    full, other = (torch.tensor([row] * 300) for row in ([0.0, 1.0, -2.0], [0.5, 0.0, 0.0]))
    p, q = full.softmax(-1), other.softmax(-1)
    expected = float((p * (p / q).log()).sum(-1).mean())
    assert reader.divergence(full, other) == pytest.approx(expected, rel=1e-5)
    assert reader.divergence(full, full) == 0
