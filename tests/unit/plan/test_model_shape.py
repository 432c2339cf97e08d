"""Layers and heads as a value of their own."""

import pytest

from tangram.errors import ConfigurationError
from tangram.plan.compression_plan import make_plan
from tangram.plan.model_shape import ModelShape
from tangram.plan.options import CompressionOptions
from tangram.profile import ModelIdentity

MODEL = ModelIdentity("M", 2, 4, 8, 64, 512, 100)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((0, 4, 8, 64), "num_layers is 0"),
        ((2, 4, 8, 64.0), "head_size is 64.0"),
        ((2, True, 8, 64), "num_kv_heads is True"),
        ((2, 4, -8, 64), "num_query_heads is -8"),
        ((2, 3, 8, 64), "8 query heads, no multiple of its 3 KV heads"),
    ],
)
def test_sizes_that_make_no_model_are_refused(sizes, said):
    with pytest.raises(ConfigurationError, match=said):
        ModelShape(*sizes)


def test_a_plan_is_of_the_shape_that_is_given_or_the_models_own():
    own = make_plan(CompressionOptions(), MODEL, 2).geometry
    assert (own.num_layers, own.num_kv_heads, own.num_query_heads, own.head_size) == (2, 4, 8, 64)
    assert own == make_plan(CompressionOptions(), MODEL, 2, ModelShape.of(MODEL)).geometry
    other = make_plan(CompressionOptions(), MODEL, 2, ModelShape(3, 2, 6, 32)).geometry
    found = (other.num_layers, other.num_kv_heads, other.num_query_heads, other.head_size)
    assert found == (3, 2, 6, 32)
