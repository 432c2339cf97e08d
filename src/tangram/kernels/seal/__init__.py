"""Writing the rows that were chosen of a chunk to their pages."""

from tangram.kernels.seal.reference import pack

__all__ = ["pack"]
