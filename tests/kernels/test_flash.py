"""The sealed part of prefill on FlashAttention, or its contract in torch, and what follows it."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from tangram.kernels.flash import (
    SealedStep,
    SealedWorkspace,
    attend_sealed,
    fits,
    head_pages,
    sealed_pairs,
)
from tangram.kernels.segments import Segments, cut_step
from tangram.kernels.sizes import shared_bytes
from tests.kernels.inputs import TOLERANCE, Pool, make_geometry, make_pool
from tests.kernels.inputs import relative_error as error_of
from tests.kernels.paged_attention import paged_attention

pytest.importorskip("triton", reason="the kernels are written in Triton")

from tangram.kernels.flash.kernel import gather  # noqa: E402
from tangram.kernels.prefill import (  # noqa: E402
    Blocks,
    choose_blocks,
    make_head_table,
    make_tiles,
    prefill_attention,
)
from tests.kernels import test_prefill as steps  # noqa: E402
from tests.kernels.test_prefill import LARGE, SMALL, Case, like_in, run_reference  # noqa: E402

# Layer 1 of the default budgets keeps 2 and 4 pages, of which chunk 0 fills 3: rows begin late.
CASES = [
    Case("mixed", [63, 111, 64, 65, 200, 1, 129, 128], [63, 50, 1, 1, 140, 1, 65, 64]),
    Case("nothing sealed but one", [63, 40, 65], [63, 3, 1]),
    Case("one query head", [111, 257], [63, 70], layout={"queries_per_kv_head": 1}),
    Case("four query heads", [257, 130], [70, 130], pages=[[2, 3]], layer=0,
         layout={"queries_per_kv_head": 4, "num_kv_heads": 2}),
    Case("seven query heads", [211], [63], pages=[[2, 3]], layer=0,
         layout={"queries_per_kv_head": 7, "num_kv_heads": 2}),
    Case("head size 128", [111, 193], [63, 7], layout={"head_size": 128}),
    Case("head size 256", [111, 193], [63, 7], layout={"head_size": 256}),
    Case("no window", [130], [66], layout={"window_size_tokens": 0}),
    Case("all kept, most of chunk 0 is window", [400], [17], pages=[[4]], layer=0,
         layout={"window_size_tokens": 48}),
    Case("several groups of one head", [300, 63], [77, 63], pages=[[3, 1, 4, 2]], layer=0),
    Case("budgets that no block of rows divides", [1024], [65], pages=[[5, 7], [3, 11]],
         layout={"chunk_size_tokens": 256, "window_size_tokens": 32}),
]  # fmt: skip


def make_step(case: Case, device: str, dtype: torch.dtype) -> tuple[Pool, Tensor, Segments]:
    """See `test_prefill.make_step`; of a layout that FlashAttention can page."""
    made = steps.make_step(case, device, dtype, seed=5)
    assert fits(made[0].geometry)
    return made


def head_table(pool: Pool) -> Tensor:
    table = make_head_table(pool.geometry, pool.layer)
    return torch.from_numpy(table).to(pool.sealed_cache.device)


def run(
    pool: Pool, query: Tensor, segments: Segments, blocks: Blocks | None, attention=paged_attention
) -> Tensor:
    """Both parts; the second is given NaN for every sealed row, to prove that it needs none."""
    geometry, device = pool.geometry, query.device
    blocks = blocks or choose_blocks(
        geometry.head_size, geometry.itemsize_bytes, shared_bytes(device)
    )
    step = SealedStep.make(geometry, segments, device)
    part = attend_sealed(
        query, step, pool.view(), head_table=head_table(pool),
        softmax_scale=0.11, attention=attention, workspace=SealedWorkspace(device),
    )  # fmt: skip
    tiles = make_tiles(segments, geometry, blocks, step.first_gathered)
    out = torch.full_like(query, torch.nan)
    prefill_attention(
        query,
        torch.from_numpy(tiles).to(device),
        pool.view()._replace(
            sealed=torch.full_like(pool.sealed_cache[:1], torch.nan).expand_as(pool.sealed_cache),
            sealed_table=torch.zeros_like(pool.sealed_table),
        ),
        head_table=head_table(pool),
        softmax_scale=0.11,
        out=out,
        blocks=blocks,
        sealed_part=part,
    )
    return out


def error(case: Case, device: str, dtype: torch.dtype, blocks: Blocks | None, **options) -> float:
    step = make_step(case, device, dtype)
    return error_of(run(*step, blocks, **options), run_reference(*step))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_interpreted_both_parts_agree_with_the_reference(case):
    if torch.cuda.is_available():
        pytest.skip("with CUDA the kernels are compiled; the tests marked gpu take these cases")
    assert error(case, "cpu", torch.float32, SMALL) < TOLERANCE[torch.float32]


@pytest.fixture(scope="module")
def flash_attention():
    """Of a layout, and a type: vLLM's, as a worker finds it."""
    pytest.importorskip("vllm", reason="FlashAttention 3 is vLLM's")
    from tangram.vllm_plugin.worker.runners.flash import find_flash_attention

    def find(geometry, dtype):
        found = find_flash_attention(geometry, dtype, torch.device("cuda"))
        if found is None:
            pytest.skip("vLLM has no FlashAttention 3 for this device and type")
        return found

    return find


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES + LARGE, ids=lambda case: case.name)
def test_with_flash_attention_both_parts_agree_with_the_reference(case, dtype, flash_attention):
    all_there = (dtype, case.layout.get("head_size", 64) > 128) == (torch.bfloat16, False)
    if not all_there and "TANGRAM_TEST_ALL_FLASH" not in os.environ:
        pytest.skip("a build without such kernels would end the process: TANGRAM_TEST_ALL_FLASH=1")
    attention = flash_attention(make_geometry(case.pages, dtype=dtype, **case.layout), dtype)
    assert error(case, "cuda", dtype, None, attention=attention) < TOLERANCE[dtype]


