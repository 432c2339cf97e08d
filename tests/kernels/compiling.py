"""Compile every kernel for an architecture that need not be there, as its launch code asks for it.

    python -m tests.kernels.compiling 89 few        # from the project's root; or `all`

The functions that launch kernels are called as a worker calls them, with tensors that say that they
are on a GPU. What they would launch is compiled instead. Prints a line of JSON for every kernel,
with the fields of `Compiled`. Needs a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tangram.kernels.cache_view import CacheView
from tangram.kernels.decode import kernel as decode_kernel
from tangram.kernels.decode.schedule_kernel import schedule
from tangram.kernels.flash import SealedStep, SealedWorkspace, attend_sealed
from tangram.kernels.launch import Remembering
from tangram.kernels.prefill import choose_blocks, make_head_table, make_tiles
from tangram.kernels.prefill import kernel as prefill_kernel
from tangram.kernels.seal_decode import KERNEL_SCORERS, SealTables
from tangram.kernels.seal_decode import kernel as seal_kernel
from tangram.kernels.served import DTYPES
from tangram.kernels.sizes import HEAD_SIZES, shared_bytes
from tests.kernels import (
    test_decode,
    test_extend,
    test_prefill,
    test_seal_decode,
    test_store,
    test_store_queries,
)
from tests.kernels.inputs import make_geometry, needs_of

SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""Most that a block of threads can have, by compute capability: CUDA's programming guide."""


class Compiled(NamedTuple):
    """A kernel as it was compiled.

    Attributes:
        kernel: name of Triton's function.
        case: what it was compiled for.
        shared_bytes: shared memory of a block of threads.
        tensor_columns: of compute capability 10's tensor memory.
        registers: of a thread.
        stack_bytes: of a thread: spilled registers.
        is_dependent: waits for the kernel before it, or lets the one after it begin.
        products: asynchronous ones of Hopper's matrix units.
        copies: asynchronous ones to shared memory, by the bytes of each.
    """

    kernel: str
    case: str
    shared_bytes: int
    tensor_columns: int
    registers: int
    stack_bytes: int
    is_dependent: bool
    products: int
    copies: dict[str, int]


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    device = torch.device("cuda", 0)
    is_cuda = True


def on_gpu(tensor: Tensor) -> OnGpu:
    return tensor.as_subclass(OnGpu)


def view_on_gpu(view: CacheView) -> CacheView:
    return CacheView(*(None if tensor is None else on_gpu(tensor) for tensor in view))


# -- what is launched ----------------------------------------------------------------------------


class Shape(NamedTuple):
    """What kernels are compiled for."""

    dtype: torch.dtype
    head_size: int
    queries_per_kv_head: int = 4
    page_group_size: int = 4
    chunk_size_tokens: int = 256

    def layout(self) -> dict[str, Any]:
        """Two groups of heads."""
        sizes = self._asdict()
        del sizes["dtype"], sizes["page_group_size"]
        return sizes | {"num_kv_heads": 2 * self.page_group_size, "window_size_tokens": 32}


def store(shape: Shape) -> None:
    sizes = dict(tokens=5, heads=2 * shape.page_group_size, head_size=shape.head_size, R=16)
    for scores in (False, True):
        test_store.run("cpu", shape.dtype, scores=scores, **sizes)


def store_queries(shape: Shape) -> None:
    heads = 2 * shape.page_group_size * shape.queries_per_kv_head
    sizes = dict(W=32, R=8, heads=heads, head_size=shape.head_size)
    launch = test_store_queries.kernel_agrees
    launch("cpu", [(1, 40), (21, 50)], dtype=shape.dtype, **sizes)


