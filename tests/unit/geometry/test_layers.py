"""Which layers are compressed, and the ordinals by which they are known."""

import pytest

from tangram.errors import ConfigurationError
from tangram.geometry import LayerMap


def test_layers_one_and_three_of_four():
    layers = LayerMap((1, 3))
    assert [layers.ordinal(layer) for layer in range(5)] == [None, 0, None, 1, None]
    assert len(layers) == 2


def test_every_layer_is_its_own_ordinal():
    layers = LayerMap.every(3)
    assert [layers.ordinal(layer) for layer in range(4)] == [0, 1, 2, None]


@pytest.mark.parametrize("layers", [(), (3, 1), (1, 1), (-1, 0)])
def test_layers_that_are_none_or_out_of_order_are_refused(layers):
    with pytest.raises(ConfigurationError, match="layers to compress are"):
        LayerMap(layers)