@pytest.mark.gpu
def test_with_flash_attention_blocks_far_apart_are_found(flash_attention):
    """Offsets beyond 2**31 elements."""
    layout = {"num_kv_heads": 2, "head_size": 128}
    case = Case("far apart", [900], [4], pages=[[2, 3]], layer=0, layout=layout)
    pool, query, segments = make_step(case, "cuda", torch.bfloat16)
    stride = 1 << 28  # elements from one block to the next
    assert int(pool.sealed_table.max()) * stride >= 1 << 31
    base = pool.sealed_cache._base
    wide = torch.empty((len(base) - 1) * stride + base.shape[1], dtype=base.dtype, device="cuda")
    spread = wide.as_strided(base.shape, (stride, 1)).copy_(base)
    far = replace(pool, sealed_cache=like_in(pool.sealed_cache, spread, stride))
    attention = flash_attention(pool.geometry, torch.bfloat16)
    got, expected = (run(p, query, segments, None, attention) for p in (far, pool))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sequences_are_those_of_the_layout(case, kernel_device):
    """Page by page, from the geometry's own arithmetic; and every query at its head's place."""
    pool, query, segments = make_step(case, kernel_device, torch.float32)
    g, table = pool.geometry, head_table(pool)
    step = SealedStep.make(g, segments, kernel_device)
    count, per = len(step.segments), g.queries_per_kv_head
    gathered = query.new_full((g.num_kv_heads * step.num_queries, per, g.head_size), torch.nan)
    pages = torch.full((g.num_kv_heads * count, step.max_pages), -1, dtype=torch.int32)
    pages = pages.to(kernel_device)
    rows = torch.full((g.num_kv_heads * count,), -1, dtype=torch.int32, device=kernel_device)
    gather(query, step, pool.view(), table, gathered=gathered, pages=pages, rows=rows)
    place = {
        head: (group, member)
        for group, heads in enumerate(g.head_groups.heads[pool.layer])
        for member, head in enumerate(heads)
    }
    block_pages = pool.sealed_cache.stride(0) // (g.page_size_rows * g.row_elements)
    starts, sequence = step.starts.tolist(), 0
    for head in table[:, 0].tolist():
        group, member = place[head]
        offsets = np.arange(g.head_groups.pages[pool.layer][group]) * g.page_group_size + member
        offsets += g.page_offsets[pool.layer][group] * g.page_group_size
        skipped = g.first_row(pool.layer, group, 0) // g.page_size_rows
        for request, first, queries, chunks, _ in step.segments.tolist():
            blocks = pool.sealed_table[request, :chunks].cpu().numpy()
            expected = (blocks[:, None] * block_pages + offsets).reshape(-1)[skipped:].tolist()
            got = pages[sequence].tolist()
            assert got[: len(expected)] == expected
            assert set(got[len(expected) :]) <= {-1}, "entries past a sequence's pages are kept"
            assert int(rows[sequence]) == sum(
                g.kept_rows(pool.layer, group, chunk) for chunk in range(chunks)
            )
            mine = query[first : first + queries, head * per : (head + 1) * per]
            assert torch.equal(gathered[starts[sequence] : starts[sequence + 1]], mine)
            sequence += 1
    assert sequence == len(rows) and starts[-1] == len(gathered)


