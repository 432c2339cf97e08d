"""How many heads share a budget where nobody says so."""

import pytest

from tangram.errors import ConfigurationError
from tangram.plan.compression_plan import group_size
from tangram.plan.options import CompressionOptions


@pytest.mark.parametrize(
    "heads, size", [(1, 1), (2, 1), (3, 1), (4, 2), (6, 2), (8, 4), (12, 4), (16, 4), (40, 4)]
)
def test_a_layer_has_two_groups_at_least(heads, size):
    assert group_size(CompressionOptions(), heads) == size


def test_the_size_that_is_asked_for_divides_the_heads():
    assert group_size(CompressionOptions(page_group_size=4), 4) == 4
    with pytest.raises(ConfigurationError, match="1, 2, 4"):
        group_size(CompressionOptions(page_group_size=3), 4)
