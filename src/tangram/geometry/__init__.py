"""Pure integers: which rows a head keeps, where they lie, and what a request holds."""

from tangram.geometry.block import BlockCount, BlockShape, TokenRange, check_chunk
from tangram.geometry.heads import HeadGroups
from tangram.geometry.layers import LayerMap
from tangram.geometry.layout import Geometry

__all__ = [
    "BlockCount",
    "BlockShape",
    "Geometry",
    "HeadGroups",
    "LayerMap",
    "TokenRange",
    "check_chunk",
]