def decode(shape: Shape, layers: Sequence[int] = (0, 1)) -> None:
    """Of a step's first layer, and of another, which is launched ahead."""
    geometry = make_geometry([[1, 4], [4, 2]], dtype=shape.dtype, **shape.layout())
    case = test_decode.make_case(geometry, [64, 191, 1], device="cpu", dtype=shape.dtype)
    query, view = on_gpu(case.inputs[0]), view_on_gpu(case.inputs[1])
    schedule(view, len(query), case.tables, case.workspace)
    for layer in layers:
        decode_kernel.decode_attention(
            query,
            view,
            tables=case.tables,
            layer=layer,
            softmax_scale=0.1,
            out=on_gpu(case.out),
            workspace=case.workspace,
        )


def prefill(shape: Shape, after_flash: bool = False) -> None:
    """Of sealed rows and raw tokens, or of raw tokens once FlashAttention saw to the others."""
    case = test_prefill.Case("", [3 * shape.chunk_size_tokens], [65], layout=shape.layout())
    pool, query, segments = test_prefill.make_step(case, "cpu", shape.dtype, seed=0)
    query, view, g = on_gpu(query), view_on_gpu(pool.view()), pool.geometry
    head_table, part = torch.from_numpy(make_head_table(g, pool.layer)), None
    if after_flash:
        part = attend_sealed(
            query,
            SealedStep.make(g, segments, "cpu"),
            view,
            head_table=head_table,
            softmax_scale=0.1,
            attention=nothing_seen,
            workspace=SealedWorkspace("cpu"),
        )
    blocks = choose_blocks(g.head_size, g.itemsize_bytes, shared_bytes(query.device))
    prefill_kernel.prefill_attention(
        query,
        torch.from_numpy(make_tiles(segments, g, blocks)),
        view,
        head_table=head_table,
        softmax_scale=0.1,
        out=torch.empty_like(query),
        blocks=blocks,
        sealed_part=part,
    )


def extend(shape: Shape) -> None:
    """A small step, of prompts and of a single token."""
    case = test_prefill.Case("", [3 * shape.chunk_size_tokens, 99], [65, 1], layout=shape.layout())
    memory = shared_bytes(torch.device("cuda:0"))
    blocks = choose_blocks(shape.head_size, shape.dtype.itemsize, memory)
    step = test_extend.make_step(case, "cpu", shape.dtype, blocks=blocks)
    step.query, step.out, step.view = on_gpu(step.query), on_gpu(step.out), view_on_gpu(step.view)
    test_extend.launch(step)


