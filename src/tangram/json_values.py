"""The values of a JSON text, lines or one array, each with the line that it begins in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


class NotJSONError(ValueError):
    """A line of the text is not JSON.

    Args:
        line: its number, counted from 1.
        reason: what is wrong with it.
    """

    def __init__(self, line: int, reason: object) -> None:
        self.line = line
        super().__init__(str(reason))


def json_values(text: str) -> Iterator[tuple[int, Any]]:
    """(line, value) of each value, in order; empty lines are passed over.

    Args:
        text: one value a line, or an array of values, which begins with a bracket.

    Raises:
        NotJSONError: a line is not JSON, or something follows the array.
    """
    yield from _array(text) if text.lstrip()[:1] == "[" else _lines(text)


def _lines(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise NotJSONError(number, error) from error


def _array(text: str) -> Iterator[tuple[int, Any]]:
    decoder = json.JSONDecoder()
    position, line = text.index("[") + 1, 1
    counted = 0
    while True:
        while text[position : position + 1] in (" ", "\t", "\r", "\n", ","):
            position += 1
        line += text.count("\n", counted, position)
        counted = position
        if text[position : position + 1] == "]":
            break
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise NotJSONError(line, error) from error
        yield line, value
    rest = text[position + 1 :]
    if rest.strip():
        line += rest[: len(rest) - len(rest.lstrip())].count("\n")
        raise NotJSONError(line, "something follows the array, and nothing of it would be read")
