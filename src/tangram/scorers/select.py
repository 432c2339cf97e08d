"""From scores to rows: which tokens of a chunk each head keeps. Exact, and the same every time."""

from __future__ import annotations

import torch
from torch import Tensor

SCORE_BITS = 11
"""Significant bits of a score that count, the leading one included."""

_DROPPED_BITS = 24 - SCORE_BITS
_MAGNITUDE = 0x7FFFFFFF
_ABOVE_ALL = 2**31


def score_ranks(scores: Tensor) -> Tensor:
    """Integers that order scores as the rounded scores do, equal ones for equal rounded scores.

    A score is rounded to `SCORE_BITS` significant bits, halves away from zero. The same token
    repeated has the same score but for rounding noise, which depends on how a batch was cut; after
    the rounding it is a tie. NaN counts as minus infinity, and minus zero is zero.

    Args:
        scores: any shape, float32.

    Returns:
        The same shape, int32; minus the rank of a score is the rank of minus the score.
    """
    assert scores.dtype == torch.float32, scores.dtype
    bits = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).view(torch.int32)
    # Sign and magnitude: the carry of a full mantissa goes to the exponent, as it should, and
    # infinity has an empty mantissa, which stays empty.
    magnitude = (bits & _MAGNITUDE) + (1 << (_DROPPED_BITS - 1))
    magnitude = (magnitude >> _DROPPED_BITS) << _DROPPED_BITS
    return torch.where(bits < 0, -magnitude, magnitude)


def top_rows(scores: Tensor, rows: int, always: Tensor | None = None) -> Tensor:
    """The tokens that each head keeps: those of the best scores, in the order of the text.

    Scores count to `SCORE_BITS` significant bits (`score_ranks`); of equal ones the later token
    goes first.

    Args:
        scores: [..., tokens, heads] float32.
        rows: tokens that every head keeps, at most `tokens`.
        always: [..., tokens] bool, tokens that go first whatever their score (the sinks); all of
            them are kept if they are not more than `rows`.

    Returns:
        [..., rows, heads] int64, indices of tokens, ascending along `rows`.
    """
    tokens = scores.shape[-2]
    assert 0 <= rows <= tokens, f"{rows} rows of {tokens} tokens"
    best = _preference(scores, always).topk(rows, dim=-2, sorted=False).indices
    return best.sort(dim=-2).values


def row_places(scores: Tensor, always: Tensor | None = None) -> Tensor:
    """Each token's place in the order in which its head keeps tokens, the first one 0.

    Args:
        scores: as in `top_rows`, which keeps the tokens whose place is below `rows`.
        always: the same.

    Returns:
        [..., tokens, heads] int64.
    """
    order = _preference(scores, always).argsort(dim=-2, descending=True)
    return order.argsort(dim=-2)


def _preference(scores: Tensor, always: Tensor | None) -> Tensor:
    """[..., tokens, heads] int64, larger for tokens that go first.

    No two of a head are equal, so that there is one answer, whatever a sort does.
    """
    rank = score_ranks(scores).long()
    if always is not None:
        rank = rank.masked_fill(always.unsqueeze(-1), _ABOVE_ALL)
    tokens = scores.shape[-2]
    return rank * tokens + torch.arange(tokens, device=scores.device).unsqueeze(-1)
