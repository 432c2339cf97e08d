"""`tangram plan`: what a model's KV cache takes, compressed and not, from its config alone."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tangram.arguments import check_output, count, lengths, positive
from tangram.cli.balance import (
    DEFAULT_THREAD_BLOCKS,
    H200_SMS,
    THREAD_BLOCKS_PER_SM,
    balance_figures,
    balance_table,
)
from tangram.errors import ConfigurationError, ProfileError
from tangram.geometry import Geometry
from tangram.installed import versions
from tangram.plan.cached import cached_profile, needs_profile
from tangram.plan.compression_plan import CompressionPlan, make_plan
from tangram.plan.models import (
    RECALL,
    bundled_model,
    bundled_options,
    is_bundled,
    read_config,
    refuse_config,
)
from tangram.plan.options import AUTO_PROFILE, NO_PROFILE, CompressionOptions, add_flags
from tangram.profile import ModelIdentity, text_config

GIB = 1 << 30
FULL_BLOCK_TOKENS = 16
"""Tokens in a block of vLLM's own paged cache."""
DEFAULT_CONTEXTS = (4096, 16384, 32768, 131072)
ITEMSIZE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def run(argv: Sequence[str]) -> int:
    """Print the plan, and write it as JSON where asked."""
    args = parser().parse_args(argv)
    check_output("--json", args.json, args.model, args.compression_profile)
    config = read_config(args.model)
    refuse_config(args.model, config)
    identity = ModelIdentity.from_config(config)
    dtype = args.dtype if args.dtype != "auto" else served_dtype(config)
    options, missing = with_cached_profile(served_options(args), args.model, identity)
    plan = make_plan(options, identity, ITEMSIZE_BYTES[dtype])
    contexts = args.contexts or default_contexts(config)
    result = {
        "model": args.model,
        "identity": identity.to_dict(),
        "dtype": dtype,
        "ratio": args.compression_ratio or CompressionOptions().compression_ratio,
        **figures(plan, int(args.gpu_memory * GIB), contexts),
        "decode_balance": balance_figures(plan.geometry, args.thread_blocks),
        "versions": versions(),
    }
    console = Console()
    _print(result, console)
    if missing:
        console.print(missing, highlight=False)
    console.print(balance_table(result["decode_balance"]))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def figures(plan: CompressionPlan, memory_bytes: int, contexts: Sequence[int]) -> dict[str, Any]:
    """Everything that follows from a plan and the memory of the KV cache.

    Args:
        plan: what would be served.
        memory_bytes: memory of the KV cache.
        contexts: tokens of a request, prompt and answer together.

    Returns:
        A JSON object. A request counts with the most that it holds at any time while it decodes
        up to the context; the step of a prefill holds that step's raw tokens more.

    Raises:
        ConfigurationError: the memory does not hold two blocks.
    """
    layout = plan.geometry
    full_block_bytes = FULL_BLOCK_TOKENS * layout.token_bytes
    # One block is vLLM's null block.
    blocks = memory_bytes // layout.block_bytes - 1
    full_blocks = memory_bytes // full_block_bytes - 1
    if min(blocks, full_blocks) < 1:
        needed = 2 * max(layout.block_bytes, full_block_bytes)
        raise ConfigurationError(
            f"--gpu-memory is {memory_bytes / GIB:g} GiB, which does not hold two blocks of the "
            f"cache: give {needed / GIB:.3f} or more"
        )
    requests = []
    for context in contexts:
        held, full_held = most_blocks(layout, context), -(-context // FULL_BLOCK_TOKENS)
        requests.append(
            {
                "context_tokens": context,
                "full_bytes": full_held * full_block_bytes,
                "compressed_bytes": held * layout.block_bytes,
                "full_requests": full_blocks // full_held,
                "compressed_requests": blocks // held,
                "gain": full_held * full_block_bytes / (held * layout.block_bytes),
            }
        )
    rows = [layout.budget_rows(layer, group) for layer, group in _groups(layout)]
    return {
        "scorer": plan.scorer_name,
        "level": plan.level,
        "profile": plan.profile_path,
        "layout": layout.digest,
        "chunk_size_tokens": layout.chunk_size_tokens,
        "window_size_tokens": layout.window_size_tokens,
        "page_group_size": layout.page_group_size,
        "kv_cache_memory_bytes": memory_bytes,
        "full": {
            "bytes_per_token": layout.token_bytes,
            "block_tokens": FULL_BLOCK_TOKENS,
            "block_bytes": full_block_bytes,
            "blocks": full_blocks,
        },
        "compressed": {
            "bytes_per_token": layout.block_bytes / layout.chunk_size_tokens,
            "block_bytes": layout.block_bytes,
            "sealed_block_bytes": layout.sealed_block_bytes,
            "sealed_block_tokens": layout.chunk_size_tokens,
            "recent_block_bytes": layout.recent_block_bytes,
            "recent_block_tokens": layout.recent_block_tokens,
            "query_ring_blocks": layout.ring_blocks,
            "blocks": blocks,
        },
        "budget_rows": {
            "min": min(rows),
            "median": statistics.median(rows),
            "max": max(rows),
            "mean": statistics.fmean(rows),
        },
        "requests": requests,
    }


def with_cached_profile(
    options: CompressionOptions, model: str, identity: ModelIdentity
) -> tuple[CompressionOptions, str]:
    """The options with the profile that a server would take by itself, and what is said of it.

    Without a profile in the cache the plan is of uniform budgets, whose total is the same; the
    sentence says so, and is empty otherwise.
    """
    asked = (options.compression_profile or AUTO_PROFILE).lower()
    if asked != AUTO_PROFILE:
        return options, ""
    none = replace(options, compression_profile=NO_PROFILE)
    if not needs_profile(options):
        return none, ""
    try:
        path = cached_profile(options, _folder(model), identity)
        if path.is_file():
            return replace(options, compression_profile=str(path)), ""
        reason = "no profile of it is cached yet"
    except ProfileError as error:
        reason = f"its weights are not here ({error})"
    return (
        none,
        f"{reason}: a server would calibrate one first, with budgets of the same total; those "
        "shown are uniform, unless --compression-profile names a file.",
    )


def most_blocks(layout: Geometry, context: int) -> int:
    """Most blocks that a request holds while it decodes, token by token, up to a length."""
    lengths = range(max(1, context - layout.chunk_size_tokens + 1), context + 1)
    return max(layout.blocks_held(length, length - 1).total for length in lengths)


def served_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that vLLM serves a config with: its own, or half precision for float32."""
    for part in (config, text_config(config)):
        found = part.get("dtype") or part.get("torch_dtype")
        if isinstance(found, str):
            name = found.removeprefix("torch.")
            return name if ITEMSIZE_BYTES.get(name) == 2 else "bfloat16"
    return "bfloat16"


def default_contexts(config: Mapping[str, Any]) -> list[int]:
    """The usual lengths that the model can take, or its longest."""
    longest = text_config(config).get("max_position_embeddings") or DEFAULT_CONTEXTS[-1]
    return [n for n in DEFAULT_CONTEXTS if n <= longest] or [longest]


def served_options(args: argparse.Namespace) -> CompressionOptions:
    """The options among parsed flags, with what `tangram serve` takes for the bundled model."""
    options = compression_options(args)
    if not is_bundled(args.model):
        return options
    given = {f.name for f in fields(CompressionOptions) if getattr(args, f.name, None) is not None}
    return replace(options, **bundled_options(given))


def compression_options(args: argparse.Namespace) -> CompressionOptions:
    """The options among parsed flags."""
    given = {f.name: getattr(args, f.name, None) for f in fields(CompressionOptions)}
    return CompressionOptions.from_mapping(given)


def parser() -> argparse.ArgumentParser:
    """The subcommand's parser."""
    made = argparse.ArgumentParser(
        prog="tangram plan",
        description="What a model's KV cache takes, compressed and not, from its config alone.",
    )
    made.add_argument(
        "model",
        metavar="MODEL",
        help=f"folder, config.json, name on the Hugging Face Hub, or {RECALL}",
    )
    made.add_argument(
        "--gpu-memory",
        type=positive,
        required=True,
        metavar="GIB",
        help="GiB for the KV cache alone, without weights and activations",
    )
    made.add_argument(
        "--dtype",
        choices=["auto", *ITEMSIZE_BYTES],
        default="auto",
        help="dtype of the cache; auto: what vLLM would take (default)",
    )
    made.add_argument(
        "--contexts",
        type=lengths,
        metavar="N,N,...",
        help=f"tokens of a request (default: {','.join(map(str, DEFAULT_CONTEXTS))}, as far as "
        "the model goes)",
    )
    made.add_argument(
        "--thread-blocks",
        type=count,
        default=DEFAULT_THREAD_BLOCKS,
        metavar="N",
        help=f"thread blocks of a decode step on the GPU: {THREAD_BLOCKS_PER_SM} for each of its "
        f"multiprocessors (default: {DEFAULT_THREAD_BLOCKS}, for the {H200_SMS} of an H200)",
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    add_flags(made)
    return made


def _folder(model: str) -> str:
    """Where a model's weights would lie, or its name on the Hub."""
    if is_bundled(model):
        return str(bundled_model())
    return str(Path(model).parent) if Path(model).is_file() else model


def _groups(layout: Geometry) -> list[tuple[int, int]]:
    pages = layout.head_groups.pages
    return [(layer, group) for layer in range(len(pages)) for group in range(len(pages[layer]))]


def _print(result: Mapping[str, Any], console: Console) -> None:
    full, compressed, rows = result["full"], result["compressed"], result["budget_rows"]
    memory = result["kv_cache_memory_bytes"] / GIB
    about = Table.grid(padding=(0, 2))
    for name, value in {
        "model": f"{result['model']} ({result['identity']['architecture']}, {result['dtype']})",
        "compression": f"ratio {result['ratio']:g}, {result['level']} budgets, scorer "
        f"{result['scorer']}, {result['page_group_size']} heads a page, layout {result['layout']}",
        "KV bytes a token": f"{full['bytes_per_token']:,} full, "
        f"{compressed['bytes_per_token']:,.0f} sealed",
        "blocks": f"{compressed['block_bytes'] / 1024:,.0f} KiB: a sealed chunk of "
        f"{compressed['sealed_block_tokens']} tokens, or {compressed['recent_block_tokens']} "
        f"recent ones; {compressed['blocks']:,} fit in {memory:g} GiB",
        "rows a chunk": f"{rows['min']} to {rows['max']} a head, median {rows['median']:g}",
    }.items():
        about.add_row(f"[bold]{name}[/bold]", value)
    console.print(about)
    table = Table(title=f"Requests that fit in {memory:g} GiB of KV cache")
    for name in ("context", "full KV", "compressed", "MiB full", "MiB compressed", "gain"):
        table.add_column(name, justify="right")
    for row in result["requests"]:
        table.add_row(
            f"{row['context_tokens']:,}",
            f"{row['full_requests']:,}",
            f"{row['compressed_requests']:,}",
            f"{row['full_bytes'] / 2**20:,.1f}",
            f"{row['compressed_bytes'] / 2**20:,.1f}",
            f"{row['gain']:.2f}x",
        )
    console.print(table)
