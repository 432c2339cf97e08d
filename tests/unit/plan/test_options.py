"""Options of compression from a dict."""

import pytest

from tangram.errors import ConfigurationError
from tangram.plan.options import CompressionOptions


def test_the_known_options_are_told_in_order():
    with pytest.raises(ConfigurationError, match="unknown compression option ratio") as error:
        CompressionOptions.from_mapping({"ratio": 0.5})
    known = str(error.value).partition("known are ")[2].split(", ")
    assert known == sorted(known) and "compression_ratio" in known
