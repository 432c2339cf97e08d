"""Storing queries in the ring: the reference against a loop, the kernel against the reference."""

import pytest
import torch

from tangram.kernels.cache_view import CacheView
from tangram.kernels.store_queries import reference, store_queries

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}

# Of every request: its queries in the step, and the tokens computed after it.
STEPS = {
    "decode": [(1, 1), (1, 16), (1, 17), (1, 40), (1, 1000)],
    "a first prompt longer than W": [(50, 50)],
    "a part of a prompt, longer than W": [(37, 101)],
    "as long as W, wrapping": [(16, 27)],
    "shorter than W": [(5, 5)],
    "shorter than W, wrapping": [(7, 35)],
    "many at once": [(1, 33), (1, 2), (20, 20), (3, 49), (1, 16), (15, 70)],
    "more requests than queries that one has": [(1, 20 + k) for k in range(9)] + [(12, 30)],
    "none has any": [(0, 30), (0, 0)],
    "some have none": [(0, 30), (1, 31), (0, 12), (18, 44), (0, 16)],
    "padded, no query each": [(1, 33), (1, 50), (0, 0), (0, 0)],
    "padded, one query each": [(1, 33), (1, 50), (1, 0), (1, 0)],
    "of nobody": [],
}
SHAPES = {
    "one block": dict(W=16, R=16, heads=4, head_size=64),
    "four blocks": dict(W=16, R=4, heads=8, head_size=128),
    "odd": dict(W=12, R=3, heads=5, head_size=80),
    "a query a block": dict(W=3, R=1, heads=2, head_size=64),
    "one query": dict(W=1, R=1, heads=1, head_size=256),
}


def view_of(query_start, seq_lens, ring_table, ring):
    """A step's view of which only the ring is looked at: [blocks, R, layers, heads, D]."""
    nothing = torch.empty(0)
    return CacheView(
        nothing, nothing, nothing, nothing, query_start, seq_lens, ring, ring_table
    )  # fmt: skip


