"""What a scorer sees and gives: `Chunks` in, one score per token and KV head out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from tangram.errors import ScorerError


@dataclass(frozen=True, eq=False)
class Chunks:
    """What a scorer sees of one layer: one chunk, or several of the same length at once.

    `...` stands for any number of leading dimensions, the same ones in every tensor but those of
    `statistics`; chunks that lie beside each other do not know of each other.

    Attributes:
        keys: [..., tokens, kv_heads, head_size], as cached (after RoPE), model dtype.
        values: the same shape and dtype.
        positions: [..., tokens] int64, absolute, ascending without gaps.
        softmax_scale: factor on query . key before the softmax.
        window_size_tokens: W, tokens between the chunk's last token and its boundary.
        window_queries: [..., W, query_heads, head_size], queries (after RoPE) of the observation
            window, the W positions right after the chunk's last token; None unless asked for.
        statistics: arrays of the profile for this layer, by name:
            "query_mean" [query_heads, head_size] and "query_covariance" [query_heads, head_size,
            head_size], of queries before RoPE; "row_weights" [kv_heads, 2 * head_size + 4], see
            `learned`; "rope_frequencies" [rotary_dim / 2], radians.
        stored_scores: [..., tokens, kv_heads] float32, scores that were made with their tokens;
            None unless the scorer has such.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    softmax_scale: float
    _: KW_ONLY
    window_size_tokens: int
    window_queries: Tensor | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    stored_scores: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.values.shape == self.keys.shape, (self.values.shape, self.keys.shape)
        assert self.positions.shape == self.keys.shape[:-2], (self.positions.shape, self.keys.shape)

    @property
    def num_tokens(self) -> int:
        """Tokens of every chunk."""
        return self.keys.shape[-3]

    @property
    def num_kv_heads(self) -> int:
        """KV heads of the layer."""
        return self.keys.shape[-2]

    @property
    def head_size(self) -> int:
        """Elements of a key."""
        return self.keys.shape[-1]

    @property
    def boundaries(self) -> Tensor:
        """[...] int64, first position after the observation window: a multiple of C."""
        return self.positions[..., -1] + (1 + self.window_size_tokens)


