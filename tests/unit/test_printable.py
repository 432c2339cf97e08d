"""Text of others on a terminal: shown, and not obeyed."""

import pytest

from tangram.errors import TangramError, TextError
from tangram.printable import cut, one_line, printable, printable_json, shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain [bold] text", "plain [bold] text"),
        ("\x1b[2J\x07", "\\x1b[2J\\x07"),
        ("a\nb\r\tc\x00\x7f\x9b", "a\\nb\\r\\tc\\x00\\x7f\\x9b"),
        ("\ud800x\udfff", "\\ud800x\\udfff"),
        ("abc\u202edcba\u2066", "abc\\u202edcba\\u2066"),
        ("\u00fc \u4f60\u3000\u597d \U0001f600", "\u00fc \u4f60\u3000\u597d \U0001f600"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text, expected):
    assert printable(text) == expected
    assert printable(expected) == expected
    expected.encode()


def test_lines_become_one():
    assert one_line("first\n  second\r\nthird\u2028fourth\x1b") == "first second third fourth\\x1b"


def test_what_is_long_is_cut():
    assert cut("x" * 10, 4) == "xxxx..." and cut("xxxx", 4) == "xxxx"
    assert len(shown("x" * 10_000)) < 100 and len(shown([list(range(1000))] * 1000)) < 500
    assert shown("a\x1b") == "'a\\x1b'"


def test_every_text_of_a_value_becomes_printable():
    value = {"a\x1b": ["b\n", ("\ud800", 1, None, 0.5, True)]}
    assert printable_json(value) == {"a\\x1b": ["b\\n", ["\\ud800", 1, None, 0.5, True]]}


def test_every_error_of_ours_is_one_printable_line():
    assert str(TangramError("a\nb\x1b[31m\ud800")) == "a b\\x1b[31m\\ud800"
    assert str(TextError("file\x07", "odd")).startswith("file\\x07: odd")