def test_a_step_has_the_segments_with_sealed_rows_most_chunks_first():
    geometry = make_geometry([[1, 3]])
    segments, _ = cut_step(geometry, np.array([0, 63, 253, 254]), np.array([63, 300, 65]))
    step = SealedStep.make(geometry, segments, "cpu")
    seen = {}
    for request, first, count, chunks, gathered in step.segments.tolist():
        assert chunks > 0
        seen[first] = gathered
        assert step.max_queries >= count
        assert request == (0 if first < 63 else 1 if first < 253 else 2)
    assert (np.diff(step.segments[:, 3]) <= 0).all()
    sealed = segments.position >= geometry.chunk_size_tokens
    assert seen == dict(zip(segments.first_query[sealed], step.first_gathered[sealed], strict=True))
    assert (step.first_gathered[~sealed] == -1).all()
    assert step.num_queries == segments.num_queries[sealed].sum()
    assert step.max_pages == 4 * 3


def test_tiles_of_gathered_queries_know_where_they_are_and_weigh_their_raw_rows():
    geometry = make_geometry([[1, 3]], queries_per_kv_head=3)
    segments, _ = cut_step(geometry, np.array([0, 63, 253]), np.array([63, 300]))
    step = SealedStep.make(geometry, segments, "cpu")
    tiles = make_tiles(segments, geometry, SMALL, step.first_gathered)
    owner = np.searchsorted(segments.first_query, tiles[:, 1], side="right") - 1
    skipped = tiles[:, 1] - segments.first_query[owner]
    sealed = tiles[:, 4] > 0
    assert sealed.any() and not sealed.all()
    assert (tiles[sealed, 6] == (step.first_gathered[owner] + skipped)[sealed]).all()
    assert (tiles[~sealed, 6] == -1).all()
    assert (np.diff(tiles[:, 3] - tiles[:, 5]) <= 0).all()


def test_pairs_are_counted_over_the_query_heads_of_a_mean_layer():
    geometry = make_geometry([[1, 3], [2, 4]], queries_per_kv_head=3)  # a mean of 5 pages a chunk
    segments, _ = cut_step(geometry, np.array([0, 64, 96]), np.array([192, 160]))
    # 64 queries after 2 chunks and 32 after 2; two heads of a group, pages of 16 rows.
    assert sealed_pairs(geometry, segments) == (64 + 32) * 2 * (5 * 2 * 16) * 3


