"""Numbers of tokens as they are typed."""

import argparse

import pytest

from tangram.arguments import Parser, lengths, tokens
from tangram.errors import ConfigurationError


def test_numbers_of_tokens_may_have_a_suffix():
    assert [tokens(text) for text in ("7", "4K", "4k", "1M")] == [7, 4096, 4096, 1 << 20]
    assert lengths("4096, 32K,1m") == (4096, 32768, 1 << 20)


@pytest.mark.parametrize(
    "text", ["", "K", "0", "-1", "0K", "4.5K", "4G", "4KK", "x", "9" * 5000, "99999999999M"]
)
def test_what_is_no_number_of_tokens_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="such as 4096 or 4K"):
        tokens(text)
    for several in (text, f"4K,{text}"):
        with pytest.raises(argparse.ArgumentTypeError, match="separated by commas"):
            lengths(several)
    with pytest.raises(argparse.ArgumentTypeError):
        tokens("4K,8K")


def test_a_mistake_raises_and_prints_nothing(capsys):
    parser = Parser(prog="tangram thing")
    parser.add_argument("--size", type=tokens)
    with pytest.raises(ConfigurationError, match="--size: many: expected.*tangram thing --help"):
        parser.parse_args(["--size", "many"])
    assert capsys.readouterr() == ("", "")
