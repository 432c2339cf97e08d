"""The published statistic: each head's share of the tokens above one threshold for all heads."""

from __future__ import annotations

import numpy as np


def threshold_shares(ranks: np.ndarray, ratios: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Shares under a threshold over the heads of all layers, and over those of each layer.

    Args:
        ranks: [layers, kv_heads, tokens] integers that order the tokens of one sample.
        ratios: shares of all tokens that are to be above the threshold.

    Returns:
        (crosslayer, perlayer), each [ratios, layers, kv_heads] float64.

    Source: arXiv 2606.06302; docs/design.md section 5.
    """
    layers, heads, tokens = ranks.shape
    ordered = np.sort(ranks, axis=-1)
    cross = shares_above(ordered.reshape(layers * heads, tokens), ratios)
    per = np.stack([shares_above(layer, ratios) for layer in ordered], axis=1)
    return cross.reshape(len(ratios), layers, heads), per


def shares_above(ordered: np.ndarray, ratios: tuple[float, ...]) -> np.ndarray:
    """Share of each head's tokens that are among the best of all heads'.

    Tokens that are just at the threshold count for the same part in every head, so that the
    shares' mean is the ratio exactly.

    Args:
        ordered: [heads, tokens] integers, ascending in every row.
        ratios: shares of all tokens that are kept.

    Returns:
        [ratios, heads] float64.
    """
    heads, tokens = ordered.shape
    pool = np.sort(ordered, axis=None)
    shares = np.empty((len(ratios), heads))
    for index, ratio in enumerate(ratios):
        kept = ratio * pool.size
        threshold = pool[-min(pool.size, max(1, int(np.ceil(kept))))]
        above = np.array([tokens - np.searchsorted(row, threshold, "right") for row in ordered])
        from_it = np.array([tokens - np.searchsorted(row, threshold, "left") for row in ordered])
        part = (kept - above.sum()) / (from_it - above).sum()
        shares[index] = (above + part * (from_it - above)) / tokens
    return shares
