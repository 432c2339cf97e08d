"""What storing and sealing add to a decode step, measured inside CUDA graphs.

    python benchmarks/kernels/bench_seal.py --out seal.jsonl

Shape: Qwen3-4B (36 layers, 8 KV heads of 128, 32 query heads), bf16, chunks of 256 tokens, a window
of 32, 64 requests. Every head group keeps 1, 2 or 3 eighths of a chunk, at random.
What every scorer's launch keeps is compared with the scorer itself before anything is timed. Times
are medians over replays; what a launch seals was written long before and is not in the cache.

A mean step is one of requests that are apart: each seals with probability 1 / C.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import comb
from pathlib import Path

import torch
from torch import Tensor

from tangram.geometry import Geometry, HeadGroups
from tangram.kernels.cache_view import CacheView
from tangram.kernels.seal_decode import KERNEL_SCORERS, SealScorer, SealTables, kernel
from tangram.kernels.store import kernel as store_kernel
from tangram.kernels.store_queries import kernel as queries_kernel
from tangram.scorers import get_scorer
from tangram.scorers.base import Chunks
from tangram.scorers.select import top_rows

LAYERS, HEADS, QUERY_HEADS, D, C, W = 36, 8, 32, 128, 256, 32
SCALE = D**-0.5
REPLAYS = 30
SCORERS = [name for name in KERNEL_SCORERS if not get_scorer(name).stores_scores]
"""Of scores that lie beside their rows there is nothing to compute."""


@dataclass
class Server:
    """Caches and tables of a decode batch, every request at the end of its fourth chunk."""

    geometry: Geometry
    recent: list[Tensor]
    sealed: Tensor
    recent_table: Tensor
    sealed_table: Tensor
    ring: Tensor
    ring_table: Tensor
    start: Tensor
    key: Tensor
    value: Tensor
    query: Tensor
    slots: Tensor
    profile: dict[str, Tensor]
    scorers: dict[str, SealScorer]

    def view(self, sealing: list[int]) -> CacheView:
        """The cache in a step in which the `sealing` requests are at a boundary."""
        lens = torch.arange(len(self.recent_table)) % (C - 2) + 3 * C + 1
        lens[sealing] = 4 * C
        return CacheView(
            sealed=self.sealed,
            sealed_table=self.sealed_table,
            recent=self.recent[0],
            recent_table=self.recent_table,
            query_start=self.start,
            seq_lens=lens.to(torch.int32).cuda(),
            ring=self.ring,
            ring_table=self.ring_table,
        )

    def tables(self, layers: list[int]) -> SealTables:
        """Tables of a launch for these layers."""
        return SealTables.of(self.geometry, layers, [self.recent[layer] for layer in layers])

    def seal(self, tables: SealTables, view: CacheView, scorer: str) -> None:
        """One launch."""
        kernel.seal_decode(tables, view, scorer=self.scorers[scorer], softmax_scale=SCALE)

    def store(self, layer: int) -> None:
        """One launch."""
        store_kernel.store(self.key, self.value, self.slots, self.recent[layer])

    def store_queries(self, layer: int, view: CacheView) -> None:
        """One launch."""
        queries_kernel.store_queries(self.query, view, layer, W)


def make_profile(seed: int) -> dict[str, Tensor]:
    """Made-up statistics of queries, as a profile has them."""
    order = torch.Generator().manual_seed(seed)
    root = torch.randn(LAYERS, QUERY_HEADS, D, D, generator=order) / D**0.5
    return {
        "query_mean": torch.randn(LAYERS, QUERY_HEADS, D, generator=order),
        "query_covariance": root @ root.mT,
        "rope_frequencies": 1e6 ** -(torch.arange(D // 2, dtype=torch.float64) / (D // 2)),
    }


def for_kernel(profile: dict[str, Tensor], geometry: Geometry) -> dict[str, SealScorer]:
    """Every scorer as launches are given it, for chunks 0 to 3, by name."""
    arrays = {name: array.numpy() for name, array in profile.items()}
    return {
        name: SealScorer.of(get_scorer(name), arrays, geometry, 4 * C, "cuda") for name in SCORERS
    }


def make_server(requests: int, seed: int) -> Server:
    """Random keys, values and queries in blocks in random order."""
    order = torch.Generator().manual_seed(seed)
    quarter = C // 4 // 16
    draw = torch.randint(0, 3, (LAYERS, 2), generator=order) - 1
    pages = (quarter + draw * quarter // 2).tolist()
    heads = [torch.randperm(HEADS, generator=order).view(2, -1).tolist() for _ in range(LAYERS)]
    g = Geometry(
        head_groups=HeadGroups.from_lists(heads, pages),
        num_query_heads=QUERY_HEADS,
        head_size=D,
        itemsize_bytes=2,
        chunk_size_tokens=C,
        window_size_tokens=W,
        n_sink_tokens=4,
        has_query_ring=True,
    )
    R = g.recent_block_tokens
    first, last = g.recent_start(4 * C - 1) // R, 4 * C // R
    each = last - first + 1 + g.ring_blocks
    blocks = torch.randperm(requests * each, generator=order).view(requests, each).to(torch.int32)
    torch.manual_seed(seed)
    elements = g.block_bytes // g.itemsize_bytes
    pool = torch.empty(requests * each, elements, dtype=torch.bfloat16, device="cuda").normal_()
    recent_table = torch.zeros(requests, last, dtype=torch.int32)
    recent_table[:, first:] = blocks[:, : last - first]
    sealed_table = torch.zeros(requests, 5, dtype=torch.int32)
    sealed_table[:, 3] = blocks[:, last - first]
    page = HEADS * R * 2 * D
    raw = pool[:, : LAYERS * page].unflatten(1, (LAYERS, HEADS, R, 2 * D))
    ring = pool[:, : g.ring_block_tokens * LAYERS * QUERY_HEADS * D]
    key = torch.randn(requests, HEADS, D, device="cuda").bfloat16()
    profile = make_profile(seed)
    return Server(
        geometry=g,
        recent=list(raw.unbind(1)),
        sealed=pool[:, : g.rows_per_block * 2 * D].unflatten(
            1, (g.pages_per_block, g.page_group_size, 16, 2 * D)
        ),
        recent_table=recent_table.cuda(),
        sealed_table=sealed_table.cuda(),
        ring=ring.unflatten(1, (g.ring_block_tokens, LAYERS, QUERY_HEADS, D)),
        ring_table=blocks[:, last - first + 1 :].cuda(),
        start=torch.arange(requests + 1, dtype=torch.int32, device="cuda"),
        key=key,
        value=torch.randn_like(key),
        query=torch.randn(requests, QUERY_HEADS, D, device="cuda").bfloat16(),
        slots=blocks[:, last - first - 1].cuda().long() * R + R - 1,
        profile=profile,
        scorers=for_kernel(profile, g),
    )


def agreement(server: Server, scorer: str, request: int = 5) -> float:
    """Share of heads whose rows are those that the scorer itself chooses.

    Two scores that are equal but for noise may be taken for each other: see docs/scorers.md.
    """
    g = server.geometry
    server.seal(server.tables(list(range(LAYERS))), server.view([request]), scorer)
    position = torch.arange(*g.chunk_range(3), device="cuda")
    block = server.recent_table[request, position // g.recent_block_tokens].long()
    window = torch.arange(4 * C - W, 4 * C, device="cuda") % W
    own = server.ring_table[request, window // g.ring_block_tokens].long()
    same = []
    for layer in range(LAYERS):
        raw = server.recent[layer][block, :, position % g.recent_block_tokens]
        chunks = Chunks(
            keys=raw[..., :D],
            values=raw[..., D:],
            positions=position,
            softmax_scale=SCALE,
            window_size_tokens=W,
            window_queries=server.ring[own, window % g.ring_block_tokens, layer],
            statistics={
                name: array.cuda() if name == "rope_frequencies" else array[layer].cuda()
                for name, array in server.profile.items()
            },
        )
        scores = get_scorer(scorer).score(chunks)
        for group, members in enumerate(g.head_groups.heads[layer]):
            chosen = top_rows(scores[:, list(members)], g.kept_rows(layer, group, 3))
            first = g.page_offsets[layer][group]
            pages = server.sealed[server.sealed_table[request, 3].long(), first:]
            rows = pages[: g.head_groups.pages[layer][group]].transpose(0, 1).flatten(1, 2)
            for member, head in enumerate(members):
                same.append(torch.equal(rows[member], raw[chosen[:, member], head]))
    return sum(same) / len(same)


def microseconds(launch: Callable[[int], None], count: int) -> tuple[float, float]:
    """Median and spread (of the middle half) of one of `count` launches in a graph."""
    launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            launch(index)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for replay in range(REPLAYS + 3):
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if replay >= 3:
            times.append(begin.elapsed_time(end) * 1e3 / count)
    quarters = statistics.quantiles(times, n=4)
    return statistics.median(times), quarters[2] - quarters[0]


def mean_step(per_count: dict[int, float], requests: int) -> float:
    """Mean time of a launch when each request seals with probability 1 / C."""
    known = sorted(per_count)
    total = 0.0
    for count in range(requests + 1):
        low = max(k for k in known if k <= count)
        high = min(k for k in known if k >= count)
        share = (count - low) / (high - low) if high > low else 0.0
        time = per_count[low] * (1 - share) + per_count[high] * share
        chance = comb(requests, count) * (1 / C) ** count * (1 - 1 / C) ** (requests - count)
        total += chance * time
    return total


def measure(server: Server, scorers: list[str], report: Callable[..., None]) -> None:
    """All figures."""
    requests = len(server.recent_table)
    everything = server.tables(list(range(LAYERS)))
    single = [server.tables([layer]) for layer in range(LAYERS)]
    nobody = server.view([])

    def store_and_seal(index: int) -> None:
        server.store(index)
        server.seal(single[index], nobody, "key_diff")

    stores, spread = microseconds(server.store, LAYERS)
    report(what="store", us=stores, spread_us=spread)
    queries, spread = microseconds(lambda layer: server.store_queries(layer, nobody), LAYERS)
    report(what="store queries", us=queries, spread_us=spread)
    both, spread = microseconds(store_and_seal, LAYERS)
    report(what="seal, a launch a layer after store, nothing due", us=both - stores)

    for scorer in scorers:
        per_count = {}
        for count in sorted({0, 1, 2, 4, requests}):
            launches = max(1, min(8, requests // max(count, 1)))
            views = [
                server.view([(i * count + k) % requests for k in range(count)])
                for i in range(launches)
            ]

            def launch(index: int, views: list[CacheView] = views, scorer: str = scorer) -> None:
                server.seal(everything, views[index % len(views)], scorer)

            time, spread = microseconds(launch, 8 if count < requests else 2)
            per_count[count] = time
            what = "seal, one launch for all layers"
            report(what=what, scorer=scorer, due=count, us=time, spread_us=spread)
        report(what="mean step", scorer=scorer, us=mean_step(per_count, requests))

    for count in (1, requests):
        view = server.view(list(range(count)))

        def launch(index: int, view: CacheView = view) -> None:
            server.seal(single[index], view, "key_diff")

        time, spread = microseconds(launch, LAYERS)
        what = "seal, a launch a layer"
        report(what=what, scorer="key_diff", due=count, us=time, spread_us=spread)


def main() -> None:
    """Check, then measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="file to append JSON lines to")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scorers", nargs="+", default=SCORERS)
    args = parser.parse_args()
    import triton

    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    common = {
        "benchmark": "seal",
        "command": " ".join(sys.argv),
        "commit": git.stdout.strip(),
        "machine": torch.cuda.get_device_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        },
        "requests": args.requests,
        "seed": args.seed,
    }

    def report(**figures: object) -> None:
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(common | figures) + "\n")
        print("  ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in figures.values()))

    server = make_server(args.requests, args.seed)
    for scorer in args.scorers:
        share = agreement(server, scorer)
        report(what="check", scorer=scorer, heads_with_the_same_rows=share)
        if share < 0.95:
            sys.exit(f"{scorer}: the rows are not the scorer's; nothing is timed")
    measure(server, args.scorers, report)


if __name__ == "__main__":
    main()
