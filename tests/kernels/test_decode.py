"""Ragged decode attention: the kernel against the reference, wherever the kernel runs."""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from tangram.geometry import Geometry, HeadGroups
from tangram.kernels.decode import DecodeTables, DecodeWorkspace, reference
from tests.kernels.inputs import TOLERANCE, make_geometry, make_pool, relative_error

SCALE = 0.125
LENGTHS = [1, 63, 64, 65, 0, 127, 128, 129, 300]  # C is 64, and a row is padded


def make_case(
    geometry,
    lengths,
    *,
    device,
    dtype=torch.float32,
    layer=0,
    programs=24,
    heads_per_program=None,
    spare_blocks=3,
):
    """Everything that a call takes; the workspace and the output are NaN."""
    pool = make_pool(
        geometry,
        lengths,
        layer=layer,
        dtype=dtype,
        device=device,
        step_tokens=[min(1, n) for n in lengths],
        spare_blocks=spare_blocks,
    )
    heads, size = geometry.num_query_heads, geometry.head_size
    # As a model gives them: queries beside keys and values, outputs in a longer buffer.
    query = pool.random(len(lengths), heads + 4, size)[:, :heads]
    out = query.new_full((len(lengths), heads + 1, size), torch.nan)[:, :heads]
    tables = DecodeTables.of(geometry, device, heads_per_program)
    workspace = DecodeWorkspace.allocate(tables, programs)
    workspace.cut.fill_(-7)
    workspace.partial_out.fill_(torch.nan)
    workspace.lse_log2.fill_(torch.nan)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    inputs = query, pool.view()._replace(seq_lens=seq_lens)
    return SimpleNamespace(
        inputs=inputs,
        tables=tables,
        layer=layer,
        workspace=workspace,
        out=out,
        seq_lens=seq_lens,
        dtype=dtype,
    )


def launch(case, **config):
    from tangram.kernels.decode.kernel import LaunchConfig, decode_attention
    from tangram.kernels.decode.schedule_kernel import schedule

    query, view = case.inputs
    schedule(view, len(query), case.tables, case.workspace)
    decode_attention(
        query,
        view,
        tables=case.tables,
        layer=case.layer,
        softmax_scale=SCALE,
        out=case.out,
        workspace=case.workspace,
        config=LaunchConfig(**config) if config else None,
    )


def expected(case):
    out = torch.full_like(case.out, torch.nan, dtype=torch.float32)
    reference.decode_attention(
        *case.inputs, tables=case.tables, layer=case.layer, softmax_scale=SCALE, out=out
    )
    return out


def check(case, **config):
    launch(case, **config)
    want = expected(case)
    assert not case.out[case.seq_lens == 0].any(), "a padded row is not zero"
    for request in (case.seq_lens > 0).nonzero().flatten().tolist():
        error = relative_error(case.out[request], want[request])
        assert error < TOLERANCE[case.dtype], f"{int(case.seq_lens[request])} tokens: {error}"


@pytest.mark.parametrize("pages", [[[1, 3], [2, 4]], [[4], [1]]], ids=["two-groups", "one-group"])
@pytest.mark.parametrize("window", [0, 16, 33])
@pytest.mark.parametrize("layer", [0, 1])
def test_reads_what_it_should_and_nothing_else(kernel_device, pages, window, layer):
    # Budgets of 4 pages are a whole chunk: with a window of 33, chunk 0's rows begin at 33.
    geometry = make_geometry(pages, window_size_tokens=window, num_kv_heads=2)
    check(
        make_case(geometry, LENGTHS, device=kernel_device, layer=layer),
        tile_rows=32,
        num_warps=4,
        num_stages=3,
    )


