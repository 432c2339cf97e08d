"""Do the kernels touch only what they may? compute-sanitizer over a few cases of every kernel.

    python -m benchmarks.kernels.sanitize                       # from the project's root, on a GPU
    TRITON_INTERPRET=1 python -m benchmarks.kernels.sanitize --cases all    # the cases alone

Cases and what they are compared with are those of tests/kernels. They run once without a tool,
which compiles the kernels and checks their results, then once under each tool, one process a tool,
where all kernels are looked at, torch's too: the tool's filter takes one part of a name alone. A
planted error comes first: a run that does not find it proves nothing. Exits 1 if a tool finds
something.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tangram.kernels.prefill import Blocks
from tangram.kernels.seal_decode import KERNEL_SCORERS
from tests.kernels import (
    test_decode,
    test_flash,
    test_prefill,
    test_seal_decode,
    test_store,
    test_store_queries,
)
from tests.kernels.inputs import TOLERANCE, make_geometry, needs_of

ROOT = Path(__file__).resolve().parents[2]
ERROR_CODE = 99
TIMEOUT_S = 420


class Shape(NamedTuple):
    """What a kernel is compiled for."""

    dtype: torch.dtype
    head_size: int
    queries_per_kv_head: int


SHAPES = (
    Shape(torch.bfloat16, 128, 4),
    Shape(torch.float16, 64, 16),
    Shape(torch.float16, 256, 1),
    Shape(torch.bfloat16, 64, 1),
)


class Tool(NamedTuple):
    """One tool of compute-sanitizer.

    Attributes:
        cases: which cases it runs: `all`, or `few` for one that slows kernels a hundredfold.
        options: beside those that every tool gets.
    """

    cases: str
    options: tuple[str, ...] = ()


TOOLS = {
    # Padding: what lies behind an allocation may else belong to another.
    "memcheck": Tool("all", ("--padding", "256")),
    "racecheck": Tool("few"),
    "synccheck": Tool("few"),
    "initcheck": Tool("few"),
}


# -- the cases -----------------------------------------------------------------------------------


def cases(which: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and work of every case; `few` leaves out all shapes but the first.

    In Triton's interpreter, which multiplies bfloat16 wrongly, all are in float32.
    """
    for shape in SHAPES if which == "all" else SHAPES[:1]:
        dtype = shape.dtype if torch.cuda.is_available() else torch.float32
        name = f"{str(dtype)[6:]} {shape.head_size} x {shape.queries_per_kv_head}"
        shape = shape._replace(dtype=dtype)
        yield f"store, {name}", lambda shape=shape: _store(shape)
        yield f"store queries, {name}", lambda shape=shape: _store_queries(shape)
        yield f"decode, {name}", lambda shape=shape: _decode(shape)
        yield f"prefill, {name}", lambda shape=shape: _prefill(shape)
        yield f"gather, {name}", lambda shape=shape: _gather(shape)
        for scorer in KERNEL_SCORERS:
            yield f"seal {scorer}, {name}", lambda shape=shape, scorer=scorer: _seal(shape, scorer)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _store(shape: Shape) -> None:
    sizes = dict(tokens=21, heads=3, head_size=shape.head_size, R=12)
    expected, got = test_store.run(_device(), shape.dtype, **sizes)
    assert torch.equal(got, expected)


def _store_queries(shape: Shape) -> None:
    step = [(1, 40), (21, 50), (1, 0)]
    sizes = dict(W=16, R=8, heads=2 * shape.queries_per_kv_head, head_size=shape.head_size)
    assert test_store_queries.kernel_agrees(_device(), step, dtype=shape.dtype, **sizes)


def _decode(shape: Shape) -> None:
    geometry = make_geometry([[1, 3]], num_kv_heads=2, **_sizes(shape))
    test_decode.check(
        test_decode.make_case(
            geometry, [64, 0, 191, 1], device=_device(), dtype=shape.dtype, programs=24
        )
    )


def _prefill(shape: Shape) -> None:
    case, blocks = _prefill_case(shape)
    assert test_prefill.is_close(case, _device(), shape.dtype, blocks)


def _gather(shape: Shape) -> None:
    """FlashAttention's part in torch: its kernel is not ours to look at."""
    case, blocks = _prefill_case(shape)
    assert test_flash.error(case, _device(), shape.dtype, blocks) < TOLERANCE[shape.dtype]


def _prefill_case(shape: Shape) -> tuple[test_prefill.Case, Blocks | None]:
    sizes = _sizes(shape)
    del sizes["dtype"]
    case = test_prefill.Case(
        "of two steps", [111, 195], [63, 4], pages=[[2, 3]], layer=0,
        layout={"num_kv_heads": 2, **sizes},
    )  # fmt: skip
    return case, None if torch.cuda.is_available() else test_prefill.SMALL


