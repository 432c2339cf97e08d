"""Sizes that kernels and their buffers are given; needs no Triton."""

HEAD_SIZES = (64, 128, 256)
"""Elements of a head that the attention kernels are built for."""


def power_of_two(count: int) -> int:
    """The least power of two that is no less than `count`, from 1; Triton's own is slow."""
    return 1 << (count - 1).bit_length()
