"""The numbers of a model that a layout is made of."""

from __future__ import annotations

from dataclasses import dataclass, fields

from tangram.errors import ConfigurationError
from tangram.profile import ModelIdentity


@dataclass(frozen=True)
class ModelShape:
    """Layers and heads of a model, alike in every layer.

    Attributes:
        num_layers: attention layers.
        num_kv_heads: KV heads of a layer.
        num_query_heads: query heads of a layer.
        head_size: elements of one head's key, and of its value.
    """

    num_layers: int
    num_kv_heads: int
    num_query_heads: int
    head_size: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError(
                    f"the model's {field.name} is {value!r}: a whole number of 1 or more is needed"
                )
        if self.num_query_heads % self.num_kv_heads:
            raise ConfigurationError(
                f"the model has {self.num_query_heads} query heads, no multiple of its "
                f"{self.num_kv_heads} KV heads: use a model with grouped or plain attention"
            )

    @classmethod
    def of(cls, model: ModelIdentity) -> ModelShape:
        """The shape of a model by its config."""
        return cls(**{field.name: getattr(model, field.name) for field in fields(cls)})

    def __str__(self) -> str:
        return (
            f"{self.num_layers} layers of {self.num_kv_heads} KV and {self.num_query_heads} query "
            f"heads of {self.head_size}"
        )