def _seal(shape: Shape, scorer: str) -> None:
    sizes = {**_sizes(shape), **needs_of(scorer)}
    geometry = make_geometry([[1, 4], [4, 2]], num_kv_heads=2, **sizes)
    case = test_seal_decode.make_case(geometry, [64, 128, 70], dtype=shape.dtype, seed=1)
    # All layers at once, as decode does; or one, with the step's own queries, as prefill does.
    layers = [0, 1] if shape.queries_per_kv_head > 1 else [0]
    assert test_seal_decode.check(case, _device(), layers, scorer) > 0


def _sizes(shape: Shape) -> dict:
    return {
        "head_size": shape.head_size,
        "queries_per_kv_head": shape.queries_per_kv_head,
        "dtype": shape.dtype,
    }


@triton.jit
def _store_planted(out_ptr, COUNT: tl.constexpr):
    """Writes one element more than there are."""
    tl.store(out_ptr + COUNT, 1.0)


def _plant() -> None:
    out = torch.zeros(64, device="cuda")
    _store_planted[(1,)](out, COUNT=out.numel())
    torch.cuda.synchronize()


def run_cases(which: str) -> int:
    """Run the cases in this process; the planted error, where it is asked for."""
    if which == "planted":
        _plant()
        return 0
    count = 0
    for name, work in cases(which):
        begin = time.perf_counter()
        work()
        print(f"{time.perf_counter() - begin:6.1f} s  {name}", flush=True)
        count += 1
    print(f"{count} cases agree with their references")
    return 0


# -- the tools -----------------------------------------------------------------------------------


class Found(NamedTuple):
    """What a tool says at the end; None where it says nothing, as when it could not run."""

    errors: int | None
    warnings: int = 0


def summary(printed: str) -> Found:
    """The totals in what compute-sanitizer prints."""
    race = re.search(r"RACECHECK SUMMARY: .*\((\d+) errors?, (\d+) warnings?\)", printed)
    if race:
        return Found(int(race[1]), int(race[2]))
    other = re.search(r"ERROR SUMMARY: (\d+) errors?", printed)
    return Found(int(other[1]) if other else None)


def find_sanitizer() -> str:
    """Path of compute-sanitizer.

    Raises:
        FileNotFoundError: there is none.
    """
    found = shutil.which("compute-sanitizer")
    places = [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    for place in (place / "bin" / "compute-sanitizer" for place in places):
        found = found or (str(place) if place.is_file() else None)
    if found is None:
        raise FileNotFoundError(
            "compute-sanitizer is neither on the PATH nor in /usr/local/cuda/bin: it comes with "
            "the CUDA toolkit"
        )
    return found


def run_tool(name: str, which: str) -> tuple[Found, str]:
    """Run cases under a tool; gives its totals and all that was printed."""
    command = [find_sanitizer(), "--tool", name, "--error-exitcode", str(ERROR_CODE)]
    command += ["--target-processes", "application-only", *TOOLS[name].options]
    command += [sys.executable, "-m", "benchmarks.kernels.sanitize", "--cases", which]
    # torch's allocator would hand out parts of one large allocation, and hide a step beyond.
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    found = summary(done.stdout)
    if found.errors == 0 and done.returncode:
        found = Found(None)  # a case failed, and the tool has nothing to do with it
    return found, done.stdout


def _compile() -> None:
    """Run all cases without a tool: their kernels are then in Triton's cache on disk."""
    command = [sys.executable, "-m", "benchmarks.kernels.sanitize", "--cases", "all"]
    subprocess.run(command, cwd=ROOT, check=True)


def run_tools(names: Sequence[str]) -> int:
    """Compile, plant, check; 1 if anything was found, or if the checks prove nothing."""
    _compile()
    found, printed = run_tool("memcheck", "planted")
    if not found.errors:
        print(printed[-3000:])
        print("FAIL planted: the tool did not find an error that is there")
        return 1
    print(f"ok   planted: found, {found.errors} errors")
    failures = 0
    for name in names:
        begin = time.perf_counter()
        found, printed = run_tool(name, TOOLS[name].cases)
        failures += found.errors != 0
        if found.errors != 0:
            print(printed[-6000:])
        errors = "it did not come to its end" if found.errors is None else f"{found.errors} errors"
        print(
            f"{'FAIL' if found.errors != 0 else 'ok  '} {name}: {errors}, {found.warnings} "
            f"warnings, {TOOLS[name].cases} cases, {time.perf_counter() - begin:.0f} s",
            flush=True,
        )
    return 1 if failures else 0


def main() -> int:
    """Run the tools, or the cases alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", default=",".join(TOOLS), help="default: %(default)s")
    parser.add_argument(
        "--cases", choices=["all", "few", "planted"], help="run these here, without a tool"
    )
    args = parser.parse_args()
    if args.cases:
        return run_cases(args.cases)
    unknown = set(args.tools.split(",")) - set(TOOLS)
    if unknown:
        parser.error(f"--tools: {', '.join(sorted(unknown))}: choose of {', '.join(TOOLS)}")
    return run_tools(args.tools.split(","))


if __name__ == "__main__":
    sys.exit(main())
