"""A mistake in what was asked of a serving benchmark: told in one line, with exit code 2."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

from tangram.arguments import check_output
from tangram.errors import ConfigurationError, TangramError

MISTAKEN = 2
P = ParamSpec("P")


def tells_mistakes(main: Callable[P, int]) -> Callable[P, int]:
    """A command that tells a TangramError in one line instead of raising it."""

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except TangramError as error:
            message = " ".join(str(error).split())
            print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
            return MISTAKEN

    return run


def existing_file(text: str) -> Path:
    """The type of an argument that names a file to be read; absolute."""
    path = Path(text).resolve()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text}: there is no such file")
    return path


def output_file(text: str) -> Path:
    """The type of an argument that names a file to be written; absolute."""
    path = Path(text).resolve()
    try:
        check_output("the file", path)
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path