@pytest.mark.parametrize(
    ("window", "fit"), [(0, True), (16, True), (48, True), (21, False), (8, False)]
)
def test_rows_of_chunk_0_must_begin_with_a_page(window, fit):
    assert fits(make_geometry([[1, 4]], window_size_tokens=window)) == fit


def test_head_pages_are_the_pages_of_the_pool_by_number():
    pool = make_pool(make_geometry([[1, 3], [2, 4]]), [200], layer=1)
    cache = pool.sealed_cache
    keys, values = head_pages(cache)
    assert keys.data_ptr() == cache.data_ptr()
    block, page, member = (stride // (16 * 128) for stride in cache.stride()[:3])
    for b, p, m in [(0, 0, 0), (2, 3, 1), tuple(size - 1 for size in cache.shape[:3])]:
        number = b * block + p * page + m * member
        both = torch.cat([keys[number, :, 0], values[number, :, 0]], dim=-1)
        assert torch.equal(both.nan_to_num(7.0), cache[b, p, m].nan_to_num(7.0))
    assert number == len(keys) - 1, "the last page is the last of the view"


def test_the_workspace_is_kept_until_it_is_too_small():
    workspace = SealedWorkspace("cpu")
    first = workspace.give("rows", torch.int32, 3, 5)
    assert first.shape == (3, 5) and first.is_contiguous()
    assert workspace.give("rows", torch.int32, 16).data_ptr() == first.data_ptr()
    assert workspace.give("pages", torch.int32, 16).data_ptr() != first.data_ptr()
    assert workspace.give("rows", torch.int32, 17).data_ptr() != first.data_ptr()
    assert workspace.give("rows", torch.float32, 1).dtype == torch.float32


@pytest.mark.parametrize(
    "fewer_pairs, fewer_pages, worth_it", [(0, 0, True), (1, 0, False), (0, 1, False)]
)
def test_a_worker_takes_flash_attention_for_steps_that_are_worth_it(
    fewer_pairs, fewer_pages, worth_it, kernel_device, monkeypatch
):
    pytest.importorskip("vllm", reason="it is vLLM's worker")
    from tangram.kernels.seal_decode import SealScorer
    from tangram.vllm_plugin.worker.runners import device

    case = CASES[0]
    pool, query, segments = make_step(case, kernel_device, torch.float32)
    calls = []

    def attention(**arguments):
        calls.append(len(arguments["q"]))
        return paged_attention(**arguments)

    pairs = sealed_pairs(pool.geometry, segments)
    monkeypatch.setattr(device, "MIN_PAIRS", pairs + fewer_pairs)
    made = SealedStep.make(pool.geometry, segments, "cpu")
    pages = pool.geometry.num_kv_heads * len(made.segments) * made.max_pages
    monkeypatch.setattr(device, "MAX_PAGE_NUMBERS", pages - fewer_pages)
    if kernel_device == "cpu":
        sms = SimpleNamespace(multi_processor_count=2)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: sms)
    kernels = device.DeviceKernels(
        pool.geometry, SealScorer("key_diff"), torch.device(kernel_device), (), list, attention
    )
    # Budgets can be swapped: what attends stays.
    kernels = kernels.for_layout(pool.geometry)
    tiles, sealed = kernels.cut_segments(segments)
    assert (sealed is not None) == worth_it == bool((tiles[:, 6] >= 0).any())
    out = torch.full_like(query, torch.nan)
    step = SimpleNamespace(
        layer=pool.layer, softmax_scale=0.11, query=query, out=out, view=pool.view()
    )
    kernels.attend_prefills(step, tiles, sealed)
    sees_sealed = segments.position >= pool.geometry.chunk_size_tokens
    gathered = pool.geometry.num_kv_heads * int(segments.num_queries[sees_sealed].sum())
    assert calls == ([gathered] if worth_it else [])
    assert error_of(out, run_reference(pool, query, segments)) < TOLERANCE[torch.float32]
