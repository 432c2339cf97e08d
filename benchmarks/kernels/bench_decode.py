"""Ragged decode attention against FlashAttention 3, on drawn lengths and the budgets of real heads.

    python -m benchmarks.kernels.bench_decode --retention FILE --out decode.jsonl

Each case is a whole stack of layers in one CUDA graph, every layer with memory of its own, so that
the L2 cache helps nobody. The result is checked against the reference first. FlashAttention 3 (that
of vLLM, where it is installed) runs in the same process, on every request's mean rows a head, which
are the same lengths' pattern and the same bytes, and on every head's rows as a sequence of its own;
its better number of splits counts. Bytes are those of the rows that queries see. `--sweep` tries
configurations and goes on with the fastest.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.kernels import common
from benchmarks.kernels.budgets import BUDGETS, SHAPES, make_benchmark_geometry
from benchmarks.loads import LOADS, draw
from tangram.geometry import Geometry
from tangram.kernels.cache_view import CacheView
from tangram.kernels.decode import PROGRAMS_PER_SM, DecodeTables, DecodeWorkspace, reference
from tangram.kernels.decode.kernel import (
    LaunchConfig,
    decode_attention,
    launch_config,
)
from tangram.kernels.decode.schedule_kernel import schedule
from tests.kernels.inputs import TOLERANCE, Pool, make_stack, relative_error

FA3_SPLITS = (0, 32)  # its own choice, and vLLM's bound under CUDA graphs
SWEEP = [
    (heads, LaunchConfig(tile, warps, stages))
    for heads, tile, warps, stages in (
        (4, 64, 4, 3), (4, 64, 4, 4), (4, 64, 8, 3), (4, 64, 2, 3), (4, 128, 8, 3),
        (2, 32, 2, 5), (2, 32, 4, 5), (2, 32, 2, 4), (2, 64, 4, 3),
        (1, 32, 2, 5), (1, 64, 4, 3), (1, 16, 1, 7),
    )
]  # fmt: skip


class Case(NamedTuple):
    """What is attended to."""

    model: str
    budgets: str
    load: str
    lengths: tuple[int, ...]


def head_rows(g: Geometry, layer: int, seq_len: int) -> list[int]:
    """Rows that the query sees of every KV head, heads in the order of their groups."""
    chunks = (seq_len - 1) // g.chunk_size_tokens
    raw = seq_len - g.recent_start(seq_len - 1)
    rows = []
    for group, heads in enumerate(g.head_groups.heads[layer]):
        sealed = chunks * g.budget_rows(layer, group)
        sealed -= g.first_row(layer, group, 0) * (chunks > 0)
        rows += [sealed + raw] * len(heads)
    return rows


def request_rows(g: Geometry, length: int) -> int:
    """Rows that the query of a request sees, over all heads and layers."""
    return sum(sum(head_rows(g, layer, length)) for layer in range(g.num_layers))


def kv_bytes(g: Geometry, case: Case) -> int:
    """Bytes of all rows that a step sees, in all layers."""
    return sum(request_rows(g, length) for length in case.lengths) * g.row_bytes


class Ours:
    """The kernel over a stack of layers."""

    def __init__(self, g: Geometry, case: Case, buffer: Tensor):
        self.case, self.geometry = case, g
        self.stack = make_stack(g, case.lengths, buffer)
        shape = (len(case.lengths), g.num_query_heads, g.head_size)
        self.query = torch.randn(shape, device="cuda").to(buffer.dtype)
        self.out = torch.full_like(self.query, torch.nan)
        self.seq_lens = torch.tensor(case.lengths, dtype=torch.int32).cuda()
        self.query_start = torch.arange(len(case.lengths) + 1, dtype=torch.int32).cuda()
        self.scale = g.head_size**-0.5

    def prepare(
        self, config: LaunchConfig | None, programs_per_sm: float, heads: int | None = None
    ) -> None:
        """Make the tables."""
        g, self.config = self.geometry, config
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        self.tables = DecodeTables.of(g, "cuda", heads)
        self.workspace = DecodeWorkspace.allocate(self.tables, round(programs_per_sm * sms))

    def inputs(self, pool: Pool, requests: slice = slice(None)) -> tuple[Tensor, CacheView]:
        """What the kernel and the reference take."""
        view = CacheView(
            sealed=pool.sealed_cache,
            sealed_table=pool.sealed_table[requests],
            recent=pool.recent_cache,
            recent_table=pool.recent_table[requests],
            query_start=self.query_start,
            seq_lens=self.seq_lens[requests],
        )
        return self.query[requests], view

    def layer(self, index: int) -> None:
        """One layer's call."""
        decode_attention(
            *self.inputs(self.stack[index]),
            tables=self.tables,
            layer=index,
            softmax_scale=self.scale,
            out=self.out,
            workspace=self.workspace,
            config=self.config,
        )

    def schedule(self) -> None:
        """Find where the programs of all layers start."""
        _, view = self.inputs(self.stack[0])
        schedule(view, len(self.case.lengths), self.tables, self.workspace)

    def run(self) -> None:
        """A step: the lengths once, and all layers."""
        self.schedule()
        for index in range(len(self.stack)):
            self.layer(index)

    def error(self, layer: int) -> float:
        """Against the reference, for the longest and the shortest request and the last one."""
        self.out.fill_(torch.nan)
        self.schedule()
        self.layer(layer)
        errors, lengths = [], self.case.lengths
        some = {lengths.index(max(lengths)), lengths.index(min(lengths)), len(lengths) - 1}
        for requests in (slice(index, index + 1) for index in some):
            expected = torch.empty_like(self.out[requests], dtype=torch.float32)
            reference.decode_attention(
                *self.inputs(self.stack[layer], requests),
                tables=self.tables,
                layer=layer,
                softmax_scale=self.scale,
                out=expected,
            )
            errors.append(relative_error(self.out[requests], expected))
        return max(errors)


