"""Which layers of a model are compressed, and the ordinals by which all else knows them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tangram.errors import ConfigurationError


@dataclass(frozen=True)
class LayerMap:
    """From a layer's place in its model to its ordinal among the compressed layers.

    Budgets, layouts, profiles, scores and kernels count compressed layers only, from 0. vLLM names
    layers by their place in the model. Where layers 1 and 3 of four are compressed, they are 0 and
    1, and layers 0 and 2 are none.

    Attributes:
        compressed: places of the compressed layers in the model, rising.

    Raises:
        ConfigurationError: no layers, or not in rising order.
    """

    compressed: tuple[int, ...]

    def __post_init__(self) -> None:
        layers = self.compressed
        if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0:
            raise ConfigurationError(
                f"layers to compress are {list(layers)}: expected places in the model, from 0, "
                "rising, at least one"
            )

    @classmethod
    def every(cls, num_layers: int) -> LayerMap:
        """All layers of a model that has so many."""
        return cls(tuple(range(num_layers)))

    def __len__(self) -> int:
        return len(self.compressed)

    @cached_property
    def _ordinals(self) -> dict[int, int]:
        return {layer: ordinal for ordinal, layer in enumerate(self.compressed)}

    def ordinal(self, model_layer: int) -> int | None:
        """The ordinal of a layer, by its place in the model; None if it is not compressed."""
        return self._ordinals.get(model_layer)
