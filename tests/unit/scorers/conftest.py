"""Chunks of every shape, and each scorer once more: written from its formula, in plain loops."""

import math
from collections.abc import Callable

import pytest
import torch

from tangram.scorers import Chunks


def _chunks(
    leading: tuple[int, ...] = (),
    tokens: int = 37,
    kv_heads: int = 2,
    group: int = 3,
    head_size: int = 10,
    rotary_dim: int | None = None,
    window: int = 4,
    dtype: torch.dtype = torch.float32,
    magnitude: float = 1.0,
    seed: int = 0,
) -> Chunks:
    """Random chunks; each leading index has a boundary of its own."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    query_heads = kv_heads * group
    start = torch.randint(0, 100_000, leading, generator=random)
    root = normal(query_heads, head_size, head_size) / head_size**0.5
    half = (head_size if rotary_dim is None else rotary_dim) // 2
    return Chunks(
        keys=(magnitude * normal(*leading, tokens, kv_heads, head_size)).to(dtype),
        values=(magnitude * normal(*leading, tokens, kv_heads, head_size)).to(dtype),
        positions=start.unsqueeze(-1) + torch.arange(tokens),
        softmax_scale=head_size**-0.5,
        window_size_tokens=window,
        window_queries=(magnitude * normal(*leading, window, query_heads, head_size)).to(dtype),
        statistics={
            "row_weights": normal(kv_heads, 2 * head_size + 4)
            / (max(magnitude, 1.0) * head_size**0.5),
            "query_mean": magnitude * normal(query_heads, head_size),
            "query_covariance": magnitude**2 * (root @ root.mT),
            "rope_frequencies": 10_000.0 ** -(torch.arange(half, dtype=torch.float64) / half),
        },
        stored_scores=normal(*leading, tokens, kv_heads),
    )


@pytest.fixture(scope="session")
def make_chunks() -> Callable[..., Chunks]:
    return _chunks


# From here on: one chunk, lists of Python floats (float64) in, [token][KV head] out.


def _dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def _norm(a: list[float]) -> float:
    return math.sqrt(_dot(a, a))


def _softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


def _query_heads_of(kv_head: int, query_heads: int, kv_heads: int) -> list[int]:
    return [q for q in range(query_heads) if q // (query_heads // kv_heads) == kv_head]


def _of_head(rows: torch.Tensor, head: int) -> list[list[float]]:
    return [[float(x) for x in row[head]] for row in rows]


def _per_head(chunks: Chunks, column: Callable[[int], list[float]]) -> list[list[float]]:
    """From one column of scores per KV head to [token][KV head]."""
    columns = [column(head) for head in range(chunks.keys.shape[-2])]
    return [list(row) for row in zip(*columns, strict=True)]


def naive_streaming_llm(chunks: Chunks) -> list[list[float]]:
    return _per_head(chunks, lambda head: [float(i) for i in range(chunks.keys.shape[0])])


def naive_key_norm(chunks: Chunks) -> list[list[float]]:
    return _per_head(chunks, lambda head: [-_norm(key) for key in _of_head(chunks.keys, head)])


def naive_key_diff(chunks: Chunks) -> list[list[float]]:
    def column(head: int) -> list[float]:
        keys = _of_head(chunks.keys, head)
        unit = [[x / _norm(key) for x in key] for key in keys]
        anchor = [math.fsum(dim) / len(keys) for dim in zip(*unit, strict=True)]
        return [-_dot(key, anchor) / (_norm(key) * _norm(anchor)) for key in keys]

    return _per_head(chunks, column)


def _naive_attention(chunks: Chunks, query: int, query_head: int) -> list[float]:
    query_heads, kv_heads = chunks.window_queries.shape[-2], chunks.keys.shape[-2]
    vector = [float(x) for x in chunks.window_queries[query, query_head]]
    keys = _of_head(chunks.keys, query_head // (query_heads // kv_heads))
    return _softmax([chunks.softmax_scale * _dot(vector, key) for key in keys])


def naive_snap_kv(chunks: Chunks, kernel_size: int = 5) -> list[list[float]]:
    window, query_heads, _ = chunks.window_queries.shape
    tokens, kv_heads, _ = chunks.keys.shape

    def column(head: int) -> list[float]:
        scores = [0.0] * tokens
        heads = _query_heads_of(head, query_heads, kv_heads)
        for query_head in heads:
            mean = [0.0] * tokens
            for query in range(window):
                for token, weight in enumerate(_naive_attention(chunks, query, query_head)):
                    mean[token] += weight / window
            for token in range(tokens):
                near = range(token - kernel_size // 2, token + kernel_size // 2 + 1)
                smooth = sum(mean[i] for i in near if 0 <= i < tokens) / kernel_size
                scores[token] += smooth / len(heads)
        return scores

    return _per_head(chunks, column)


def naive_tova(chunks: Chunks) -> list[list[float]]:
    window, query_heads, _ = chunks.window_queries.shape
    scores = [0.0] * chunks.keys.shape[0]
    for query_head in range(query_heads):
        for token, weight in enumerate(_naive_attention(chunks, window - 1, query_head)):
            scores[token] += weight / query_heads
    return _per_head(chunks, lambda head: scores)


def naive_expected_attention(
    chunks: Chunks, n_future_tokens: int = 512, epsilon: float = 0.01
) -> list[list[float]]:
    """With the whole rotation matrix, turned mean and turned covariance, as in the paper."""
    mean = chunks.statistics["query_mean"].double()
    covariance = chunks.statistics["query_covariance"].double()
    frequencies = chunks.statistics["rope_frequencies"].tolist()
    query_heads, size = mean.shape
    half = len(frequencies)
    boundary = int(chunks.positions[-1]) + 1 + chunks.window_size_tokens
    R = torch.eye(size, dtype=torch.float64)
    for pair, frequency in enumerate(frequencies):
        angles = [p * frequency for p in range(boundary, boundary + n_future_tokens)]
        cos = math.fsum(math.cos(a) for a in angles) / n_future_tokens
        sin = math.fsum(math.sin(a) for a in angles) / n_future_tokens
        R[pair, pair] = R[pair + half, pair + half] = cos
        R[pair, pair + half], R[pair + half, pair] = -sin, sin

    def column(head: int) -> list[float]:
        keys = [key.double() for key in chunks.keys[:, head]]
        heads = _query_heads_of(head, query_heads, chunks.keys.shape[-2])
        expected = [0.0] * len(keys)
        for q in heads:
            turned_mean, turned_covariance = R @ mean[q], R @ covariance[q] @ R.T
            scale = chunks.softmax_scale
            logits = [
                float(scale * turned_mean @ k + scale**2 / 2 * k @ turned_covariance @ k)
                for k in keys
            ]
            for token, weight in enumerate(_softmax(logits)):
                expected[token] += weight / len(heads)
        values = _of_head(chunks.values, head)
        return [(e + epsilon) * _norm(v) for e, v in zip(expected, values, strict=True)]

    return _per_head(chunks, column)


def naive_learned(chunks: Chunks) -> list[list[float]]:
    frequencies = chunks.statistics["rope_frequencies"].tolist()
    half = len(frequencies)

    def score(key: list[float], value: list[float], weights: list[float], position: int) -> float:
        before = list(key)
        for pair, frequency in enumerate(frequencies):
            cos, sin = math.cos(position * frequency), math.sin(position * frequency)
            before[pair] = cos * key[pair] + sin * key[pair + half]
            before[pair + half] = cos * key[pair + half] - sin * key[pair]
        length = _norm(value)
        features = [*before, *value, _norm(key), length, math.log(max(length, 1e-6)), 1.0]
        return math.exp(max(-80.0, min(80.0, _dot(features, weights))))

    def column(head: int) -> list[float]:
        weights = [float(x) for x in chunks.statistics["row_weights"][head]]
        rows = zip(_of_head(chunks.keys, head), _of_head(chunks.values, head), strict=True)
        positions = chunks.positions.tolist()
        return [score(k, v, weights, p) for (k, v), p in zip(rows, positions, strict=True)]

    return _per_head(chunks, column)


def naive_stored(chunks: Chunks) -> list[list[float]]:
    """Made with the tokens, by what `test_gates.py` holds to its formula."""
    return chunks.stored_scores.tolist()


_NAIVE = {
    "streaming_llm": naive_streaming_llm,
    "key_norm": naive_key_norm,
    "key_diff": naive_key_diff,
    "expected_attention": naive_expected_attention,
    "learned": naive_learned,
    "snap_kv": naive_snap_kv,
    "tova": naive_tova,
    "fastkvzip": naive_stored,
    "kvzap": naive_stored,
}


@pytest.fixture(scope="session")
def naive() -> Callable[..., torch.Tensor]:
    """Scores of one chunk by loops: naive(name, chunks, **parameters), [tokens, kv_heads]."""

    def score(name: str, chunks: Chunks, **parameters: float) -> torch.Tensor:
        assert chunks.keys.dim() == 3
        return torch.tensor(_NAIVE[name](chunks, **parameters), dtype=torch.float64)

    return score
