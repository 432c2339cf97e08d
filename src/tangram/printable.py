"""Text of others, made fit to be printed: nothing in it moves a cursor or ends a line."""

from __future__ import annotations

import re
import reprlib
from typing import Any

# Control characters, halves of surrogate pairs (which no encoding takes), and what turns the
# direction of all that follows.
_OBEYED = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: object) -> str:
    """The text with what a terminal would obey, line breaks among it, as escapes."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def one_line(text: str) -> str:
    """The text with its lines joined by spaces, and made printable."""
    return printable(" ".join(line.strip() for line in text.splitlines()))


def shown(value: object) -> str:
    """A value in a message: as Python writes it, with the middle of what is long left out."""
    return printable(reprlib.repr(value))


def cut(text: object, most: int) -> str:
    """The text made printable, at most `most` characters of it and a mark that there were more."""
    whole = str(text)
    return printable(whole[:most]) + "..." * (len(whole) > most)


def printable_json(value: Any) -> Any:
    """A JSON value of which every string, keys included, is printable."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(name): printable_json(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [printable_json(each) for each in value]
    return value
