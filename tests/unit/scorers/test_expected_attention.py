"""The rotation behind ExpectedAttention, against what it stands for."""

from dataclasses import replace

import pytest
import torch

from tangram.scorers import get_scorer
from tangram.scorers.expected_attention import average_rotation, rotate_back

FREQUENCIES = 10_000.0 ** -(torch.arange(5, dtype=torch.float64) / 5)


def rope(x: torch.Tensor, position: int) -> torch.Tensor:
    """x [..., head_size] turned to a position: halves of the first 10 dimensions are pairs."""
    angle = position * FREQUENCIES
    first, second, rest = x.double().split((5, 5, x.shape[-1] - 10), dim=-1)
    return torch.cat(
        (
            first * angle.cos() - second * angle.sin(),
            second * angle.cos() + first * angle.sin(),
            rest,
        ),
        dim=-1,
    ).to(x.dtype)


def test_one_position_is_a_plain_rotation():
    rotation = average_rotation(FREQUENCIES, torch.tensor(7), 1)
    key = torch.randn(3, 2, 10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rope(rotate_back(key, rotation), 7), key)


def test_turning_keys_back_is_turning_queries():
    random = torch.Generator().manual_seed(0)
    query, keys = torch.randn(12, generator=random), torch.randn(4, 12, generator=random)
    turned = torch.stack([rope(query.double(), p) for p in range(20, 29)]).mean(dim=0)
    rotation = average_rotation(FREQUENCIES, torch.tensor(20), 9)
    back = rotate_back(keys.unsqueeze(0), rotation)[0]
    found, expected = back.double() @ query.double(), keys.double() @ turned
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_far_positions_keep_their_angles():
    near = average_rotation(FREQUENCIES, torch.tensor(3), 512)
    turn = 2**24 + 3
    far = average_rotation(FREQUENCIES, torch.tensor(turn), 512)
    angle = (turn - 3) * FREQUENCIES
    expected = near.to(torch.complex128) * torch.complex(angle.cos(), angle.sin())
    torch.testing.assert_close(far, expected.to(torch.complex64), rtol=1e-6, atol=1e-7)


def test_each_chunk_has_its_own_boundary():
    boundaries = torch.tensor([[64, 128, 192], [256, 5, 0]])
    together = average_rotation(FREQUENCIES, boundaries, 16)
    for i in range(2):
        for j in range(3):
            alone = average_rotation(FREQUENCIES, boundaries[i, j], 16)
            torch.testing.assert_close(together[i, j], alone)


def test_only_relative_positions_matter(make_chunks):
    """The same keys before RoPE, a thousand positions later, have the same scores."""
    chunks = make_chunks(head_size=10, tokens=11)
    plain = chunks.keys
    scores = []
    for start in (100, 1100):
        keys = torch.stack([rope(key, start + i) for i, key in enumerate(plain)])
        moved = replace(chunks, keys=keys, positions=start + torch.arange(11))
        scores.append(get_scorer("expected_attention").score(moved))
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-6)


def test_a_certain_query_gives_its_attention(make_chunks):
    """No covariance, one future position, no epsilon: attention of the mean query, times |v|."""
    chunks = make_chunks(kv_heads=1, group=1, head_size=10)
    mean = chunks.statistics["query_mean"]
    chunks = replace(
        chunks, statistics={**chunks.statistics, "query_covariance": torch.zeros(1, 10, 10)}
    )
    query = rope(mean[0], int(chunks.positions[-1]) + 1 + chunks.window_size_tokens)
    attention = (chunks.keys[:, 0] @ query * chunks.softmax_scale).softmax(dim=0)
    scores = get_scorer("expected_attention", n_future_tokens=1, epsilon=0.0).score(chunks)
    torch.testing.assert_close(scores[:, 0], attention * chunks.values[:, 0].norm(dim=-1))


def test_the_expectation_is_that_of_gaussian_queries(make_chunks):
    """Against a million queries drawn from the statistics."""
    chunks = make_chunks(tokens=6, kv_heads=1, group=1, head_size=10, magnitude=0.5)
    mean = chunks.statistics["query_mean"][0]
    root = torch.linalg.cholesky(chunks.statistics["query_covariance"][0].double())
    normal = torch.randn(
        1_000_000, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    queries = mean.double() + normal @ root.T
    turned = rope(queries, int(chunks.boundaries))
    weights = (turned @ chunks.keys[:, 0].double().T * chunks.softmax_scale).exp().mean(dim=0)
    scores = get_scorer("expected_attention", n_future_tokens=1, epsilon=0.0).score(chunks)
    found = scores[:, 0] / chunks.values[:, 0].norm(dim=-1)
    torch.testing.assert_close(found.double(), weights / weights.sum(), rtol=5e-3, atol=0)


def test_epsilon_is_counted_before_the_norm(make_chunks):
    chunks = make_chunks()
    scores = [get_scorer("expected_attention", epsilon=e).score(chunks) for e in (0.0, 0.25)]
    norms = chunks.values.norm(dim=-1)
    torch.testing.assert_close(scores[1] - scores[0], 0.25 * norms, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_frequencies_may_have_any_precision(dtype, make_chunks):
    chunks = make_chunks()
    frequencies = chunks.statistics["rope_frequencies"].float().to(dtype)
    chunks = replace(chunks, statistics={**chunks.statistics, "rope_frequencies": frequencies})
    scores = get_scorer("expected_attention").score(chunks)
    reference = {**chunks.statistics, "rope_frequencies": frequencies.double()}
    same = get_scorer("expected_attention").score(replace(chunks, statistics=reference))
    assert torch.equal(scores, same)