def loop(query, view, layer, window_size_tokens):
    """What the ring holds after the step, query by query, oldest first."""
    ring = view.ring[:, :, layer]
    W, R = window_size_tokens, ring.shape[1]
    for request, after in enumerate(view.seq_lens.tolist()):
        begin, end = view.query_start[request : request + 2].tolist()
        for token in range(begin, end) if after else ():
            slot = (after - end + token) % W
            block = view.ring_table[request, slot // R].item()
            ring[block, slot % R] = query[token].to(ring.dtype)


def run(store, device, step, *, W, R, heads, head_size, dtype, query_dtype=None):
    """Store a step into layer 1 of 3 of a pool of NaN; the bits of all of the pool.

    Padded rows have the null block, as in vLLM. Queries are a part of the output of one projection.
    """
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([count for count, _ in step], dtype=torch.int32)
    tokens, width = int(counts.sum()), W // R
    fused = torch.randn(tokens + 2, heads + 3, head_size, generator=generator)
    query = fused.to(query_dtype or dtype).to(device)[:, 1 : heads + 1]
    table = 1 + torch.randperm(len(step) * width + 1, generator=generator)[: len(step) * width]
    table = torch.nn.functional.pad(table.view(len(step), width), (0, 2), value=0).to(torch.int32)
    seq_lens = torch.tensor([after for _, after in step], dtype=torch.int32)
    table[seq_lens == 0] = 0
    elements = R * 3 * heads * head_size
    pool = torch.full((len(step) * width + 2, elements + 48), torch.nan, dtype=dtype, device=device)
    ring = pool[:, 16 : 16 + elements].unflatten(1, (R, 3, heads, head_size))
    query_start = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    view = view_of(query_start.to(device), seq_lens.to(device), table.to(device), ring)
    store(query, view, 1, W)
    return pool.cpu().view(BITS[dtype])


def kernel_agrees(device, step, **options):
    """Whether the kernel's pool is the reference's, bit by bit."""
    from tangram.kernels.store_queries import kernel

    expected = run(reference.store_queries, "cpu", step, **options)
    return torch.equal(run(kernel.store_queries, device, step, **options), expected)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_the_reference_keeps_what_a_loop_would(step, shape):
    expected = run(loop, "cpu", step, dtype=torch.float32, **shape)
    got = run(reference.store_queries, "cpu", step, dtype=torch.float32, **shape)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_the_kernel_keeps_the_same_and_touches_nothing_else(kernel_device, step, shape):
    assert kernel_agrees(kernel_device, step, dtype=torch.float32, **shape)


@pytest.mark.parametrize("query_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_to_the_type_of_the_ring(kernel_device, dtype, query_dtype):
    if kernel_device == "cpu" and dtype == torch.bfloat16 != query_dtype:
        pytest.skip("Triton's interpreter does not round to the nearest bfloat16")
    step, shape = STEPS["many at once"], SHAPES["four blocks"]
    assert kernel_agrees(kernel_device, step, dtype=dtype, query_dtype=query_dtype, **shape)


def test_programs_share_a_prompt_that_many_decodes_accompany(kernel_device):
    """More queries than programs, and requests without any: nobody may count on one each."""
    step = [(1, 9 + k) for k in range(3)] + [(40, 90)] + [(0, 5)] * 50
    shape = dict(W=32, R=8, heads=2, head_size=64)
    assert kernel_agrees(kernel_device, step, dtype=torch.float16, **shape)


@pytest.mark.parametrize("name", ["padded, no query each", "padded, one query each"])
def test_padded_rows_write_nothing(name):
    step, shape = STEPS[name], SHAPES["four blocks"]
    pool = run(store_queries, "cpu", step, dtype=torch.float32, **shape)
    written = ~pool.view(torch.float32).isnan()
    assert written.sum() == 2 * shape["heads"] * shape["head_size"]
    assert not written[0].any(), "the null block"


def test_a_cpu_ring_takes_the_reference():
    ring = torch.zeros(3, 2, 1, 1, 2)
    query = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    start, lens, table = torch.tensor([0, 2]), torch.tensor([6]), torch.tensor([[2, 1]])
    store_queries(query, view_of(start.int(), lens.int(), table.int(), ring), 0, 4)
    assert ring.flatten(1).tolist() == [[0] * 4, [0] * 4, [1, 2, 3, 4]]


@pytest.mark.gpu
def test_a_captured_step_follows_what_the_device_says():
    """One graph for all decode steps of as many rows: who is padding it learns at the replay."""
    from tangram.kernels.store_queries import kernel

    W, R, heads, D, rows = 8, 4, 2, 64, 4
    query = torch.randn(rows, heads, D, device="cuda", dtype=torch.bfloat16)
    start = torch.arange(rows + 1, dtype=torch.int32, device="cuda")
    lens = torch.ones(rows, dtype=torch.int32, device="cuda")
    table = torch.arange(rows * W // R, dtype=torch.int32, device="cuda").view(rows, -1)
    ring = torch.zeros(rows * W // R, R, 1, heads, D, device="cuda", dtype=torch.bfloat16)
    view = view_of(start, lens, table, ring)
    kernel.store_queries(query, view, 0, W)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.store_queries(query, view, 0, W)
    for after in ([7, 8, 9, 0], [100, 0, 0, 0]):
        lens.copy_(torch.tensor(after))
        start.copy_(torch.tensor([min(k, 4 - after.count(0)) for k in range(rows + 1)]))
        query.normal_()
        ring.zero_()
        expected = ring.cpu()
        loop(query.cpu(), view_of(start.cpu(), lens.cpu(), table.cpu(), expected), 0, W)
        graph.replay()
        assert torch.equal(ring.cpu(), expected)


@pytest.mark.gpu
def test_reaches_beyond_two_to_the_31_elements():
    from tangram.kernels.store_queries import kernel

    W = R = 32
    heads, D, tokens = 32, 128, 2**31 // (32 * 128) + 3
    blocks = 2**31 // (R * heads * D) + 2
    ring = torch.zeros(blocks, R, 1, heads, D, dtype=torch.bfloat16, device="cuda")
    query = torch.ones(tokens, heads, D, dtype=torch.bfloat16, device="cuda")
    of_device = dict(dtype=torch.int32, device="cuda")
    start = torch.tensor([0, tokens - 2, tokens], **of_device)
    lens = torch.tensor([0, 40], **of_device)
    table = torch.tensor([[0], [blocks - 1]], **of_device)
    kernel.store_queries(query, view_of(start, lens, table, ring), 0, W)
    assert ring[-1].float().sum(dim=(1, 2, 3)).nonzero()[:, 0].tolist() == [6, 7]
    assert ring[-1].float().sum().item() == 2 * heads * D
    assert ring[:-1].any().item() is False
