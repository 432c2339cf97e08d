"""`tangram plan`: what a model's KV cache takes, compressed and not, from its config alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tangram.arguments import Parser, check_output, lengths, positive
from tangram.installed import versions
from tangram.plan.cached import with_cached_profile
from tangram.plan.capacity import GIB, figures, head_skew
from tangram.plan.compression_plan import CompressionPlan, make_plan
from tangram.plan.dtypes import ITEMSIZE_BYTES, served_dtype
from tangram.plan.model_facts import ModelFacts
from tangram.plan.models import (
    RECALL,
    bundled_options,
    is_bundled,
    read_config,
)
from tangram.plan.options import CompressionOptions, add_flags
from tangram.plan.supported import refuse_model
from tangram.printable import printable
from tangram.profile import ModelIdentity, text_config
from tangram.scorers import scorer_title

DEFAULT_CONTEXTS = (4096, 16384, 32768, 131072)


def run(argv: Sequence[str]) -> int:
    """Print the plan, and write it as JSON where asked."""
    args = parser().parse_args(argv)
    check_output("--json", args.json, args.model, args.compression_profile)
    config = read_config(args.model)
    refuse_model(args.model, ModelFacts.from_config(config, {"kv_cache_dtype": args.dtype}))
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
        "head_skew": head_skew(plan.geometry),
        "versions": versions(),
    }
    console = Console()
    _print(result, plan, console)
    if missing:
        console.print(printable(missing), highlight=False, markup=False)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


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
    if options.is_auto:  # the bundled profile's, then
        given.discard("compression_scorer")
    return replace(options, **bundled_options(given))


def compression_options(args: argparse.Namespace) -> CompressionOptions:
    """The options among parsed flags."""
    given = {f.name: getattr(args, f.name, None) for f in fields(CompressionOptions)}
    return CompressionOptions.from_mapping(given)


def parser() -> argparse.ArgumentParser:
    """The subcommand's parser."""
    made = Parser(
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
        help="tokens of a request, such as 4096,32K,1M (default: "
        f"{','.join(map(str, DEFAULT_CONTEXTS))}, as far as the model goes)",
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    add_flags(made)
    return made


def _print(result: Mapping[str, Any], plan: CompressionPlan, console: Console) -> None:
    full, compressed, rows = result["full"], result["compressed"], result["budget_rows"]
    skew = result["head_skew"]
    memory = result["kv_cache_memory_bytes"] / GIB
    about = Table.grid(padding=(0, 2))
    for name, value in {
        "model": f"{result['model']} ({result['identity']['architecture']}, {result['dtype']})",
        "compression": f"ratio {result['ratio']:g}, {plan.budgets_title}, scorer "
        f"{scorer_title(result['scorer'], result['scorer_parameters'])}, "
        f"{result['page_group_size']} heads a page, layout {result['layout']}",
        "KV bytes a token": f"{full['bytes_per_token']:,} full, "
        f"{compressed['bytes_per_token']:,.0f} sealed",
        "blocks": f"{compressed['block_bytes'] / 1024:,.0f} KiB: a sealed chunk of "
        f"{compressed['sealed_block_tokens']} tokens, or {compressed['recent_block_tokens']} "
        f"recent ones; {compressed['blocks']:,} fit in {memory:g} GiB",
        "rows a chunk": f"{rows['min']} to {rows['max']} a head, median {rows['median']:g}",
        "decode": f"programs read equal parts; the largest head of a layer has {skew['mean']:.2f} "
        f"times the mean, {skew['worst']:.2f} in the worst",
    }.items():
        # As texts, because a model's name may hold brackets, which markup would swallow.
        about.add_row(Text(name, "bold"), Text(printable(value)))
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
