"""Pure integers: which rows a head keeps, where they lie, and what a request holds."""

from tangram.geometry.heads import HeadGroups
from tangram.geometry.layout import BlockCount, Geometry, TokenRange, check_chunk

__all__ = ["BlockCount", "Geometry", "HeadGroups", "TokenRange", "check_chunk"]
