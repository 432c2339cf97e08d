"""Attention of small steps, cut on the device (interpreted where there is none), on the reference.

A step's one-token requests are decode attention's, wherever they stand in the batch.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tangram.kernels.segments import cut_step
from tests.kernels.inputs import TOLERANCE, fill_step_chunks, make_geometry, make_pool
from tests.kernels.inputs import relative_error as error_of

pytest.importorskip("triton", reason="the kernel is written in Triton")

from tangram.kernels import decode, extend  # noqa: E402
from tangram.kernels.decode.kernel import decode_attention  # noqa: E402
from tangram.kernels.decode.schedule_kernel import schedule  # noqa: E402
from tangram.kernels.extend.tables import ExtendTables, ExtendWorkspace, num_tiles  # noqa: E402
from tangram.kernels.prefill import Blocks, make_tiles  # noqa: E402
from tests.kernels.test_prefill import CASES, LARGE, Case, run_reference  # noqa: E402

SMALL = Blocks(query_rows=32, key_rows=32, warps=4, stages=2)
SCALE = 0.11  # that of `run_reference`


def make_step(case, device, dtype, *, blocks=None, programs=5, padding=0, seed=3):
    """Everything that a step takes; the workspace and the output are NaN, padding lies behind."""
    g = make_geometry(case.pages, dtype=dtype, **case.layout)
    pool = make_pool(
        g, case.num_tokens, layer=case.layer, dtype=dtype, device=device, seed=seed,
        step_tokens=case.step_tokens,
    )  # fmt: skip
    fill_step_chunks(pool, case.step_tokens)
    query_start = np.concatenate([[0], np.cumsum(case.step_tokens)])
    segments, _ = cut_step(g, query_start, np.array(case.num_tokens))
    tokens, heads = int(query_start[-1]), g.num_query_heads
    query = pool.random(tokens + padding, heads + 4, g.head_size)[:, :heads]
    out = query.new_full((tokens + padding, heads + 1, g.head_size), torch.nan)[:, :heads]

    def padded(values, fill):
        return torch.tensor([*values, *[fill] * padding], dtype=torch.int32, device=device)

    view = pool.view()._replace(
        query_start=padded(query_start, tokens),
        seq_lens=padded(case.num_tokens, 0),
        sealed_table=torch.cat([pool.sealed_table, pool.sealed_table[:1].repeat(padding, 1)]),
        recent_table=torch.cat([pool.recent_table, pool.recent_table[:1].repeat(padding, 1)]),
    )
    tables = ExtendTables.of(g, device, blocks)
    workspace = ExtendWorkspace.allocate(tables, programs, len(query), len(view.seq_lens))
    decode_tables = decode.DecodeTables.of(g, device)
    decode_workspace = decode.DecodeWorkspace.allocate(decode_tables, programs)
    for parts in (workspace.parts, decode_workspace):
        parts.cut.fill_(-7)
        parts.partial_out.fill_(torch.nan)
        parts.lse_log2.fill_(torch.nan)
    return SimpleNamespace(
        pool=pool, segments=segments, tokens=tokens, query=query, out=out, view=view,
        tables=tables, workspace=workspace, decode_tables=decode_tables,
        decode_workspace=decode_workspace, layer=case.layer, dtype=dtype,
    )  # fmt: skip


def launch(step):
    extend.cut(step.view, len(step.query), step.tables, step.workspace)
    decodes = step.view._replace(seq_lens=step.workspace.decode_lens)
    schedule(decodes, len(step.view.seq_lens), step.decode_tables, step.decode_workspace)
    common = {"layer": step.layer, "softmax_scale": SCALE, "out": step.out}
    decode_attention(
        step.query, decodes, tables=step.decode_tables, workspace=step.decode_workspace,
        among_others=True, **common,
    )  # fmt: skip
    extend.extend_attention(
        step.query, step.view, tables=step.tables, workspace=step.workspace, **common
    )


def check(step):
    launch(step)
    expected = run_reference(step.pool, step.query[: step.tokens], step.segments)
    for request, begin in enumerate(step.view.query_start[:-1].tolist()):
        end = int(step.view.query_start[request + 1])
        error = error_of(step.out[begin:end], expected[begin:end])
        assert end == begin or error < TOLERANCE[step.dtype], f"request {request}: {error}"
    assert not step.out[step.tokens :].any(), "a padded row is not zero"


MIXED = [
    Case("decodes behind prefills", [200, 65, 129, 70, 64, 131], [136, 1, 30, 1, 1, 2]),
    Case("decodes alone", [200, 65, 129], [1, 1, 1]),
    Case("two tokens each, over a boundary", [65, 129, 193, 66], [2, 2, 2, 2]),
    Case("one token over a long history", [1900, 1024], [3, 2]),
]


@pytest.mark.parametrize("programs", [1, 5, pytest.param(64, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("case", MIXED, ids=lambda case: case.name)
def test_whatever_its_place_in_the_batch_a_request_sees_what_it_should(
    kernel_device, case, programs
):
    check(make_step(case, kernel_device, torch.float32, blocks=SMALL, programs=programs))


QUICK = ("mixed", "all kept", "three query heads", "head size 256", "chunk of 240")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case.name in QUICK else pytest.mark.thorough, id=case.name)
        for case in CASES
    ],
)
def test_interpreted_it_agrees_with_the_reference(case):
    if torch.cuda.is_available():
        pytest.skip("with CUDA the kernel is compiled; the tests marked gpu take these cases")
    check(make_step(case, "cpu", torch.float32, blocks=SMALL, programs=7, padding=3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES + MIXED + LARGE, ids=lambda case: case.name)
def test_compiled_it_agrees_with_the_reference(case, dtype):
    for programs in (3, 132, 264):
        check(make_step(case, "cuda", dtype, programs=programs, padding=5))


def test_tiles_are_those_that_the_host_would_cut(kernel_device):
    """Of seeded steps: requests of one token and of many in any order, some rows padded."""
    draw = np.random.default_rng(5)
    g = make_geometry([[1, 3]])
    per_tile = SMALL.queries_per_tile(g.queries_per_kv_head)
    tables = ExtendTables.of(g, kernel_device, SMALL)
    for _ in range(50 if kernel_device == "cuda" else 10):
        requests = int(draw.integers(1, 9))
        counts = draw.choice([1, 1, 2, per_tile, 63, 64, 65, 200], requests)
        after = counts + draw.integers(0, 300, requests)
        query_start = np.concatenate([[0], np.cumsum(counts)])
        segments, _ = cut_step(g, query_start, after)
        # The first token after a chunk waits for sealing, as prompts do.
        is_decode = (counts == 1) & ((after - 1) % g.chunk_size_tokens != 0)
        many = np.flatnonzero(~is_decode[segments.request])
        expected = make_tiles(segments.take(many), g, SMALL)[:, :4]
        expected = expected[np.lexsort((expected[:, 1],))]

        tokens, padding = int(query_start[-1]), int(draw.integers(0, 3))
        workspace = ExtendWorkspace.allocate(tables, 3, tokens + padding, requests + padding)
        workspace.tiles.fill_(-1)

        def padded(values, fill, padding=padding):
            values = [*values, *[fill] * padding]
            return torch.tensor(values, dtype=torch.int32, device=kernel_device)

        view = make_pool(g, [1], device=kernel_device).view()
        view = view._replace(query_start=padded(query_start, tokens), seq_lens=padded(after, 0))
        extend.cut(view, tokens + padding, tables, workspace)

        ends = workspace.ends[: num_tiles(tokens + padding)].cpu().numpy()
        assert (ends[: len(expected)] > 0).all() and not ends[len(expected) :].any()
        tiles = workspace.tiles[: len(expected)].cpu().numpy()
        assert np.array_equal(tiles, expected)
        assert np.array_equal(ends[: len(expected)], tiles[:, 3] + tiles[:, 2])
        ones = np.concatenate([np.where(is_decode, after, 0), np.zeros(padding)])
        assert np.array_equal(workspace.decode_lens.cpu().numpy(), ones)


@pytest.mark.gpu
def test_one_launch_repeated_gives_the_same_bits():
    step = make_step(LARGE[0], "cuda", torch.bfloat16, programs=132)
    launch(step)
    first = step.out.clone()
    for _ in range(3):
        step.out.fill_(torch.nan)
        launch(step)
        assert torch.equal(step.out[: step.tokens], first[: step.tokens])


@pytest.mark.gpu
def test_a_captured_graph_serves_any_cut_of_its_tokens():
    """The same graph after its lengths were written anew: other requests, other histories."""
    case = Case("", [400, 700, 64], [60, 35, 1])
    step = make_step(case, "cuda", torch.bfloat16, programs=64)
    launch(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(step)
    step.out.fill_(torch.nan)
    graph.replay()
    expected = run_reference(step.pool, step.query[: step.tokens], step.segments)
    assert error_of(step.out, expected) < TOLERANCE[torch.bfloat16]
    # The same requests in another order.
    step.view.query_start.copy_(torch.tensor([0, 35, 95, 96]))
    for tensor in (step.view.sealed_table, step.view.recent_table):
        tensor.copy_(tensor[[1, 0, 2]].clone())
    step.view.seq_lens.copy_(torch.tensor([700, 400, 64]))
    step.out.fill_(torch.nan)
    graph.replay()
    segments, _ = cut_step(step.pool.geometry, np.array([0, 35, 95, 96]), np.array([700, 400, 64]))
    swapped = step.pool
    swapped.sealed_table, swapped.recent_table = step.view.sealed_table, step.view.recent_table
    swapped.num_tokens = [700, 400, 64]
    expected = run_reference(swapped, step.query, segments)
    assert error_of(step.out, expected) < TOLERANCE[torch.bfloat16]
