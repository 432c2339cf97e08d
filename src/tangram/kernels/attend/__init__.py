"""Attention over the rows that every head kept of the sealed chunks, and over the raw tokens."""

from tangram.kernels.attend.reference import attend

__all__ = ["attend"]
