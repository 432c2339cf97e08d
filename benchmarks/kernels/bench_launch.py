"""What a launch takes the host: ours, that remember what was compiled, against Triton's own.

    python -m benchmarks.kernels.bench_launch --out launch.jsonl

For the kernels of a step with prefill, in Qwen3-4B's shape: microseconds of the host a call,
wrapper included, medians of 20 times 36 calls, in turn. `in_graph_us` is what the device takes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks.kernels import bench_prefill, bench_seal, common  # noqa: E402
from benchmarks.kernels.budgets import BUDGETS, make_benchmark_geometry  # noqa: E402
from benchmarks.kernels.prefill_step import DTYPE, Ours, Step  # noqa: E402
from tangram.kernels.decode import kernel as decode  # noqa: E402
from tangram.kernels.decode import schedule_kernel as schedule  # noqa: E402
from tangram.kernels.flash import kernel as flash  # noqa: E402
from tangram.kernels.launch import Remembering  # noqa: E402
from tangram.kernels.prefill import choose_blocks  # noqa: E402
from tangram.kernels.prefill import kernel as prefill  # noqa: E402
from tangram.kernels.seal_decode import kernel as seal  # noqa: E402
from tangram.kernels.sizes import shared_bytes  # noqa: E402
from tangram.kernels.store import kernel as store  # noqa: E402
from tangram.kernels.store_queries import kernel as store_queries  # noqa: E402
from tests.kernels import test_decode  # noqa: E402

CALLS, REPEATS = 36, 20
MODULES = (decode, schedule, flash, prefill, seal, store, store_queries)


@contextmanager
def triton_alone() -> Iterator[None]:
    """Kernels without what we put around them."""
    replaced: list[tuple[ModuleType, str, Remembering]] = []
    for module in MODULES:
        for name, value in list(vars(module).items()):
            if isinstance(value, Remembering):
                replaced.append((module, name, value))
                setattr(module, name, value.kernel)
    assert replaced
    try:
        yield
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


def host_us(call: Callable[[], object]) -> float:
    """Microseconds until a call returns."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def both_ways(call: Callable[[], object]) -> tuple[float, float]:
    """Medians of ours and of Triton alone, in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(REPEATS + 1):
        ours = host_us(call)
        with triton_alone():
            plain = host_us(call)
        if turn:  # the first one compiles
            times[0].append(ours)
            times[1].append(plain)
    return statistics.median(times[0]), statistics.median(times[1])


def calls(args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Name -> one call."""
    server = bench_seal.make_server(64, args.seed)
    view = server.view([])
    tables = server.tables([0])
    g = make_benchmark_geometry(args.retention, "qwen3-4b", BUDGETS[0], seed=args.seed)
    step = Step(g, 1024, 1280, args.seed)
    blocks = choose_blocks(128, DTYPE.itemsize, shared_bytes(torch.device("cuda")))
    triton_only = Ours(step, blocks)
    lengths = [1000 + 7 * i for i in range(16)]
    geometry = test_decode.llama_like(layers=1)
    case = test_decode.make_case(
        geometry, lengths, device="cuda", dtype=torch.bfloat16, programs=264
    )
    found: dict[str, Callable[[], object]] = {
        "store": lambda: server.store(0),
        "store queries": lambda: server.store_queries(0, view),
        "seal": lambda: server.seal(tables, view, "key_diff"),
        "decode and combine": lambda: test_decode.launch(case),
        "prefill": lambda: triton_only.layer(0),
    }
    attention = bench_prefill.find_attention(args, g)
    if attention is not None:
        large = Ours(step, blocks, attention)
        found["prefill with FlashAttention 3"] = lambda: large.layer(0)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--retention", type=Path, help="npz file of retention shares")
    parser.add_argument("--no-flash", action="store_true", help="without FlashAttention 3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file that the JSON lines are added to")
    args = parser.parse_args()
    about = {"benchmark": "launch", **common.provenance(args.seed)}
    common.warm_up()
    for name, call in calls(args).items():
        ours, plain = both_ways(call)
        device = common.time_graph(lambda call=call: [call() for _ in range(CALLS)])
        line = {
            "call": name,
            "host_us": ours,
            "triton_host_us": plain,
            "in_graph_us": device.median_ms / CALLS * 1e3,
        }
        common.write_line(args.out, {**about, **line})
        print(f"{name}: {ours:.1f} us, Triton alone {plain:.1f}, device {line['in_graph_us']:.1f}")


if __name__ == "__main__":
    main()
