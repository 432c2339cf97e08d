"""Kernels that remember what they were compiled to."""

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.runtime.jit import JITFunction  # noqa: E402

from tangram.kernels.launch import Remembering, remember_compiled  # noqa: E402


class Compiled:
    """Stands for a compiled kernel."""

    def __init__(self, launches):
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *args: self.launches.append((self, grid, args))


def kernel(x_ptr, y_ptr, count, step, SIZE):
    """Its names alone are used."""


@pytest.fixture
def remembering(monkeypatch):
    """A kernel that is never compiled; what it was compiled for, and what was launched since."""
    compiled_for, launches = [], []

    def run(self, *args, grid, warmup, **constants):
        compiled_for.append((grid, args, constants))
        return Compiled(launches)

    monkeypatch.setattr(JITFunction, "run", run)
    kernel.__annotations__["SIZE"] = triton.language.constexpr
    made = remember_compiled(JITFunction(kernel, do_not_specialize=["count"]))
    assert isinstance(made, Remembering)
    return made, compiled_for, launches


def test_triton_is_asked_once_and_the_compiled_kernel_launched_from_then_on(remembering):
    kernel, compiled_for, launches = remembering
    x, y = torch.zeros(8), torch.ones(8)
    kernel[5, 2](x, y, 3, 16, SIZE=64, num_warps=4)
    assert compiled_for == [((5, 2), (x, y, 3, 16), dict(SIZE=64, num_warps=4))]
    assert launches == []
    kernel[(7,)](y, x, 4, 16, SIZE=64, num_warps=4)
    assert len(compiled_for) == 1
    (launch,) = launches
    assert launch[1] == (7, 1, 1)
    # Constants come last, as the kernel names them; options are part of what is compiled.
    assert launch[2] == (y.data_ptr(), x.data_ptr(), 4, 16, 64)


@pytest.mark.parametrize(
    "other",
    [
        dict(SIZE=32),
        dict(num_warps=8),
        dict(x=torch.zeros(8, dtype=torch.float16)),
        dict(x=torch.zeros(9)[1:]),
        dict(y=None),
        dict(step=1),
        dict(step=15),
        dict(count=1 << 31),
        dict(count=-(1 << 31) - 1),
    ],
    ids=str,
)
def test_what_triton_compiles_for_is_told_apart(remembering, other):
    kernel, compiled_for, _ = remembering

    def launch(x=torch.zeros(8), y=torch.zeros(8), count=3, step=16, SIZE=64, num_warps=4):  # noqa: B008
        kernel[(1,)](x, y, count, step, SIZE=SIZE, num_warps=num_warps)

    launch()
    launch(**other)
    assert len(compiled_for) == 2
    launch()
    launch(**other)
    assert len(compiled_for) == 2


def test_what_triton_does_not_compile_for_is_not(remembering):
    kernel, compiled_for, launches = remembering
    for count, x in (
        (1, torch.zeros(8)),
        (16, torch.zeros(80)),
        ((1 << 31) - 1, torch.zeros(9)[4:]),
    ):
        kernel[(1,)](x, x, count, 16, SIZE=64)
    assert len(compiled_for) == 1
    assert len(launches) == 2


@pytest.mark.gpu
def test_results_are_those_of_triton():
    """A sum of rows of any stride: what is specialized differs from call to call."""
    from tangram.kernels.store import kernel as store

    for heads, tokens in ((1, 3), (2, 5), (1, 4)):
        cache = torch.zeros(4, heads, 16, 128, dtype=torch.float16, device="cuda")
        key = torch.randn(tokens, heads, 64, device="cuda").half()
        slots = torch.arange(tokens, device="cuda")
        for _ in range(2):
            cache.zero_()
            store.store(key, 2 * key, slots, cache)
            assert torch.equal(cache[0, :, :tokens, :64].transpose(0, 1), key)
            assert torch.equal(cache[0, :, :tokens, 64:].transpose(0, 1), 2 * key)
            assert not cache[1:].any()
