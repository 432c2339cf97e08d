"""Prefill attention of a long prompt, in steps, against FlashAttention 3 on the same prompt.

    python -m benchmarks.kernels.bench_prefill --retention FILE --out prefill.jsonl

For every chunk size the results are checked against the reference first; then each step runs
through all layers, in turn:

- `triton`: one kernel over sealed pages and raw tokens;
- `with_fa3`: the sealed part by FlashAttention 3, as a server does it above `MIN_PAIRS`; of it
  `sealed_part` alone, and of that `gather` alone, what is done before FlashAttention is called;
- `full_fa3`: as many calls of FlashAttention 3, causal, over all tokens so far, keys and values
  contiguous.

One JSON line a step, and one for the prompt. Then steps of a next turn's size after histories of
some lengths, a line each: as they are served, cut and shared out on the device (`extend_graph_ms`),
the two ways of large steps, and FlashAttention 3 over all tokens, whose step is as much shorter as
its hits are finer (`full_fa3_graph_ms`). Then `triton` and `with_fa3` for steps of some sizes
after some sealed chunks, a line each: where the second begins to pay, `MIN_PAIRS` should be. Both
are timed as replays of a graph too (`_graph_ms`), because small steps wait for their launches.
`--sweep` tries tiles first and goes on with the fastest.

Budgets are those of `budgets.py`, from a file of retention shares or made up.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks.kernels import common  # noqa: E402
from benchmarks.kernels.budgets import BUDGETS, SHAPES, make_benchmark_geometry  # noqa: E402
from benchmarks.kernels.prefill_step import (  # noqa: E402
    DEVICE,
    DTYPE,
    Extend,
    FlashAttention,
    Ours,
    Step,
)
from tangram.geometry import Geometry  # noqa: E402
from tangram.kernels.flash import PagedAttention, fits, sealed_pairs  # noqa: E402
from tangram.kernels.prefill import Blocks, choose_blocks  # noqa: E402
from tangram.kernels.sizes import shared_bytes  # noqa: E402
from tests.kernels.inputs import TOLERANCE  # noqa: E402
from tests.kernels.paged_attention import paged_attention  # noqa: E402

NEXT_TURN_TOKENS, NEXT_TURN_AFTER = 214, (8_192, 47_104, 114_688)
THRESHOLD_TOKENS = (256, 1024, 8192)
THRESHOLD_CHUNKS = (1, 4, 16, 64, 128)
SWEEP = {
    64: [(128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3)],
    128: [
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (128, 32, 4, 3),
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 4, 2),
    ],
    256: [(128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 3), (64, 32, 4, 2), (64, 64, 4, 2)],
}  # fmt: skip


def make_layout(args: argparse.Namespace, chunk_size_tokens: int, head_size: int) -> Geometry:
    """The cache's layout for a chunk size."""
    return make_benchmark_geometry(
        args.retention,
        args.model,
        args.budgets,
        ratio=args.ratio,
        chunk_size_tokens=chunk_size_tokens,
        head_size=head_size,
        seed=args.seed,
    )


def no_attention(**arguments: Any) -> tuple[Tensor, Tensor]:
    """Stands for FlashAttention where only what comes before it is timed."""
    return arguments["out"], arguments["out"]


def milliseconds(run: Callable[[], object]) -> float:
    """Time of `run` on the device."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def alternate(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Times of each, taken in turns after a first round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            times[name].append(milliseconds(run))
    return {name: values[1:] for name, values in times.items()}


def sweep(step: Step, candidates: list[Blocks], layers: list[int]) -> Blocks:
    """The fastest tiles on some layers; prints each one's time."""
    runs = {}
    for blocks in candidates:
        ours = Ours(step, blocks)
        error = ours.check()
        if not error < TOLERANCE[DTYPE]:
            print(f"  {blocks}: wrong, relative error {error}")
            continue
        runs[blocks] = partial(ours.run, layers)
    step.fill_all_layers()
    times = alternate({str(blocks): run for blocks, run in runs.items()}, 5)
    flops = sum(step.flops()) * len(layers) / step.geometry.num_layers  # about, layers differ
    best, best_ms = next(iter(runs)), math.inf
    for blocks in runs:
        ms = statistics.median(times[str(blocks)])
        print(f"  {blocks}: {ms:.2f} ms, about {flops / ms / 1e9:.0f} TFLOP/s")
        if ms < best_ms:
            best, best_ms = blocks, ms
    return best


