"""The arrays of a profile: their names, shapes, and the values that they can have."""

from __future__ import annotations

import math

import numpy as np

from tangram.errors import ProfileError
from tangram.profile.identity import ModelIdentity

MASS_CURVE = "mass_curve"
ERROR_CURVE = "error_curve"
QUERY_MEAN = "query_mean"
QUERY_COVARIANCE = "query_covariance"
ROPE_FREQUENCIES = "rope_frequencies"
ROW_WEIGHTS = "row_weights"


def threshold_share(scope: str) -> str:
    """Name of the array of threshold shares of a scope, `crosslayer` or `perlayer`."""
    return f"threshold_share/{scope}"


SAMPLE_AXES = {
    threshold_share("crosslayer"): 1,
    threshold_share("perlayer"): 1,
    MASS_CURVE: 0,
    ERROR_CURVE: 0,
}
"""Which axis of an array is over samples."""
_NOISE = 1e-3
"""By so much a statistic may leave its range, or fall: sums of shares are rounded."""
_RANGES = {
    threshold_share("crosslayer"): (0.0, 1.0),
    threshold_share("perlayer"): (0.0, 1.0),
    MASS_CURVE: (0.0, 1.0),
    ERROR_CURVE: (0.0, math.inf),
    QUERY_COVARIANCE: (0.0, math.inf),  # of its diagonal, the variances
}


def stored_dtype(name: str) -> np.dtype:
    """Dtype of a known array."""
    return np.dtype(np.float64 if name == ROPE_FREQUENCIES else np.float32)


def known_shape(
    name: str, model: ModelIdentity, num_ratios: int, num_shares: int
) -> tuple[int | None, ...] | None:
    """Shape that an array of this name must have (None: any size), or None for other names."""
    layers, kv_heads = model.num_layers, model.num_kv_heads
    queries, size = model.num_query_heads, model.head_size
    return {
        threshold_share("crosslayer"): (num_ratios, None, layers, kv_heads),
        threshold_share("perlayer"): (num_ratios, None, layers, kv_heads),
        MASS_CURVE: (None, layers, kv_heads, num_shares),
        ERROR_CURVE: (None, layers, kv_heads, num_shares),
        QUERY_MEAN: (layers, queries, size),
        QUERY_COVARIANCE: (layers, queries, size, size),
        ROPE_FREQUENCIES: (None,),
        ROW_WEIGHTS: (layers, kv_heads, 2 * size + 4),
    }.get(name)


def checked(name: str, array: np.ndarray, shape: tuple[int | None, ...]) -> np.ndarray:
    """A known array in its dtype.

    Args:
        name: its name.
        array: the values.
        shape: what `known_shape` gives.

    Raises:
        ProfileError: another shape, or values that the statistic cannot have.
    """
    fits = len(shape) == array.ndim and all(
        want in (None, have) for want, have in zip(shape, array.shape, strict=True)
    )
    if not fits or array.size == 0:
        raise ProfileError(
            f"profile: {name} must have shape {shape} (None: any size), none of them zero, got "
            f"{array.shape}"
        )
    if array.dtype.kind not in "fiu":
        raise ProfileError(f"profile: {name} must hold numbers, got {array.dtype}")
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        array = array.astype(stored_dtype(name))
    if not np.isfinite(array).all():
        raise ProfileError(f"profile: {name} holds values that are not finite")
    least, most = _RANGES.get(name, (-math.inf, math.inf))
    bounded = np.diagonal(array, axis1=-2, axis2=-1) if name == QUERY_COVARIANCE else array
    if bounded.min() < least - _NOISE or bounded.max() > most + _NOISE:
        raise ProfileError(
            f"profile: {name} must lie between {least:g} and {most:g}, got {bounded.min():g} to "
            f"{bounded.max():g}"
        )
    if name == MASS_CURVE and (np.diff(array) < -_NOISE).any():
        raise ProfileError(f"profile: {name} falls, and more rows never hold less attention")
    return array
