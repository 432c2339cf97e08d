"""Storing keys and values: the kernel against the reference."""

import pytest
import torch

from tangram.kernels.cache_view import recent_scores
from tangram.kernels.store import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run(
    device, dtype, *, tokens, heads, head_size, R, blocks=7, model_dtype=None, seed=0, scores=False
):
    """Store into a strided cache of NaN; the bits of all of it, and of the reference's."""
    from tangram.kernels.store import kernel

    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(blocks * R, generator=generator)[:tokens]
    slots[torch.rand(tokens, generator=generator) < 0.3] = -1
    # Keys and values lie side by side in the output of one projection, longer than the step.
    fused = torch.randn(tokens + 2, 3 * heads * head_size, generator=generator)
    fused = fused.to(model_dtype or dtype)
    caches = []
    for where, store in (("cpu", reference.store), (device, kernel.store)):
        pool = torch.full((blocks, 4 * heads * R * 2 * head_size + 32), torch.nan).to(dtype)
        pool = pool.to(where)
        used = heads * R * 2 * head_size
        cache = pool[:, used : 2 * used].unflatten(1, (heads, R, 2 * head_size))
        q_k_v = fused.to(where).unflatten(1, (3, heads, head_size))
        beside = []
        if scores:
            made = torch.randn(tokens + 2, heads + 1, generator=torch.Generator().manual_seed(seed))
            beside = [made.to(where)[:, 1:], recent_scores(cache)]
        store(q_k_v[:, 1], q_k_v[:, 2], slots.to(where), cache, *beside)
        caches.append(pool.cpu().view(torch.int32 if dtype == torch.float32 else torch.int16))
    return caches


SHAPES = [
    dict(tokens=1, heads=1, head_size=64, R=16),
    dict(tokens=37, heads=8, head_size=128, R=16),
    dict(tokens=9, heads=3, head_size=80, R=12),
    dict(tokens=5, heads=2, head_size=256, R=1),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stores_where_the_slots_say_and_nowhere_else(kernel_device, shape, dtype):
    expected, got = run(kernel_device, dtype, **shape)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_go_behind_the_rows_of_their_block(kernel_device, shape, dtype):
    expected, got = run(kernel_device, dtype, scores=True, **shape)
    assert torch.equal(got, expected)
    without, _ = run(kernel_device, dtype, **shape)
    heads, R = shape["heads"], shape["R"]
    first = 2 * heads * R * 2 * shape["head_size"]
    stored = int((expected != without).any(dim=0).nonzero().min())
    assert first <= stored < first + heads * R * 4 // dtype.itemsize


def test_rounds_to_the_type_of_the_cache(kernel_device):
    shape = dict(tokens=8, heads=2, head_size=64, R=16)
    expected, got = run(kernel_device, torch.float16, model_dtype=torch.float32, **shape)
    assert torch.equal(got, expected)


def test_an_empty_step_writes_nothing(kernel_device):
    expected, got = run(kernel_device, torch.float32, tokens=0, heads=2, head_size=64, R=16)
    assert torch.equal(got, expected)


def test_the_reference_keeps_scores_by_head_and_place():
    pool = torch.zeros(2, 2 * 3 * 4 + 2 * 3)  # blocks of 2 heads and 3 tokens
    cache = pool[:, :24].unflatten(1, (2, 3, 4))
    scores = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    key = torch.zeros(3, 2, 2)
    slots = torch.tensor([5, -1, 1])
    reference.store(key, key, slots, cache, scores, recent_scores(cache))
    assert pool[:, :24].eq(0).all()
    assert pool[:, 24:].tolist() == [[0, 5, 0, 0, 6, 0], [0, 0, 1, 0, 0, 2]]


def test_a_cpu_cache_takes_the_reference():
    from tangram.kernels.store import store

    cache = torch.zeros(2, 1, 4, 4)
    key, value = torch.full((1, 1, 2), 3.0), torch.full((1, 1, 2), 5.0)
    store(key, value, torch.tensor([6]), cache)
    assert cache[1, 0, 2].tolist() == [3, 3, 5, 5] and cache.sum() == 16


@pytest.mark.gpu
def test_reaches_beyond_two_to_the_31_elements():
    from tangram.kernels.store import kernel

    R, heads, D = 16, 8, 128
    blocks = 2**31 // (heads * R * 2 * D) + 2
    cache = torch.zeros(blocks, heads, R, 2 * D, dtype=torch.bfloat16, device="cuda")
    key = torch.ones(1, heads, D, dtype=torch.bfloat16, device="cuda")
    slot = torch.tensor([blocks * R - 1], device="cuda")
    kernel.store(key, 2 * key, slot, cache)
    assert cache[-1, :, -1].float().sum().item() == heads * D * 3
    assert cache[:-1].any().item() is False
