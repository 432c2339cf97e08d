"""Prefill attention on the GPU (interpreted where there is none) against the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tangram.kernels.reference.attend import attend
from tangram.kernels.segments import Segments, cut_step
from tangram.kernels.sizes import HOPPER_SHARED_BYTES, SMALL_SHARED_BYTES, shared_bytes
from tests.kernels.inputs import TOLERANCE, Pool, fill_step_chunks, make_geometry, make_pool
from tests.kernels.inputs import relative_error as error_of

pytest.importorskip("triton", reason="the kernel is written in Triton")

from tangram.kernels.prefill import (  # noqa: E402
    Blocks,
    choose_blocks,
    make_head_table,
    make_tiles,
    prefill_attention,
)

SMALL = Blocks(query_rows=32, key_rows=32, warps=4, stages=2)
"""Tiles for the interpreter, small enough for a few of everything."""


@dataclass(frozen=True)
class Case:
    """One step: `num_tokens` computed after it, of which the last `step_tokens` are its queries."""

    name: str
    num_tokens: Sequence[int]
    step_tokens: Sequence[int]
    pages: Sequence[Sequence[int]] = ((1, 3), (2, 4))
    layer: int = 1
    layout: dict[str, Any] = field(default_factory=dict)


CASES = [
    # Lengths 63, 111; steps of one query; a boundary at the first, a middle and the last query.
    Case("mixed", [63, 111, 64, 65, 200, 1, 129, 128], [63, 50, 1, 1, 140, 1, 65, 64]),
    Case("no window", [64, 111, 130], [1, 63, 66], layout={"window_size_tokens": 0}),
    Case("odd window", [97, 300, 222], [33, 111, 63], layout={"window_size_tokens": 33}),
    Case("widest window", [128, 191], [65, 63],
         layout={"window_size_tokens": 63, "n_sink_tokens": 1}),
    # Four pages are more than chunk 0 has: its rows begin late, here in the middle of a page.
    Case("all kept", [129, 63, 400], [20, 63, 17], pages=[[4]], layer=0,
         layout={"window_size_tokens": 21}),
    Case("one page", [500, 256], [9, 1], pages=[[1]], layer=0),
    Case("one query head", [111, 257], [63, 70], layout={"queries_per_kv_head": 1}),
    Case("three query heads", [111, 257], [63, 70], layout={"queries_per_kv_head": 3}),
    Case("sixteen query heads", [111, 195], [63, 4],
         layout={"queries_per_kv_head": 16, "num_kv_heads": 2}, pages=[[2, 3]], layer=0),
    Case("head size 128", [111, 257], [63, 7], layout={"head_size": 128}),
    Case("head size 256", [111, 257], [63, 7], layout={"head_size": 256}),
    Case("chunk of 240", [700, 241, 239], [130, 2, 70], pages=[[4, 15], [1, 7]],
         layout={"chunk_size_tokens": 240}),
    Case("several groups of one head", [300, 63], [77, 63], pages=[[3, 1, 4, 2]], layer=0),
    Case("budgets that no block of rows divides", [1024, 511], [65, 63], pages=[[5, 7], [3, 11]],
         layout={"chunk_size_tokens": 256, "window_size_tokens": 32}),
]  # fmt: skip

LARGE = [
    Case("chunks of 256", [5000, 8192, 1, 3333, 257], [5000, 1111, 1, 63, 2],
         pages=[[2, 9], [1, 16]], layout={"chunk_size_tokens": 256, "window_size_tokens": 32,
         "num_kv_heads": 8, "queries_per_kv_head": 4, "head_size": 128}),
    Case("chunks of 2048", [9001, 2048, 2047, 4097], [3001, 2048, 700, 1],
         pages=[[20, 70], [4, 128]], layout={"chunk_size_tokens": 2048, "window_size_tokens": 32,
         "num_kv_heads": 8, "queries_per_kv_head": 4, "head_size": 128}),
]  # fmt: skip


def make_step(
    case: Case, device: str, dtype: torch.dtype, seed: int
) -> tuple[Pool, Tensor, Segments]:
    """Pool, queries that lie beside keys and values as a model gives them, and segments."""
    geometry = make_geometry(case.pages, dtype=dtype, **case.layout)
    pool = make_pool(
        geometry, case.num_tokens, layer=case.layer, dtype=dtype, device=device, seed=seed,
        step_tokens=case.step_tokens,
    )  # fmt: skip
    fill_step_chunks(pool, case.step_tokens)
    query_start = np.concatenate([[0], np.cumsum(case.step_tokens)])
    segments, _ = cut_step(geometry, query_start, np.array(case.num_tokens))
    heads = geometry.num_query_heads
    query = pool.random(query_start[-1], heads + 4, geometry.head_size)[:, :heads]
    return pool, query, segments


def is_close(case: Case, device: str, dtype: torch.dtype, blocks: Blocks | None) -> bool:
    pool, query, segments = make_step(case, device, dtype, seed=3)
    got = run_kernel(pool, query, segments, blocks)
    expected = run_reference(pool, query, segments)
    return error_of(got, expected) < TOLERANCE[dtype]


def run_kernel(pool: Pool, query: Tensor, segments: Segments, blocks: Blocks | None) -> Tensor:
    geometry, device = pool.geometry, query.device
    blocks = blocks or choose_blocks(
        geometry.head_size, geometry.itemsize_bytes, shared_bytes(device)
    )
    tokens, heads, size = query.shape
    out = query.new_full((tokens, heads + 1, size), torch.nan)[:, :heads]
    prefill_attention(
        query,
        torch.from_numpy(make_tiles(segments, geometry, blocks)).to(device),
        pool.view(),
        head_table=torch.from_numpy(make_head_table(geometry, pool.layer)).to(device),
        softmax_scale=0.11,
        out=out,
        blocks=blocks,
    )
    return out


def run_reference(pool: Pool, query: Tensor, segments: Segments) -> Tensor:
    out = torch.full_like(query, torch.nan, dtype=torch.float32)
    attend(
        query,
        segments,
        pool.view(),
        geometry=pool.geometry,
        layer=pool.layer,
        softmax_scale=0.11,
        out=out,
    )
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_interpreted_it_agrees_with_the_reference(case):
    if torch.cuda.is_available():
        pytest.skip("with CUDA the kernel is compiled; the tests marked gpu take these cases")
    assert is_close(case, "cpu", torch.float32, SMALL)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES + LARGE, ids=lambda case: case.name)
def test_compiled_it_agrees_with_the_reference(case, dtype):
    assert is_close(case, "cuda", dtype, None)


def test_tiles_for_little_shared_memory_agree_with_the_reference(kernel_device):
    case = Case("head size 256", [111, 257], [63, 7], layout={"head_size": 256})
    dtype = torch.float32 if kernel_device == "cpu" else torch.bfloat16
    blocks = choose_blocks(256, 2, SMALL_SHARED_BYTES)
    assert blocks.query_rows < choose_blocks(256, 2, HOPPER_SHARED_BYTES).query_rows
    assert is_close(case, kernel_device, dtype, blocks)


@pytest.mark.gpu
def test_compiled_in_float32_it_agrees_with_the_reference():
    assert is_close(CASES[0], "cuda", torch.float32, None)


@pytest.mark.gpu
def test_blocks_far_apart_are_found():
    """Offsets beyond 2**31 elements, in both caches."""
    geometry = make_geometry(
        [[2, 3]], dtype=torch.bfloat16, chunk_size_tokens=64, num_kv_heads=2, head_size=128
    )
    pool = make_pool(geometry, [900], dtype=torch.bfloat16, device="cuda", step_tokens=[4])
    stride = 1 << 28  # elements from one block to the next
    first_raw = geometry.recent_start(896) // geometry.recent_block_tokens
    for block in (pool.sealed_table.max(), pool.recent_table[0, first_raw]):
        assert int(block) * stride >= 1 << 31
    base = pool.sealed_cache._base
    wide = torch.empty((len(base) - 1) * stride + base.shape[1], dtype=base.dtype, device="cuda")
    spread = wide.as_strided(base.shape, (stride, 1)).copy_(base)
    far = replace(
        pool,
        sealed_cache=like_in(pool.sealed_cache, spread, stride),
        recent_cache=like_in(pool.recent_cache, spread, stride),
    )
    segments, _ = cut_step(geometry, np.array([0, 4]), np.array([900]))
    query = pool.random(4, geometry.num_query_heads, geometry.head_size)
    assert torch.equal(
        run_kernel(far, query, segments, None), run_kernel(pool, query, segments, None)
    )


def like_in(view: Tensor, base: Tensor, block_stride: int) -> Tensor:
    """What `view` shows of its pool, of a pool with another block stride."""
    return torch.as_strided(
        base, view.shape, (block_stride, *view.stride()[1:]), view.storage_offset()
    )


def test_only_the_tokens_of_the_tiles_are_written(kernel_device):
    geometry = make_geometry([[1, 3]])
    pool = make_pool(geometry, [100, 70], step_tokens=[5, 6], device=kernel_device)
    segments, _ = cut_step(geometry, np.array([0, 5, 11]), np.array([100, 70]))
    query = pool.random(14, geometry.num_query_heads, geometry.head_size)  # 11 and padding
    last = segments.take(np.array([len(segments) - 1]))
    out = run_kernel(pool, query, last, SMALL)
    written = ~out.isnan().flatten(1).any(dim=1)
    first, count = int(last.first_query[0]), int(last.num_queries[0])
    assert written.nonzero().flatten().tolist() == list(range(first, first + count))
    nothing = segments.take(np.array([], dtype=np.int64))
    assert run_kernel(pool, query, nothing, SMALL).isnan().all()


@pytest.mark.parametrize("per_head", [1, 2, 3, 16])
def test_tiles_hold_every_query_once_and_the_heaviest_come_first(per_head):
    geometry = make_geometry([[1, 3]], queries_per_kv_head=per_head, window_size_tokens=21)
    num_tokens, step = np.array([63, 300, 128, 65]), np.array([63, 190, 1, 2])
    query_start = np.concatenate([[0], np.cumsum(step)])
    segments, _ = cut_step(geometry, query_start, num_tokens)
    tiles = make_tiles(segments, geometry, SMALL)
    C, W = geometry.chunk_size_tokens, geometry.window_size_tokens
    seen = []
    for request, first, count, position, sealed, raw_start, gathered in tiles.tolist():
        assert gathered == -1
        assert 1 <= count <= 32 // per_head
        assert sealed == position // C == (position + count - 1) // C
        assert raw_start == max(0, sealed * C - W)
        assert first - query_start[request] == position - (num_tokens - step)[request]
        seen += range(first, first + count)
    assert sorted(seen) == list(range(query_start[-1]))
    weight = tiles[:, 4] * C + tiles[:, 3]
    assert (np.diff(weight) <= 0).all()


def test_head_table_names_every_head_largest_first():
    geometry = make_geometry([[1, 3], [4, 2]], window_size_tokens=16)
    table = make_head_table(geometry, 1)
    assert sorted(table[:, 0].tolist()) == [0, 1, 2, 3]
    for head, first_page, pages, member, first_row, _ in table.tolist():
        group = next(i for i, h in enumerate(geometry.head_groups.heads[1]) if head in h)
        assert geometry.head_groups.heads[1][group][member] == head
        assert first_page == geometry.page_offsets[1][group]
        assert pages == geometry.head_groups.pages[1][group]
        assert first_row == geometry.first_row(1, group, 0)
    assert (np.diff(table[:, 2]) <= 0).all()


def test_the_divisor_divides_exactly():
    pages = list(range(1, 129))
    geometry = make_geometry([pages], num_kv_heads=len(pages), chunk_size_tokens=2048)
    table = make_head_table(geometry, 0).view(np.uint32).astype(np.uint64)
    rng = np.random.default_rng(0)
    for row in table:
        count, divisor = row[2], row[5]
        dividends = rng.integers(0, 2**24, size=1000, dtype=np.uint64)
        edges = dividends // count * count  # multiples and their lower neighbours are the hard ones
        for n in (dividends, edges, np.maximum(edges, 1) - np.uint64(1)):
            assert (2 * n * divisor >> np.uint64(32) == n // count).all()