def compile_one(args: argparse.Namespace, chunk: int, head_size: int, blocks: Blocks) -> None:
    """Fill Triton's cache, in a process of its own."""
    step = Step(make_layout(args, chunk, head_size), chunk, chunk + 16, 0)
    for attention in (None, paged_attention):
        Ours(step, blocks, attention).layer(0)
    torch.cuda.synchronize()


def checked(step: Step, blocks: Blocks, attention: PagedAttention | None) -> tuple[Ours, float]:
    """One side with its relative error; exits where that is too large."""
    ours = Ours(step, blocks, attention)
    error = ours.check()
    if not error < TOLERANCE[DTYPE]:
        side = "triton" if attention is None else "with_fa3"
        raise SystemExit(f"{side} is wrong at step {step.stop - step.count}: {error}")
    return ours, error


def measure(
    args: argparse.Namespace, geometry: Geometry, blocks: Blocks, attention: PagedAttention | None
) -> Iterator[dict]:
    """One record a step, and one for the prompt."""
    total: dict[str, float] = {}
    layers = range(geometry.num_layers)
    for start in range(0, args.tokens, args.step):
        step = Step(geometry, start, min(start + args.step, args.tokens), args.seed)
        kept, raw = step.flops()
        triton, error = checked(step, blocks, None)
        record: dict[str, Any] = {"start": start, "stop": step.stop, "relative_error": error}
        runs: dict[str, Callable[[], object]] = {"triton": partial(triton.run, layers)}
        flops = {"triton": kept + raw}
        if attention is not None:
            both, record["relative_error_with_fa3"] = checked(step, blocks, attention)
            full = FlashAttention(step)
            runs["with_fa3"] = partial(both.run, layers)
            if both.sealed is not None:
                runs["sealed_part"] = partial(both.run_sealed, layers, attention)
                runs["gather"] = partial(both.run_sealed, layers, no_attention)
            runs["full_fa3"] = partial(full.run, geometry.num_layers)
            flops |= {"with_fa3": kept + raw, "sealed_part": kept, "full_fa3": full.flops}
        step.fill_all_layers()
        for name, values in alternate(runs, args.repeats).items():
            ms = record[f"{name}_ms"] = statistics.median(values)
            record[f"{name}_spread_ms"] = max(values) - min(values)
            total[f"{name}_ms"] = total.get(f"{name}_ms", 0) + ms
            if name in flops:
                record[f"{name}_tflops"] = flops[name] / ms / 1e9
                total[f"{name}_flop"] = total.get(f"{name}_flop", 0) + flops[name]
        yield record
    for name in ("triton", "with_fa3", "sealed_part", "full_fa3"):
        if f"{name}_ms" in total:
            total[f"{name}_tflops"] = total[f"{name}_flop"] / total[f"{name}_ms"] / 1e9
    if "full_fa3_ms" in total:
        for name in ("triton", "with_fa3"):
            total[f"{name}_over_full_fa3"] = total[f"{name}_ms"] / total["full_fa3_ms"]
    yield {"start": 0, "stop": args.tokens, **total}


def threshold(
    args: argparse.Namespace, geometry: Geometry, blocks: Blocks, attention: PagedAttention
) -> Iterator[dict]:
    """One record a step of some size after some sealed chunks: both ways' times."""
    layers = range(geometry.num_layers)
    for tokens in THRESHOLD_TOKENS:
        for chunks in THRESHOLD_CHUNKS:
            start = chunks * geometry.chunk_size_tokens
            step = Step(geometry, start, start + tokens, args.seed)
            sides = {
                name: checked(step, blocks, side)[0]
                for name, side in (("triton", None), ("with_fa3", attention))
            }
            step.fill_all_layers()
            runs = {name: partial(side.run, layers) for name, side in sides.items()}
            record: dict[str, Any] = {
                "threshold_tokens": tokens,
                "sealed_chunks": chunks,
                "pairs": sealed_pairs(geometry, step.segments),
            }
            for name, values in alternate(runs, 3).items():
                record[f"{name}_ms"] = statistics.median(values)
            for name, run in runs.items():
                timing = common.time_graph(run, replays=3, warmup=1)
                record[f"{name}_graph_ms"] = timing.median_ms
            for kind in ("ms", "graph_ms"):
                record[f"ratio_{kind}"] = record[f"with_fa3_{kind}"] / record[f"triton_{kind}"]
            yield record


