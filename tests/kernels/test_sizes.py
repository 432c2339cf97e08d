"""What launches take on a device: an H200's tiles, or smaller ones where there is less memory."""

from types import SimpleNamespace

import pytest
import torch

from tangram.kernels.prefill import Blocks, choose_blocks
from tangram.kernels.seal_decode.scorers import KERNELS, tiles_of
from tangram.kernels.sizes import (
    HOPPER_SHARED_BYTES,
    SMALL_SHARED_BYTES,
    powers_of_two,
    shared_bytes,
)

A100_SHARED_BYTES = 163 << 10
SIZES = [(C, D, itemsize) for C in (64, 256, 2048) for D in (64, 128, 256) for itemsize in (2, 4)]


def test_a_gpu_is_asked_for_its_shared_memory(monkeypatch):
    found = SimpleNamespace(shared_memory_per_block_optin=SMALL_SHARED_BYTES)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    shared_bytes.cache_clear()
    assert shared_bytes(torch.device("cuda", 0)) == SMALL_SHARED_BYTES
    assert shared_bytes(torch.device("cpu")) == HOPPER_SHARED_BYTES
    shared_bytes.cache_clear()


@pytest.mark.parametrize("memory", [HOPPER_SHARED_BYTES, A100_SHARED_BYTES])
def test_prefill_takes_the_tiles_of_an_h200_where_they_fit(memory):
    assert choose_blocks(64, 2, memory) == Blocks(128, 64, warps=4, stages=3)
    assert choose_blocks(128, 2, memory) == Blocks(128, 64, warps=8, stages=3)
    assert choose_blocks(256, 2, memory) == Blocks(128, 64, warps=8, stages=2)
    assert choose_blocks(256, 4, memory) == Blocks(64, 32, warps=8, stages=1)


def test_prefill_takes_smaller_tiles_of_large_heads_where_they_do_not():
    assert choose_blocks(256, 2, SMALL_SHARED_BYTES) == Blocks(64, 32, warps=4, stages=2)
    for head_size, itemsize in ((64, 2), (128, 2), (256, 4)):
        of_small = choose_blocks(head_size, itemsize, SMALL_SHARED_BYTES)
        assert of_small == choose_blocks(head_size, itemsize, HOPPER_SHARED_BYTES)


@pytest.mark.parametrize("name", KERNELS)
def test_sealing_holds_one_tile_less_where_two_do_not_fit(name):
    for sizes in SIZES:
        of_h200 = tiles_of(name, *sizes, HOPPER_SHARED_BYTES)
        assert tiles_of(name, *sizes, A100_SHARED_BYTES) == of_h200
        of_small = tiles_of(name, *sizes, SMALL_SHARED_BYTES)
        stages = min(2, of_h200.stages) if name in ("snap_kv", "tova") else of_h200.stages
        assert of_small == of_h200._replace(stages=stages)


@pytest.mark.parametrize(
    ("least", "most", "powers"),
    [(64, 1, [64]), (64, 64, [64]), (64, 65, [64, 128]), (1, 5, [1, 2, 4, 8])],
)
def test_powers_of_two_reach_what_is_asked_for(least, most, powers):
    assert powers_of_two(least, most) == powers