def nothing_seen(*, q: Tensor, out: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
    """Stands for FlashAttention, which is not ours to compile."""
    return out, torch.empty(q.shape[1], q.shape[0])


def seal(shape: Shape, scorer: str, of_step: bool = False) -> None:
    """All layers at once, as decode does; or one, with the step's own queries, as prefill does."""
    needs = needs_of(scorer)
    geometry = make_geometry([[1, 4], [4, 2]], dtype=shape.dtype, **needs, **shape.layout())
    case = test_seal_decode.make_case(geometry, [shape.chunk_size_tokens, 70], dtype=shape.dtype)
    layers = [0] if of_step else [0, 1]
    caches = test_seal_decode.recent_caches(case, case.base)[: len(layers)]
    tables = SealTables.of(geometry, layers, caches)
    seal_kernel.seal_decode(
        dataclasses.replace(
            tables,
            recent_cache=on_gpu(tables.recent_cache),
            scores=None if tables.scores is None else on_gpu(tables.scores),
        ),
        view_on_gpu(test_seal_decode.view_of(case, case.base)),
        scorer=test_seal_decode.seal_scorer(case, scorer, {}, "cpu"),
        softmax_scale=0.1,
        query=on_gpu(case.query) if of_step and needs["has_query_ring"] else None,
    )


COMMON = Shape(torch.bfloat16, 128)
"""Of Llama 3 and Qwen3, in groups of four heads."""
LARGE = Shape(torch.float16, 256, 1, 1, 2048)
SMALL = Shape(torch.float16, 64, 7, 2, 64)


def few() -> Iterator[Callable[[], None]]:
    """Every kernel once."""
    yield from (partial(launch, COMMON) for launch in (store, store_queries, decode, extend))
    yield partial(prefill, COMMON, after_flash=True)
    yield from (partial(seal, COMMON, scorer) for scorer in KERNEL_SCORERS)


def some() -> Iterator[Callable[[], None]]:
    """Every kernel once, and those with much shared memory for a few more shapes."""
    yield from few()
    yield from (partial(prefill, LARGE), partial(extend, LARGE))
    yield from (partial(decode, shape, layers=[1]) for shape in (LARGE, SMALL))
    yield from (partial(seal, LARGE, scorer) for scorer in ("snap_kv", "expected_attention"))


def everything() -> Iterator[Callable[[], None]]:
    """Every kernel for every type and head size that is served."""
    for dtype, head_size in itertools.product(DTYPES, HEAD_SIZES):
        for heads in ((1, 4), (4, 1), (4, 4), (7, 2), (8, 2)):
            shape = Shape(dtype, head_size, *heads)
            yield from (partial(launch, shape) for launch in (store, store_queries, decode, extend))
            yield from (partial(prefill, shape, after_flash=after) for after in (False, True))
        for chunk, scorer in itertools.product((64, 256, 1024, 2048), KERNEL_SCORERS):
            shape = Shape(dtype, head_size, chunk_size_tokens=chunk)
            yield from (partial(seal, shape, scorer, of_step=of_step) for of_step in (False, True))


CASES = {"few": few, "some": some, "all": everything}


# -- compiling -----------------------------------------------------------------------------------


class Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def pretend(capability: int) -> None:
    """Make torch and Triton of this process find a GPU of that compute capability."""
    properties = SimpleNamespace(
        multi_processor_count=2, shared_memory_per_block_optin=SHARED_KIB[capability] << 10
    )
    torch.cuda.get_device_properties = lambda device: properties
    torch.cuda.get_device_capability = lambda device: divmod(capability, 10)
    triton.runtime.driver.set_active(Driver(capability))


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    assert found is not None, printed
    return int(found[1]), int(found[2])


def compile_for(capability: int, which: str) -> Iterator[Compiled]:
    """Every kernel that the cases launch, compiled once for all of its equal launches."""
    pretend(capability)
    launches: list[tuple[JITFunction, dict[str, Any], tuple[Any, ...]]] = []

    def record(self: Remembering, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **constants: launches.append(
            (self.kernel, {"grid": grid, **constants}, args)
        )

    Remembering.__getitem__ = record
    seen = set()
    for work in CASES[which]():
        launches.clear()
        work()
        case = " ".join(map(str, (work.func.__name__, *work.args, work.keywords or "")))
        assert launches, case
        for kernel, constants, args in launches:
            plain = [a.as_subclass(Tensor) if isinstance(a, Tensor) else a for a in args]
            made = kernel.warmup(*plain, **constants)
            if made.hash in seen:
                continue
            seen.add(made.hash)
            ptx = made.asm["ptx"]
            registers, stack_bytes = resources(made.asm["cubin"])
            yield Compiled(
                kernel=kernel.__name__,
                case=case,
                shared_bytes=made.metadata.shared,
                tensor_columns=getattr(made.metadata, "tmem_size", 0) or 0,
                registers=registers,
                stack_bytes=stack_bytes,
                is_dependent="griddepcontrol" in ptx,
                products=ptx.count("wgmma.mma_async"),
                copies=Counter(
                    re.findall(r"cp\.async\.c\w\.shared\.global \[.*?\], \[.*?\], (\w+)", ptx)
                ),
            )


def main() -> None:
    """Compile the cases of `few`, `some` or `all` for a compute capability."""
    capability, which = sys.argv[1:]
    for compiled in compile_for(int(capability), which):
        print(json.dumps(compiled._asdict()), flush=True)


if __name__ == "__main__":
    main()