def next_turns(
    args: argparse.Namespace, geometry: Geometry, blocks: Blocks, attention: PagedAttention | None
) -> Iterator[dict]:
    """One record a history's length: a next turn's step by every way, replays of a graph."""
    layers = range(geometry.num_layers)
    for start in NEXT_TURN_AFTER:
        stop = start + NEXT_TURN_TOKENS + geometry.chunk_size_tokens // 2
        step = Step(geometry, start, stop, args.seed)
        sides: dict[str, Ours] = {
            "triton": checked(step, blocks, None)[0],
            "extend": Extend(step, blocks),
        }
        error = sides["extend"].check()
        if not error < TOLERANCE[DTYPE]:
            raise SystemExit(f"extend is wrong after {start} tokens: {error}")
        runs = {name: partial(side.run, layers) for name, side in sides.items()}
        if attention is not None:
            runs["with_fa3"] = partial(checked(step, blocks, attention)[0].run, layers)
            full = FlashAttention(Step(geometry, stop - NEXT_TURN_TOKENS, stop, args.seed))
            runs["full_fa3"] = partial(full.run, geometry.num_layers)
        step.fill_all_layers()
        record: dict[str, Any] = {"next_turn_after": start, "tokens": stop - start}
        for name, run in runs.items():
            record[f"{name}_graph_ms"] = common.time_graph(run, replays=5, warmup=1).median_ms
        yield record


def find_attention(args: argparse.Namespace, geometry: Geometry) -> PagedAttention | None:
    """FlashAttention 3 as a server finds it; exits where it is asked for and not there."""
    if args.no_flash:
        return None
    from tangram.vllm_plugin.worker.runners.flash import find_flash_attention

    assert fits(geometry)
    found = find_flash_attention(geometry, DTYPE, torch.device(DEVICE))
    if found is None:
        raise SystemExit("vLLM has no FlashAttention 3 that is right here: give --no-flash")
    return found


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--retention", type=Path, help="npz file of retention shares")
    parser.add_argument("--model", choices=SHAPES, default="qwen3-4b", help="whose layers")
    parser.add_argument("--budgets", choices=BUDGETS, default=BUDGETS[0])
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--head-sizes", type=int, nargs="+", default=[128])
    parser.add_argument("--chunk-sizes", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--step", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sweep", action="store_true", help="try tiles, go on with the fastest")
    parser.add_argument("--no-flash", action="store_true", help="without FlashAttention 3")
    parser.add_argument("--no-threshold", action="store_true", help="without the small steps")
    parser.add_argument("--out", type=Path, help="file that the JSON lines are added to")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = parse_arguments()
    cases = [(chunk, size) for size in args.head_sizes for chunk in args.chunk_sizes]
    tried = {
        size: [Blocks(*numbers) for numbers in SWEEP[size]]
        if args.sweep
        else [choose_blocks(size, DTYPE.itemsize, shared_bytes(torch.device("cuda")))]
        for size in args.head_sizes
    }
    with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
        jobs = {
            (chunk, size, blocks): pool.submit(compile_one, args, chunk, size, blocks)
            for chunk, size in cases
            for blocks in tried[size]
        }
        for (_, size, blocks), job in jobs.items():
            if not args.sweep:
                job.result()
            elif job.exception() and blocks in tried[size]:  # too large for the device, say
                print(f"  {blocks}: {job.exception()!r:.200}")
                tried[size].remove(blocks)
    about = {"benchmark": "prefill", **common.provenance(args.seed)}
    common.warm_up()
    for chunk, size in cases:
        geometry = make_layout(args, chunk, size)
        attention = find_attention(args, geometry)
        blocks = tried[size][0]
        if args.sweep:
            print(f"head size {size}, chunks of {chunk}:")
            step = Step(geometry, max(0, args.tokens - args.step), args.tokens, args.seed)
            last = geometry.num_layers - 1
            blocks = sweep(step, tried[size], sorted({0, last // 3, 2 * last // 3, last}))
            del step
        records = [measure(args, geometry, blocks, attention)]
        if chunk == args.chunk_sizes[0]:
            records.append(next_turns(args, geometry, blocks, attention))
        if attention is not None and chunk == args.chunk_sizes[0] and not args.no_threshold:
            records.append(threshold(args, geometry, blocks, attention))
        case = {"head_size": size, "chunk_size_tokens": chunk, "ratio": args.ratio}
        for record in itertools.chain(*records):
            common.write_line(args.out, {**about, **case, "blocks": vars(blocks), **record})
            shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}
            print(f"D={size} C={chunk} {json.dumps(shown)}", flush=True)


if __name__ == "__main__":
    main()
