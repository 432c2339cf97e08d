"""Prefill attention of a long prompt, in steps, against FlashAttention 3 on the same prompt.

    python benchmarks/kernels/bench_prefill.py --retention FILE --out prefill.jsonl

For every chunk size the result is checked against the reference first; then each step runs
through all layers, alternating with as many calls of FlashAttention 3 (causal, over all tokens so
far, keys and values contiguous). One JSON line a step, and one for the prompt. `--sweep` tries
tiles first and goes on with the fastest.

Budgets come from a file of retention shares, [samples, layers, KV heads] (mean plus two deviations,
scaled to the ratio); without one from `exp(N(0, 0.8))` for every head, scaled likewise.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tangram.budgets.grouping import cluster_heads, head_groups, of_groups  # noqa: E402
from tangram.budgets.threshold import scale_to_total  # noqa: E402
from tangram.geometry import Geometry, HeadGroups  # noqa: E402
from tangram.kernels.attend.reference import attend  # noqa: E402
from tangram.kernels.prefill import (  # noqa: E402
    Blocks,
    choose_blocks,
    make_head_table,
    make_tiles,
    prefill_attention,
)
from tangram.kernels.segments import Segments, cut_step  # noqa: E402
from tests.kernels.inputs import (  # noqa: E402
    TOLERANCE,
    Pool,
    fill_step_chunks,
    make_pool,
    relative_error,
)

DTYPE = torch.bfloat16
DEVICE = "cuda"
P, S, W, GROUP = 16, 4, 32, 4
SWEEP = {
    64: [(128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3)],
    128: [
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (128, 32, 4, 3),
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 4, 2),
    ],
    256: [(128, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 3), (64, 32, 4, 2), (64, 64, 4, 2)],
}  # fmt: skip


def retention_groups(args: argparse.Namespace, chunk_size_tokens: int) -> HeadGroups:
    """Head groups and pages with the spread of the retention file, at the ratio."""
    if args.retention:
        share = np.load(args.retention)[args.retention_key].astype(np.float64)
        demand = np.clip(share.mean(axis=0) + 2 * share.std(axis=0), 1e-6, 1.0)
    else:
        spread = np.random.default_rng(args.seed).normal(0, 0.8, (args.layers, args.kv_heads))
        demand = np.clip(0.2 * np.exp(spread), 1e-6, 1.0)
    heads = cluster_heads(GROUP, demand)
    wanted = of_groups(demand, heads).max(axis=-1)
    most = chunk_size_tokens // P
    total = round(args.ratio * most * wanted.size)
    pages = scale_to_total(wanted.reshape(-1), total, 1, most).reshape(wanted.shape)
    return head_groups(heads, pages)


def make_layout(args: argparse.Namespace, chunk_size_tokens: int, head_size: int) -> Geometry:
    """The cache's layout for a chunk size."""
    groups = retention_groups(args, chunk_size_tokens)
    return Geometry(
        head_groups=groups,
        num_query_heads=groups.num_kv_heads * args.queries_per_kv_head,
        head_size=head_size,
        itemsize_bytes=DTYPE.itemsize,
        chunk_size_tokens=chunk_size_tokens,
        window_size_tokens=W,
        n_sink_tokens=S,
        page_size_rows=P,
    )


