"""The demo's figures: one object for the JSON file, one table for the screen."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from tangram.geometry import Geometry
from tangram.installed import commit, machine, versions
from tangram.plan.compression_plan import CompressionPlan
from tangram.serving.played import Reply
from tangram.serving.scrape import CacheMetrics
from tangram.serving.server import Server

MIB = 1 << 20
_LAYOUT = re.compile(r"KV cache compression: .* layout ([0-9a-f]+)")


def server_figures(
    plan: CompressionPlan,
    server: Server,
    replies: Sequence[Reply],
    *,
    before: CacheMetrics,
    after: CacheMetrics,
    peak_blocks: int,
    num_samples: int,
    seconds: float,
    memory_bytes: int,
    compressed: bool,
) -> dict[str, Any]:
    """What one server did, as a JSON object.

    Args:
        plan: what the compressed server was asked for.
        server: while it still runs, or after.
        replies: of all turns.
        before: metrics before the first of them.
        after: metrics after the last of them.
        peak_blocks: most blocks held at any time.
        num_samples: readings that this is the most of.
        seconds: that the replies took.
        memory_bytes: of the KV cache.
        compressed: which of the two it is.
    """
    layout = plan.geometry
    block_bytes = layout.block_bytes if compressed else after.block_tokens * layout.token_bytes
    if not compressed and after.num_blocks != memory_bytes // block_bytes:
        block_bytes = memory_bytes // after.num_blocks  # a device that pads its blocks
    queries = after.query_tokens - before.query_tokens
    hits = after.hit_tokens - before.hit_tokens
    first = [reply.seconds for reply in replies if reply.turn == 0]
    later = [reply.seconds for reply in replies if reply.turn > 0]
    served = _LAYOUT.search(server.log_text())
    served_layout = served[1] if served else None
    return {
        "command": server.command,
        "answers_right": sum(reply.right for reply in replies),
        "answers": len(replies),
        "peak_kv_bytes": peak_blocks * block_bytes,
        "peak_kv_blocks": peak_blocks,
        "peak_samples": num_samples,
        "kv_blocks": after.num_blocks,
        "kv_block_bytes": block_bytes,
        "prefix_cache_query_tokens": queries,
        "prefix_cache_hit_tokens": hits,
        "prefix_cache_hit_rate": hits / queries if queries else 0.0,
        "preemptions": after.preemptions - before.preemptions,
        "seconds": seconds,
        "seconds_first_answer": fmean(first),
        "seconds_later_answer": fmean(later) if later else None,
        "layout": served_layout,
        "not_as_planned": _differences(
            layout if compressed else None, served_layout, after, block_bytes, memory_bytes
        ),
        "replies": [asdict(reply) for reply in replies],
    }


def _differences(
    layout: Geometry | None,
    served_layout: str | None,
    metrics: CacheMetrics,
    block_bytes: int,
    memory_bytes: int,
) -> list[str]:
    """What tells that a server does not serve what it was asked for."""
    found = []
    expected_layout = layout.digest if layout else None
    if served_layout != expected_layout:
        found.append(f"the server's log names layout {served_layout}, planned {expected_layout}")
    # The pool's size comes from the specs of the layers in the worker: it proves what is served.
    if layout and metrics.num_blocks != memory_bytes // block_bytes:
        found.append(
            f"the server has {metrics.num_blocks} blocks, {memory_bytes // block_bytes} were "
            f"expected of {block_bytes} bytes each"
        )
    if layout and metrics.block_tokens != layout.recent_block_tokens:
        found.append(
            f"the server's blocks hold {metrics.block_tokens} tokens, planned "
            f"{layout.recent_block_tokens}"
        )
    return found


def report(
    plan: CompressionPlan,
    servers: Mapping[str, Mapping[str, Any]],
    args: Namespace,
    argv: Sequence[str],
) -> dict[str, Any]:
    """Everything in one JSON object, with what is needed to have it again."""
    plain = {k: str(v) if k == "json" and v else v for k, v in vars(args).items()}
    return {
        "command": ["tangram", "demo", *argv],
        "arguments": plain,
        "seed": args.seed,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
        "compression": {
            "ratio": args.ratio,
            "scorer": plan.scorer_name,
            "level": plan.level,
            "budgets": plan.budgets_title,
            "profile": plan.profile_path,
            "layout": plan.geometry.digest,
            "geometry": plan.geometry.to_json(),
        },
        "servers": dict(servers),
    }


def print_report(result: Mapping[str, Any], console: Console) -> None:
    """The table."""
    servers = result["servers"]
    asked, compression = result["arguments"], result["compression"]
    table = Table(
        title=f"{asked['conversations']} conversations of {asked['turns']} turns, "
        f"{asked['context_tokens']:,} tokens, {asked['facts']} facts each",
        caption=f"ratio {compression['ratio']:g}, {compression['budgets']}, scorer "
        f"{compression['scorer']}, layout {compression['layout']}",
    )
    table.add_column("")
    for name in servers:
        table.add_column("stock vLLM" if name == "stock" else "compressed", justify="right")
    both = "stock" in servers and "compressed" in servers
    if both:
        table.add_column("stock / compressed", justify="right")
    for title, key, show in _ROWS:
        cells = [show(figures) for figures in servers.values()]
        if both:
            one, other = (servers[name].get(key) if key else None for name in servers)
            cells.append(f"{one / other:.2f}x" if one and other else "")
        table.add_row(title, *cells)
    console.print(table)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"


_ROWS = (
    ("answers right", None, lambda f: f"{f['answers_right']} of {f['answers']}"),
    ("KV held at the peak", "peak_kv_bytes", lambda f: f"{f['peak_kv_bytes'] / MIB:,.1f} MiB"),
    ("prefix-cache hits", None, lambda f: f"{f['prefix_cache_hit_rate']:.1%} of tokens"),
    ("time of all answers", "seconds", lambda f: _seconds(f["seconds"])),
    ("  a first answer", None, lambda f: _seconds(f["seconds_first_answer"])),
    ("  a later answer", None, lambda f: _seconds(f["seconds_later_answer"])),
)
