"""Types and checks of arguments that several subcommands take."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import NoReturn, TypeVar

from tangram.errors import ConfigurationError

Number = TypeVar("Number", int, float)

_SUFFIXES = {"K": 1 << 10, "M": 1 << 20}
_MOST_TOKENS = 1 << 40


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line with the remedy, as those of any other mistake are."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigurationError."""
        raise ConfigurationError(f"{message} ({self.prog} --help lists the options)")


def count(text: str) -> int:
    """A whole number from 1."""
    value = _number(int, text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    value = _number(float, text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return value


def share(text: str) -> float:
    """A share of all rows."""
    value = _number(float, text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: give a share above 0 and at most 1")
    return value


def ratios(text: str) -> tuple[float, ...]:
    """Shares of the rows that are kept, separated by commas."""
    values = tuple(_number(float, part) for part in text.split(","))
    if not all(0 < value <= 1 for value in values):
        raise argparse.ArgumentTypeError(
            f"{text}: expected ratios above 0 and at most 1, separated by commas"
        )
    return values


def tokens(text: str) -> int:
    """A number of tokens from 1: 4096, or 4K; 1K is 1,024 of them and 1M is 1,024K."""
    value, *more = _tokens(text)
    if more or not value:
        raise argparse.ArgumentTypeError(
            f"{text}: expected a number of tokens of at least 1, such as 4096 or 4K"
        )
    return value


def lengths(text: str) -> tuple[int, ...]:
    """Numbers of tokens as `tokens` takes them, separated by commas."""
    values = _tokens(text)
    if not all(values):
        raise argparse.ArgumentTypeError(
            f"{text}: expected lengths of at least 1, separated by commas, such as 4096,32K,1M"
        )
    return values


def _tokens(text: str) -> tuple[int, ...]:
    """The numbers, with 0 for each that is none."""
    found = []
    for part in map(str.strip, text.split(",")):
        unit = _SUFFIXES.get(part[-1:].upper(), 1)
        value = unit * _number(int, part[:-1] if unit > 1 else part)
        found.append(value if 1 <= value <= _MOST_TOKENS else 0)
    return tuple(found)


def _number(kind: type[Number], text: str) -> Number:
    """The number, or 0, which no argument may be, for what is none."""
    try:
        return kind(text)
    except ValueError:
        return kind(0)


def check_output(option: str, path: Path | None, *inputs: Path | str | None) -> None:
    """Refuse a file that could not be written at the end, or that is read first.

    Args:
        option: that names the file.
        path: the file; None where the option is not given.
        inputs: files that the command reads, which writing would destroy.

    Raises:
        ConfigurationError: a folder, no folder to write it to, no right to, or one of the inputs.
    """
    if path is None:
        return
    folder = path.resolve().parent
    reason = None
    if path.is_dir():
        reason = "it is a folder: name a file in it"
    elif not folder.is_dir():
        reason = f"there is no folder {folder}: make it first, or name another"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        reason = "there is no permission to: name another file"
    elif any(given and Path(given).exists() and path.resolve() == Path(given).resolve()
             for given in inputs):  # fmt: skip
        reason = "it is what is read, and would be lost: name another file"
    if reason:
        raise ConfigurationError(f"{option} {path} cannot be written: {reason}")