@dataclass(frozen=True)
class Scorer(ABC):
    """Rates the tokens of a chunk for one layer; a frozen dataclass, its fields its parameters.

    The score of a chunk is a function of that chunk's `Chunks` alone: not of other chunks, other
    layers or of anything kept from an earlier call. Only the order of the scores within one
    (chunk, KV head) is ever used.
    """

    name: ClassVar[str]
    """Registry name, the name of the file too."""
    needs_window_queries: ClassVar[bool] = False
    """Whether `Chunks.window_queries` must be there."""
    needs_statistics: ClassVar[tuple[str, ...]] = ()
    """Arrays that `Chunks.statistics` must hold."""
    stores_scores: ClassVar[bool] = False
    """Whether scores are made with their tokens, of hidden states: a `gates.GateScorer`."""

    @abstractmethod
    def score(self, chunks: Chunks) -> Tensor:
        """[..., tokens, kv_heads] float32, higher = keep.

        Raises:
            ScorerError: `chunks` lacks what the scorer needs.
        """

    def parameters(self) -> dict[str, Any]:
        """The parameters by name; `type(scorer)(**scorer.parameters())` is the same scorer."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def identity(self) -> dict[str, Any]:
        """The parameters by which a profile knows the scorer."""
        return self.parameters()

    def changed_parameters(self) -> dict[str, Any]:
        """Those of the parameters that are not at their defaults."""
        defaults = {f.name: f.default for f in fields(self)}
        return {name: value for name, value in self.parameters().items() if value != defaults[name]}

    def check_inputs(self, window_size_tokens: int, statistics: Collection[str]) -> None:
        """Check, before the first chunk, that the scorer will get what it needs.

        Args:
            window_size_tokens: W.
            statistics: names of the arrays that the profile holds.

        Raises:
            ScorerError: no observation window, or statistics that are not there.
        """
        self.check_window(window_size_tokens)
        lacking = [name for name in self.needs_statistics if name not in statistics]
        if lacking:
            raise ScorerError(
                f"--compression-scorer {self.name} needs {', '.join(lacking)} of a profile, and "
                f"got {', '.join(sorted(statistics)) or 'no statistics'}: calibrate a profile for "
                "this scorer and give it with --compression-profile"
            )

    def check_window(self, window_size_tokens: int) -> None:
        """Check what of `check_inputs` no profile has a say in.

        Args:
            window_size_tokens: W.

        Raises:
            ScorerError: no observation window.
        """
        if self.needs_window_queries and window_size_tokens < 1:
            raise ScorerError(
                f"--compression-scorer {self.name} needs the queries of the observation window, "
                f"and the window has {window_size_tokens} tokens: give a "
                "--compression-window-size of at least 1"
            )

    def check_model(  # noqa: B027 # most scorers read nothing of a model
        self, num_layers: int, hidden_size: int, num_kv_heads: int
    ) -> None:
        """Check, before the model is loaded, that what the scorer reads is of it.

        Raises:
            ScorerError: it is not.
        """

    def statistic(self, chunks: Chunks, name: str) -> Tensor:
        """An array of the profile, on the keys' device, dtype as it is.

        Raises:
            ScorerError: it is not there.
        """
        self.check_inputs(chunks.window_size_tokens, chunks.statistics)
        return chunks.statistics[name].to(chunks.keys.device)

    def window_queries(self, chunks: Chunks) -> Tensor:
        """[..., W, query_heads, head_size] float32, queries of the observation window.

        Raises:
            ScorerError: there are none.
        """
        queries = chunks.window_queries
        if queries is None or queries.shape[-3] == 0:
            self.check_inputs(0, chunks.statistics)
            raise ScorerError(
                f"{self.name} got no queries of the observation window: only a scorer that says "
                "needs_window_queries = True is given them"
            )
        return queries.float()


def checked_scores(scorer: Scorer, chunks: Chunks) -> Tensor:
    """What a scorer, which may be another package's, gives for some chunks.

    Returns:
        [..., tokens, kv_heads] float32, on the keys' device.

    Raises:
        ScorerError: it raised, or gave something else; names the scorer.
    """
    keys = chunks.keys
    expected = _tensor_title(keys.shape[:-1], torch.float32, keys.device)
    who = f"the scorer {scorer.name!r} ({type(scorer).__module__}.{type(scorer).__qualname__})"
    remedy = "correct its method score, or choose another --compression-scorer"
    try:
        scores: object = scorer.score(chunks)
    except ScorerError:
        raise
    except Exception as error:
        raise ScorerError(
            f"{who} raised {type(error).__name__}: {error}; expected {expected}: {remedy}"
        ) from error
    found = f"a {type(scores).__name__}"
    if isinstance(scores, Tensor):
        found = _tensor_title(scores.shape, scores.dtype, scores.device)
        if found == expected:
            return scores
    raise ScorerError(f"{who} returned {found}, expected {expected}: {remedy}")


def _tensor_title(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> str:
    return f"a tensor {list(shape)} of {dtype} on {device}"


def scorer_title(name: str, changed: Mapping[str, Any]) -> str:
    """The scorer as people read it: `snap_kv`, or `snap_kv(kernel_size=7)`.

    Args:
        name: registry name.
        changed: the parameters that are not at their defaults.
    """
    return f"{name}({list_parameters(changed)})" if changed else name


def list_parameters(parameters: Mapping[str, Any]) -> str:
    """Parameters as people read them: `epsilon=0.1, n_future_tokens=64`."""
    return ", ".join(f"{name}={value}" for name, value in sorted(parameters.items()))


def group_query_heads(tensor: Tensor, num_kv_heads: int, dim: int) -> Tensor:
    """Splits the axis of query heads in two: [kv_heads, query heads of a KV head].

    Query head q belongs to KV head q // (query_heads // kv_heads).

    Args:
        tensor: any shape, with the query heads on axis `dim`.
        num_kv_heads: KV heads of the layer.
        dim: the axis of query heads.

    Raises:
        ScorerError: the KV heads do not divide the query heads.
    """
    query_heads = tensor.shape[dim]
    if query_heads % num_kv_heads:
        raise ScorerError(
            f"{query_heads} query heads do not belong to {num_kv_heads} KV heads: expected a "
            "multiple; the profile or the queries are of another model"
        )
    return tensor.unflatten(dim, (num_kv_heads, query_heads // num_kv_heads))


def attention_over_chunk(queries: Tensor, chunks: Chunks) -> Tensor:
    """Attention weights of queries over the tokens of a chunk, and over nothing else.

    Args:
        queries: [..., W, query_heads, head_size] float32, all after the chunk's last token.
        chunks: the chunks.

    Returns:
        [..., kv_heads, group, W, tokens] float32, every last axis sums to 1.
    """
    grouped = group_query_heads(queries, chunks.num_kv_heads, dim=-2)  # [..., W, kv_heads, G, D]
    grouped = grouped.movedim(-4, -2)  # [..., kv_heads, G, W, D]
    keys = heads_first(chunks.keys)
    logits = (grouped.flatten(-3, -2).contiguous() @ keys.mT) * chunks.softmax_scale
    return logits.softmax(dim=-1).unflatten(-2, grouped.shape[-3:-1])


def heads_first(rows: Tensor) -> Tensor:
    """From [..., tokens, kv_heads, head_size] to [..., kv_heads, tokens, head_size] float32.

    Always contiguous, so that how a product of it is computed, and with it the last bits of a
    score, does not hang on how many chunks lie beside each other.
    """
    return rows.float().transpose(-3, -2).contiguous()


def turn_pairs(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Multiplies rows by the transpose of RoPE's rotation, dimension i with i + rotary_dim / 2.

    Args:
        rows: [..., head_size]; dimensions past the rotary ones stay as they are.
        cos: [..., rotary_dim / 2], one angle a pair, of shapes that broadcast.
        sin: the same.
    """
    half = cos.shape[-1]
    first, second, rest = rows.split((half, half, rows.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin, rest), dim=-1)


def check_whole(scorer: str, parameter: str, value: object, least: int) -> None:
    """Check that a parameter is a whole number and not too small.

    Raises:
        ScorerError: it is not; names the scorer and the parameter.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ScorerError(
            f"{scorer}: {parameter} is {value!r}, expected a whole number of at least {least}"
        )
