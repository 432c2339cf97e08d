"""What a value must be before it is believed, wherever it came from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from numbers import Real
from typing import Any

from tangram.errors import ProfileError
from tangram.printable import shown

MOST_TOKENS = 1 << 20
"""No chunk is longer."""
MOST_HEADS = 1 << 20
"""No model has more query heads in all; budgets are lists over heads."""


def whole_number(name: str, value: object, least: int = 1, most: int = 1 << 31) -> int:
    """The value, if it is a whole number in that range.

    Raises:
        ProfileError: it is not; begins with the name.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ProfileError(
            f"{name} must be >= {least} and <= {most}, a whole number, got {shown(value)}"
        )
    return value


def text(name: str, value: object) -> str:
    """The value, if it is a text.

    Raises:
        ProfileError: it is not; begins with the name.
    """
    if not isinstance(value, str):
        raise ProfileError(f"{name} must be a text, got {shown(value)}")
    return value


def rising_numbers(name: str, values: object) -> tuple[float, ...]:
    """The values, if they are finite numbers, each above the one before.

    Raises:
        ProfileError: they are not; begins with the name.
    """
    expected = ProfileError(f"{name} must be a list of numbers, got {shown(values)}")
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise expected
    if not all(isinstance(value, Real) and not isinstance(value, bool) for value in values):
        raise expected
    try:
        grid = tuple(map(float, values))
    except OverflowError:
        grid = (math.inf,)
    if not all(map(math.isfinite, grid)):
        raise ProfileError(f"{name} must be finite, got {shown(values)}")
    if any(low >= high for low, high in pairwise(grid)):
        raise ProfileError(f"{name} must increase, got {shown(grid)}")
    return grid


def json_object(name: str, value: object) -> dict[str, Any]:
    """The mapping as JSON gives it back: tuples are lists, keys are strings.

    Raises:
        ProfileError: it is none, or holds what JSON does not; begins with the name.
    """
    if not isinstance(value, Mapping):
        raise ProfileError(f"{name} must be an object, got {shown(value)}")
    try:
        return json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ProfileError(f"{name} must hold JSON values: {error}") from error