@pytest.mark.parametrize("per", [1, 2, 3, 7, 8, 16])
def test_query_heads_of_a_kv_head(kernel_device, per):
    geometry = make_geometry([[1, 2]], num_kv_heads=2, queries_per_kv_head=per)
    check(make_case(geometry, [64, 0, 191], device=kernel_device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_head_sizes_and_types(kernel_device, head_size, dtype):
    geometry = make_geometry([[1, 3]], num_kv_heads=2, head_size=head_size, dtype=dtype)
    check(make_case(geometry, [1, 200, 0, 129], device=kernel_device, dtype=dtype))


@pytest.mark.parametrize("programs", [1, 7, 40, 200])
def test_any_number_of_splits(kernel_device, programs):
    geometry = make_geometry([[1, 3]], num_kv_heads=2)
    case = make_case(geometry, [150, 700], device=kernel_device, programs=programs)
    check(case)


@pytest.mark.parametrize("heads_per_program", [1, 2, 4])
@pytest.mark.parametrize("per", [1, 3, 4])
def test_heads_of_a_group_side_by_side(kernel_device, heads_per_program, per):
    # A short step of whole pages, and one of more: a tile has 16 rows of each of 4 heads at least.
    geometry = make_geometry([[1], [3]], num_kv_heads=4, queries_per_kv_head=per)
    for tile_rows in (64, 128):
        case = make_case(
            geometry,
            [1, 64, 0, 130, 321],
            device=kernel_device,
            layer=1,
            heads_per_program=heads_per_program,
        )
        check(case, tile_rows=tile_rows, num_warps=4, num_stages=3)


def test_a_batch_of_one(kernel_device):
    geometry = make_geometry([[2, 1]], num_kv_heads=2)
    check(make_case(geometry, [321], device=kernel_device))


@pytest.mark.parametrize("seed", range(6))
def test_drawn_lengths(kernel_device, seed):
    """One long request among short ones, padding anywhere, more and fewer programs than units."""
    draw = random.Random(seed)
    geometry = make_geometry([[draw.randint(1, 4), draw.randint(1, 4)]], num_kv_heads=2)
    lengths = [
        draw.choice([0, 1, draw.randint(1, 130), 64, 900]) for _ in range(draw.randint(2, 9))
    ]
    case = make_case(geometry, lengths, device=kernel_device, programs=draw.choice([1, 5, 16, 90]))
    check(case)


@pytest.mark.parametrize("programs", [1, 11, 400])
def test_every_program_takes_an_equal_part(kernel_device, programs):
    """Whatever the lengths: no two differ by more than a unit, and together they take all."""
    geometry = make_geometry([[1, 3], [4, 2]], num_kv_heads=2)
    lengths = [1300, 5, 0, 64, 129]
    case = make_case(geometry, lengths, device=kernel_device, programs=programs, layer=1)
    launch(case)
    for layer in range(2):
        units = 0
        for pages, n in itertools.product(geometry.head_groups.pages[layer], lengths):
            k = max(n - 1, 0) // 64
            first_row = max(0, 16 * pages - 48)
            units += max(k * pages - first_row // 16, 0)
            units += -(-(n - max(k * 64 - 16, 0)) // 16)
        counts = case.workspace.starts[layer, :, 3].tolist()
        assert sum(counts) == units and max(counts) - min(counts) <= 1


def test_recent_blocks_longer_than_a_tile(kernel_device):
    geometry = make_geometry(
        [[3, 9]], num_kv_heads=2, chunk_size_tokens=1040, window_size_tokens=48
    )
    case = make_case(geometry, [1039, 2079, 1041, 1], device=kernel_device)
    assert geometry.recent_block_tokens == 80, "whole tiles would do"
    check(case)


def test_recent_blocks_of_odd_length(kernel_device):
    geometry = make_geometry([[1, 3]], num_kv_heads=2, chunk_size_tokens=48, n_sink_tokens=0)
    assert geometry.recent_block_tokens == 24
    check(make_case(geometry, [47, 48, 49, 95, 145], device=kernel_device))


def test_a_workspace_serves_one_layer_after_the_other(kernel_device):
    geometry = make_geometry([[1, 3], [2, 4]], num_kv_heads=2)
    cases = [
        make_case(geometry, [130, 0, 65], device=kernel_device, layer=layer) for layer in (0, 1)
    ]
    shared = DecodeWorkspace.allocate(cases[0].tables, 24)
    for case in cases * 2:
        case.workspace = shared
        case.out.fill_(torch.nan)
        check(case)


# -- larger cases, on the GPU ------------------------------------------------------------------


def llama_like(seed=0, layers=2, dtype=torch.bfloat16, **sizes):
    """8 KV heads in groups of 4, C = 256, budgets from 1 to 16 pages."""
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randint(1, 17, (layers, 2), generator=generator).tolist()
    heads = [torch.randperm(8, generator=generator).view(2, 4).tolist() for _ in range(layers)]
    sizes = dict(num_query_heads=32, head_size=128, itemsize_bytes=dtype.itemsize) | sizes
    return Geometry(
        head_groups=HeadGroups.from_lists(heads, pages),
        chunk_size_tokens=256,
        window_size_tokens=32,
        n_sink_tokens=4,
        **sizes,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("per", [1, 4, 5, 16])
def test_long_sequences(head_size, per, dtype):
    geometry = llama_like(seed=per, dtype=dtype, head_size=head_size, num_query_heads=8 * per)
    lengths = [1, 255, 256, 257, 0, 4096, 16_411, 9_999]
    check(make_case(geometry, lengths, device="cuda", dtype=dtype, programs=528))


@pytest.mark.gpu
@pytest.mark.parametrize("tile_rows", [16, 32, 64])
@pytest.mark.parametrize("num_warps", [1, 2, 4])
@pytest.mark.parametrize("dependent", [True, False])
def test_every_configuration(tile_rows, num_warps, dependent):
    case = make_case(
        llama_like(), [5000, 17, 0, 1111], device="cuda", dtype=torch.bfloat16, programs=264
    )
    check(case, tile_rows=tile_rows, num_warps=num_warps, num_stages=3, dependent=dependent)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    geometry = llama_like()
    elements = geometry.block_bytes // geometry.itemsize_bytes
    spare = 3 * 2**31 // elements
    case = make_case(
        geometry, [9000, 4000], device="cuda", dtype=torch.bfloat16, spare_blocks=spare
    )
    for table in (case.inputs[1].sealed_table, case.inputs[1].recent_table):
        assert int(table.max()) * elements > 2**31
    check(case)


@pytest.mark.gpu
def test_the_same_bits_every_time():
    case = make_case(
        llama_like(1), [9000, 4000, 300] * 5, device="cuda", dtype=torch.bfloat16,
        programs=1056,
    )  # fmt: skip
    check(case)
    first = case.out.clone()
    for _ in range(200):
        case.out.fill_(torch.nan)
        launch(case)
        assert torch.equal(case.out, first)


@pytest.mark.gpu
def test_neighbours_change_no_more_than_the_last_bits():
    """50 seeded sets and orders of neighbours: every request as close to the reference as alone."""
    geometry, draw = llama_like(3), random.Random(0)
    for _ in range(50):
        lengths = [int(draw.lognormvariate(7, 1.2)) % 20_000 for _ in range(draw.randint(1, 24))]
        lengths[draw.randrange(len(lengths))] = draw.choice([0, 1, 256, 30_000])
        check(make_case(geometry, lengths, device="cuda", dtype=torch.bfloat16, programs=264))


@pytest.mark.gpu
def test_a_captured_graph_serves_any_lengths():
    case = make_case(llama_like(2), [6000] * 6, device="cuda", dtype=torch.bfloat16)
    launch(case)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(case)
    # Fewer tokens see rows that are there too; raw ones only as far back as 6000 tokens keep them.
    for lengths in ([6000, 5889, 0, 5950, 0, 5999], [0, 0, 0, 0, 0, 5990], [6000] * 6):
        case.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        case.out.fill_(torch.nan)
        graph.replay()
        want = expected(case)
        assert relative_error(case.out, want) < TOLERANCE[case.dtype]
        assert not case.out[case.seq_lens == 0].any()