class Step:
    """One step of the prompt: positions [start, stop), with the cache as the step finds it."""

    def __init__(self, geometry: Geometry, start: int, stop: int, seed: int) -> None:
        self.geometry, self.count, self.stop = geometry, stop - start, stop
        self.pool: Pool = make_pool(
            geometry, [stop], dtype=DTYPE, device=DEVICE, seed=seed, step_tokens=[self.count]
        )
        fill_step_chunks(self.pool, [self.count])
        self.segments, _ = cut_step(geometry, np.array([0, self.count]), np.array([stop]))
        self.query = self.pool.random(self.count, geometry.num_query_heads, geometry.head_size)
        self.out = torch.empty_like(self.query)
        self.scale = geometry.head_size**-0.5
        self.head_tables = [
            torch.from_numpy(make_head_table(geometry, layer)).to(DEVICE)
            for layer in range(geometry.num_layers)
        ]

    def fill_all_layers(self) -> None:
        """Values instead of NaN everywhere: attention over NaN need not take as long."""
        base = self.pool.sealed_cache._base
        assert base is not None
        base.normal_(generator=self.pool.generator)

    def tiles(self, blocks: Blocks) -> Tensor:
        """The tile table on the device."""
        return torch.from_numpy(make_tiles(self.segments, self.geometry, blocks)).to(DEVICE)

    def run(self, layer: int, tiles: Tensor, blocks: Blocks) -> None:
        """Attention of one layer."""
        pool, first = self.pool, self.pool.recent_cache
        stride = first[0].numel()
        recent = torch.as_strided(first, first.shape, first.stride(), stride * layer)
        prefill_attention(
            self.query,
            tiles,
            pool.sealed_cache,
            pool.sealed_table,
            recent,
            pool.recent_table,
            head_table=self.head_tables[layer],
            softmax_scale=self.scale,
            out=self.out,
            blocks=blocks,
        )

    def run_all(self, layers: Sequence[int], tiles: Tensor, blocks: Blocks) -> None:
        """Attention of some layers, one after the other."""
        for layer in layers:
            self.run(layer, tiles, blocks)

    def check(self, blocks: Blocks) -> float:
        """Relative error of layer 0 at the first and last segments; NaN lies around the rows."""
        self.out.fill_(torch.nan)
        self.run(0, self.tiles(blocks), blocks)
        order = np.arange(len(self.segments))
        some: Segments = self.segments.take(np.unique(np.concatenate([order[:2], order[-2:]])))
        expected = torch.full_like(self.query, torch.nan, dtype=torch.float32)
        pool = self.pool
        attend(
            self.query, some, pool.sealed_cache, pool.sealed_table, pool.recent_cache,
            pool.recent_table, geometry=self.geometry, layer=0, softmax_scale=self.scale,
            out=expected,
        )  # fmt: skip
        if self.out.isnan().any():
            return math.nan
        rows = ~expected[:, 0, 0].isnan()
        return relative_error(self.out[rows], expected[rows])

    def flops(self) -> float:
        """Of the products with keys and values that the queries see, over all layers."""
        g, position = self.geometry, np.arange(self.stop - self.count, self.stop)
        C = g.chunk_size_tokens
        sealed = position // C
        raw = g.num_layers * g.num_kv_heads * (position + 1 - np.maximum(0, sealed * C - W)).sum()
        kept = 0
        for layer, groups in enumerate(g.head_groups.pages):
            for group in range(len(groups)):
                rows = sealed * g.budget_rows(layer, group)
                rows -= (sealed > 0) * g.first_row(layer, group, 0)
                kept += GROUP * int(rows.sum())
        return 4.0 * g.head_size * g.queries_per_kv_head * (int(raw) + kept)


class FlashAttention:
    """Causal attention of the same step over all tokens so far."""

    def __init__(self, step: Step) -> None:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        g = step.geometry
        pool = step.pool
        self.call: Callable[..., Any] = flash_attn_varlen_func
        self.arguments = dict(
            q=step.query,
            k=pool.random(step.stop, g.num_kv_heads, g.head_size),
            v=pool.random(step.stop, g.num_kv_heads, g.head_size),
            max_seqlen_q=step.count,
            cu_seqlens_q=torch.tensor([0, step.count], dtype=torch.int32, device=DEVICE),
            max_seqlen_k=step.stop,
            cu_seqlens_k=torch.tensor([0, step.stop], dtype=torch.int32, device=DEVICE),
            softmax_scale=step.scale,
            causal=True,
            out=torch.empty_like(step.query),
            fa_version=3,
        )
        position = np.arange(step.stop - step.count, step.stop)
        pairs = g.num_layers * g.num_query_heads * int((position + 1).sum())
        self.flops = 4.0 * g.head_size * pairs

    def run(self, layers: int) -> None:
        """As many calls."""
        for _ in range(layers):
            self.call(**self.arguments)


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
        error, tiles = step.check(blocks), step.tiles(blocks)
        if not error < TOLERANCE[DTYPE]:
            print(f"  {blocks}: wrong, relative error {error}")
            continue
        runs[blocks] = partial(step.run_all, layers, tiles, blocks)
    step.fill_all_layers()
    times = alternate({str(blocks): run for blocks, run in runs.items()}, 5)
    flops = step.flops() * len(layers) / step.geometry.num_layers  # about, layers differ
    best, best_ms = next(iter(runs)), math.inf
    for blocks in runs:
        ms = statistics.median(times[str(blocks)])
        print(f"  {blocks}: {ms:.2f} ms, about {flops / ms / 1e9:.0f} TFLOP/s")
        if ms < best_ms:
            best, best_ms = blocks, ms
    return best


