"""Which recent blocks stay cached: few boundaries of a prompt, every one of an answer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tangram.vllm_plugin.core.managers import RecentManager
from tangram.vllm_plugin.core.specs import RecentSpec
from tests.kernels.inputs import make_geometry


def spec_of(chunk, window):
    geometry = make_geometry([[2, 2]], chunk_size_tokens=chunk, window_size_tokens=window)
    return RecentSpec.of(geometry.block_shape, torch.float32)


def mask(spec, start, end, interval, prompt_tokens, *further):
    return RecentManager.reachable_block_mask(
        start,
        end,
        spec.shape.chunk_size_tokens,
        spec,
        False,
        interval,
        (prompt_tokens - 1, *further),
        dcp_world_size=1,
    )


def expected(spec, block, interval, prompt_tokens, *further):
    """From the definition: the block holds a part of the window before a boundary that is kept."""
    shape = spec.shape
    C, W, R = shape.chunk_size_tokens, shape.window_size_tokens, spec.block_size
    boundary = (block * R // C + 1) * C
    in_window = (block + 1) * R > boundary - W
    kept = (
        boundary % interval == 0
        or any(boundary == tokens // C * C for tokens in (prompt_tokens - 1, *further))
        or boundary > prompt_tokens - 1
    )
    return in_window and kept


@given(st.data())
def test_windows_before_the_boundaries_that_are_kept(data):
    chunk = data.draw(st.sampled_from([64, 128, 256]))
    spec = spec_of(chunk, data.draw(st.sampled_from([1, 16, 32, 40])))
    interval = chunk * data.draw(st.integers(1, 5))
    prompt = data.draw(st.integers(1, 12 * chunk))
    junctions = data.draw(st.lists(st.integers(1, prompt), max_size=1))
    blocks = 16 * chunk // spec.block_size
    start = data.draw(st.integers(0, blocks))
    end = data.draw(st.integers(start, blocks))
    found = mask(spec, start, end, interval, prompt, *junctions)
    wanted = [expected(spec, block, interval, prompt, *junctions) for block in range(start, end)]
    assert (found or [True] * (end - start)) == wanted


def test_an_example():
    spec = spec_of(64, 32)
    assert spec.block_size == 32
    # Chunks of two blocks, the second of which holds the window. A prompt of 300 tokens ends in the
    # fifth chunk: its last boundary is at 256, and what comes behind is an answer.
    found = mask(spec, 0, 14, 192, 300)
    assert [b for b, kept in enumerate(found) if kept] == [5, 7, 9, 11, 13]


@pytest.mark.parametrize("chunk, interval", [(64, 4096), (256, 4096), (1008, 4032), (8192, 8192)])
def test_the_interval_is_whole_chunks(chunk, interval):
    geometry = make_geometry([[2, 2]], chunk_size_tokens=chunk)
    assert geometry.retention_interval_tokens == interval
