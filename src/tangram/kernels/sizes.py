"""Sizes that kernels and their buffers are given; needs no Triton."""

from __future__ import annotations

import functools
from typing import Any

import torch

HEAD_SIZES = (64, 128, 256)
"""Elements of a head that the attention kernels are built for."""
HOPPER_SHARED_BYTES = 227 << 10
"""Shared memory that a block of threads can have on an H200, where tiles were measured."""
SMALL_SHARED_BYTES = 99 << 10
"""The same on compute capabilities 8.6, 8.9 and 12; 8.0 has 163 KiB, between the two."""


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that a block of threads can have; an H200's on what is no GPU."""
    if device.type != "cuda":
        return HOPPER_SHARED_BYTES
    properties: Any = torch.cuda.get_device_properties(device)  # typed without this attribute
    return int(properties.shared_memory_per_block_optin)


def powers_of_two(least: int, most: int) -> list[int]:
    """The power of two `least`, and each further one, to the first that is no less than `most`."""
    exponents = range(least.bit_length() - 1, max(least, power_of_two(most)).bit_length())
    return [1 << exponent for exponent in exponents]


def power_of_two(count: int) -> int:
    """The least power of two that is no less than `count`, from 1; Triton's own is slow."""
    return 1 << (count - 1).bit_length()