def compile_one(args: argparse.Namespace, chunk: int, head_size: int, blocks: Blocks) -> None:
    """Fill Triton's cache, in a process of its own."""
    step = Step(make_layout(args, chunk, head_size), 0, 16, 0)
    step.run(0, step.tiles(blocks), blocks)
    torch.cuda.synchronize()


def measure(args: argparse.Namespace, geometry: Geometry, blocks: Blocks) -> Iterator[dict]:
    """One record a step, and one for the prompt."""
    total: dict[str, float] = {}
    for start in range(0, args.tokens, args.step):
        step = Step(geometry, start, min(start + args.step, args.tokens), args.seed)
        error = step.check(blocks)
        if not error < TOLERANCE[DTYPE]:
            raise SystemExit(f"wrong at step {start}: relative error {error}")
        step.fill_all_layers()
        tiles, layers = step.tiles(blocks), range(geometry.num_layers)
        runs = {"ours": partial(step.run_all, layers, tiles, blocks)}
        flops = {"ours": step.flops()}
        if not args.no_flash:
            flash = FlashAttention(step)
            runs["flash"] = partial(flash.run, geometry.num_layers)
            flops["flash"] = flash.flops
        times = alternate(runs, args.repeats)
        record: dict[str, Any] = {"start": start, "stop": step.stop, "relative_error": error}
        for name, values in times.items():
            record[f"{name}_ms"] = statistics.median(values)
            record[f"{name}_spread_ms"] = max(values) - min(values)
            record[f"{name}_tflops"] = flops[name] / record[f"{name}_ms"] / 1e9
            total[f"{name}_ms"] = total.get(f"{name}_ms", 0) + record[f"{name}_ms"]
            total[f"{name}_flop"] = total.get(f"{name}_flop", 0) + flops[name]
        yield record
    for name in ("ours", "flash"):
        if f"{name}_ms" in total:
            total[f"{name}_tflops"] = total[f"{name}_flop"] / total[f"{name}_ms"] / 1e9
    if "flash_ms" in total:
        total["time_over_flash"] = total["ours_ms"] / total["flash_ms"]
    yield {"start": 0, "stop": args.tokens, **total}


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """What a figure depends on."""
    import triton

    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "benchmark": "prefill",
        "device": torch.cuda.get_device_name(),
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "command": " ".join(sys.argv),
        "seed": args.seed,
    }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--retention", help="npz file of retention shares")
    parser.add_argument("--retention-key", default="qwen3-4b/snapkv/perlayer")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--queries-per-kv-head", type=int, default=4)
    parser.add_argument("--head-sizes", type=int, nargs="+", default=[128])
    parser.add_argument("--chunk-sizes", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--step", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sweep", action="store_true", help="try tiles, go on with the fastest")
    parser.add_argument("--no-flash", action="store_true", help="without FlashAttention 3")
    parser.add_argument("--out", help="file that the JSON lines are added to")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = parse_arguments()
    cases = [(chunk, size) for size in args.head_sizes for chunk in args.chunk_sizes]
    tried = {
        size: [Blocks(*numbers) for numbers in SWEEP[size]]
        if args.sweep
        else [choose_blocks(size, DTYPE.itemsize)]
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
    about = environment(args)
    for chunk, size in cases:
        geometry = make_layout(args, chunk, size)
        blocks = tried[size][0]
        if args.sweep:
            print(f"head size {size}, chunks of {chunk}:")
            step = Step(geometry, max(0, args.tokens - args.step), args.tokens, args.seed)
            last = geometry.num_layers - 1
            blocks = sweep(step, tried[size], sorted({0, last // 3, 2 * last // 3, last}))
            del step
        for record in measure(args, geometry, blocks):
            line = {
                **about, "head_size": size, "chunk_size_tokens": chunk, "ratio": args.ratio,
                "blocks": vars(blocks), **record,
            }  # fmt: skip
            if args.out:
                with open(args.out, "a") as file:
                    file.write(json.dumps(line) + "\n")
            shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}
            print(f"D={size} C={chunk} {json.dumps(shown)}", flush=True)


if __name__ == "__main__":
    main()
