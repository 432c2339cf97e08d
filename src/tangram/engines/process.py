"""Engines in this process, for those who look inside."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SWITCH = "VLLM_ENABLE_V1_MULTIPROCESSING"
"""vLLM's variable that says whether an engine gets a process of its own."""


@contextmanager
def in_this_process() -> Iterator[None]:
    """An engine made inside lives in this process: hooks reach a model only where it lives."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before


def free_memory() -> None:
    """Give back what an engine held that was shut down and is referred to no more.

    Engines are full of cycles, and the next one asks the device for memory, not torch.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