class FlashAttention3:
    """vLLM's FlashAttention 3 over paged sequences, one query each, layer after layer."""

    def __init__(self, lengths: list[list[int]], heads: int, per: int, size: int, page: Callable):
        """Lengths [layers][sequences]; `page(layer, pages)` gives paged keys and values."""
        from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

        self.attend, self.schedule = flash_attn_varlen_func, get_scheduler_metadata
        self.heads, self.per, self.size = heads, per, size
        count = len(lengths[0])
        self.query = torch.randn(count, heads * per, size, device="cuda").bfloat16()
        self.out = torch.empty_like(self.query)
        self.starts = torch.arange(count + 1, dtype=torch.int32, device="cuda")
        self.layers = []
        for layer, of_layer in enumerate(lengths):
            pages = [-(-n // 16) for n in of_layer]
            order = torch.randperm(sum(pages), dtype=torch.int32)
            table = torch.zeros(count, max(pages), dtype=torch.int32)
            for row, part in enumerate(order.split(pages)):
                table[row, : len(part)] = part
            key, value = page(layer, sum(pages))
            used = torch.tensor(of_layer, dtype=torch.int32, device="cuda")
            self.layers.append((key, value, used, table.cuda(), max(of_layer)))

    def work(self, splits: int) -> Callable[[], None]:
        """All layers, scheduled beforehand as vLLM does once a step."""
        plans = [
            self.schedule(
                batch_size=len(used),
                max_seqlen_q=1,
                max_seqlen_k=longest,
                num_heads_q=self.heads * self.per,
                num_heads_kv=self.heads,
                headdim=self.size,
                cache_seqlens=used,
                qkv_dtype=torch.bfloat16,
                cu_seqlens_q=self.starts,
                page_size=16,
                causal=True,
                num_splits=splits,
            )
            for _, _, used, _, longest in self.layers
        ]

        def run() -> None:
            for (key, value, used, table, longest), plan in zip(self.layers, plans, strict=True):
                self.attend(
                    q=self.query,
                    k=key,
                    v=value,
                    out=self.out,
                    cu_seqlens_q=self.starts,
                    max_seqlen_q=1,
                    seqused_k=used,
                    max_seqlen_k=longest,
                    softmax_scale=self.size**-0.5,
                    causal=True,
                    block_table=table,
                    scheduler_metadata=plan,
                    num_splits=splits,
                    fa_version=3,
                )

        return run


def equal_heads(g: Geometry, case: Case, buffer: Tensor) -> tuple[FlashAttention3, int]:
    """FlashAttention 3 on every request's mean rows a head, and its bytes."""
    heads = g.num_layers * g.num_kv_heads
    rows = [round(request_rows(g, length) / heads) for length in case.lengths]

    def page(layer: int, pages: int) -> tuple[Tensor, ...]:
        shape = (pages, 2, 16, g.num_kv_heads, g.head_size)
        size = pages * 32 * g.num_kv_heads * g.head_size
        return buffer[layer * size : (layer + 1) * size].view(shape).unbind(1)

    lengths = [rows] * g.num_layers
    made = FlashAttention3(lengths, g.num_kv_heads, g.queries_per_kv_head, g.head_size, page)
    return made, sum(rows) * g.token_bytes


def ragged(g: Geometry, case: Case, buffer: Tensor) -> FlashAttention3:
    """FlashAttention 3 on every head's rows as a sequence; a page is 16 rows of [K | V]."""
    used = 0

    def page(layer: int, pages: int) -> tuple[Tensor, ...]:
        nonlocal used
        size = pages * 16 * g.row_elements
        used += size
        part = buffer[used - size : used].view(pages, 16, 1, g.row_elements)
        return part.split(g.head_size, dim=-1)

    lengths = [
        [rows for length in case.lengths for rows in head_rows(g, layer, length)]
        for layer in range(g.num_layers)
    ]
    return FlashAttention3(lengths, 1, g.queries_per_kv_head, g.head_size, page)


def fastest(made: FlashAttention3) -> tuple[common.Timing, int]:
    """The better of its numbers of splits."""
    times = {splits: common.time_graph(made.work(splits)) for splits in FA3_SPLITS}
    best = min(times, key=lambda splits: times[splits].median_ms)
    return times[best], best


def measure(g: Geometry, case: Case, buffer: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """One case: the gate, ours, and both yardsticks."""
    ours, size = Ours(g, case, buffer), kv_bytes(g, case)
    ours.prepare(args.config, args.programs_per_sm, args.heads_per_program)
    error = max(ours.error(layer) for layer in (0, g.num_layers - 1))
    assert error < TOLERANCE[buffer.dtype], f"{case}: relative error {error}"
    timing = common.time_graph(ours.run, replays=args.replays)
    figures: dict[str, Any] = {
        **case._asdict(),
        "requests": len(case.lengths),
        "heads_per_program": ours.tables.heads_per_program,
        "config": args.config or launch_config(g.row_bytes),
        "programs_per_sm": args.programs_per_sm,
        "bytes_per_layer": size // g.num_layers,
        "error": error,
        **timing._asdict(),
        "tb_per_s": size / timing.median_ms / 1e9,
    }
    if not args.no_flash:
        flat, flat_bytes = equal_heads(g, case, buffer)
        yardsticks = (("equal_heads", flat, flat_bytes), ("ragged", ragged(g, case, buffer), size))
        for name, made, moved in yardsticks:
            timing, splits = fastest(made)
            figures |= {
                f"fa3_{name}_ms": timing.median_ms,
                f"fa3_{name}_num_splits": splits,
                f"fa3_{name}_tb_per_s": moved / timing.median_ms / 1e9,
            }
        figures["over_fa3_equal_heads"] = figures["tb_per_s"] / figures["fa3_equal_heads_tb_per_s"]
        figures["over_fa3_ragged"] = figures["tb_per_s"] / figures["fa3_ragged_tb_per_s"]
    return figures


def sweep(
    geometries: dict, cases: list[Case], buffer: Tensor, args: argparse.Namespace
) -> tuple[int, LaunchConfig, float]:
    """A line for every configuration, TB/s in every case; gives the best."""
    scores: dict[tuple[int, LaunchConfig, float], float] = {}
    made = {case: Ours(geometries[case[:2]], case, buffer) for case in cases}
    print("heads tile warps stages dependent programs/sm  " + " ".join(c.load for c in cases))
    for (heads, config), programs_per_sm in itertools.product(SWEEP, args.sweep_programs):
        line = []
        for case, ours in made.items():
            ours.prepare(config, programs_per_sm, heads)
            try:
                timing = common.time_graph(ours.run, replays=5, warmup=1)
            except Exception as error:  # a configuration that does not fit
                print(type(error).__name__, str(error)[:100])
                line.append(float("nan"))
                continue
            line.append(kv_bytes(ours.geometry, case) / timing.median_ms / 1e9)
            common.write_line(
                args.out,
                case._asdict()
                | config._asdict()
                | {"heads": heads, "programs_per_sm": programs_per_sm, "tb_per_s": line[-1]},
            )
        scores[heads, config, programs_per_sm] = math.prod(line)
        print(heads, *config, programs_per_sm, " ", *(f"{x:.3f}" for x in line), flush=True)
    best = max(scores, key=lambda key: -math.inf if math.isnan(scores[key]) else scores[key])
    print("best:", best)
    return best


def main() -> None:
    """Run the cases that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--retention", type=Path, help=".npz of real heads' shares")
    parser.add_argument("--out", type=Path, help="JSON lines are appended to it")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--programs-per-sm", type=float, default=PROGRAMS_PER_SM)
    parser.add_argument("--replays", type=int, default=9)
    parser.add_argument("--no-flash", action="store_true", help="without FlashAttention 3")
    parser.add_argument("--heads-per-program", type=int)
    parser.add_argument("--config", type=int, nargs="+", help="tile rows, warps, stages, dependent")
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--sweep-programs", type=float, nargs="+", default=[2, 3, 4, 6])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.config = LaunchConfig(*args.config) if args.config else None
    loads = {name: draw(name, args.seed) for name in args.loads}

    geometries = {
        (model, budgets): make_benchmark_geometry(args.retention, model, budgets, seed=args.seed)
        for model, budgets in itertools.product(args.models, args.budgets)
    }
    cases = [Case(*key, *load) for key in geometries for load in loads.items()]
    largest = max(
        sum(geometries[case[:2]].blocks_held(n, n - 1).total for n in case.lengths)
        * geometries[case[:2]].block_bytes
        for case in cases
    )
    # Padded pages of the yardsticks take a little more.
    buffer = torch.empty(int(largest * 1.05) // 2, dtype=torch.bfloat16, device="cuda").normal_()
    common.warm_up()
    ceiling = common.read_bytes_per_s(buffer[: 4 << 30])
    print(f"read ceiling {ceiling / 1e12:.3f} TB/s")
    if args.sweep:
        best = sweep(geometries, [c for c in cases if c.model == cases[0].model], buffer, args)
        args.heads_per_program, args.config, args.programs_per_sm = best
    origin = common.provenance(args.seed)
    for case in cases:
        figures = measure(geometries[case[:2]], case, buffer, args)
        figures |= {
            "ceiling_tb_per_s": ceiling / 1e12,
            "over_ceiling": figures["tb_per_s"] * 1e12 / ceiling,
        }
        common.write_line(args.out, origin | figures)
        kept = ("tb_per_s", "over_fa3_equal_heads", "over_fa3_ragged", "over_ceiling", "median_ms")
        shown = " ".join(f"{name} {figures[name]:.3f}" for name in kept if name in figures)
        print(*case[:3], f"{figures['bytes_per_layer'] / 1e6:.0f} MB/layer", shown, flush=True)


if __name__ == "__main__":
    main()
