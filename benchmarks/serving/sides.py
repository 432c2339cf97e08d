"""The servers that are compared, the models that they serve, and the proof that they are those."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine.shapes import CONFIGS, FOLDER, compression_options, write_model
from tangram.errors import ConfigurationError
from tangram.plan.compression_plan import CompressionPlan, make_plan
from tangram.plan.dtypes import ITEMSIZE_BYTES, served_dtype
from tangram.plan.models import RECALL, bundled_model, bundled_profile_options, read_config
from tangram.plan.options import NO_PROFILE, CompressionOptions, compression_arguments
from tangram.profile import ModelIdentity
from tangram.serving.scrape import parse
from tangram.serving.server import Server, ServerError

SERVED_NAME = "bench"
SIDES = {
    "stock": "vLLM with the plugin installed and none of its flags",
    "tangram": "compression with the given budgets",
    "fp8": "stock with --kv-cache-dtype fp8",
    "offload": "stock with --kv-offloading-size: evicted KV goes to the host's memory",
    "stock-nocache": "stock without prefix caching",
    "tangram-nocache": "compression without prefix caching",
    "uniform": "compression at the same ratio, every head the same budget",
    "unragged": "compression, every group paged at the longest budget: nothing freed by raggedness",
}
COMPRESSED = ("tangram", "tangram-nocache", "uniform", "unragged")
COMPRESSION_OPTIONS = (
    "budgets", "retention", "scorer", "profile", "chunk_size", "page_group_size",
)  # fmt: skip
SERVER_OPTIONS = (
    *COMPRESSION_OPTIONS, "dtype", "max_model_len", "gpu_memory_utilization", "offload_gib",
    "server_args",
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
_ACTIVE = re.compile(r"KV cache compression: .* layout (\w+)")


@dataclass(frozen=True)
class Model:
    """What is served.

    Attributes:
        name: a shape, `recall`, or a folder or name of a real model.
        served: folder or name that vLLM is given.
        config: its config.json.
        has_tokenizer: whether it takes text.
        arguments: further arguments of every server.
    """

    name: str
    served: str
    config: dict[str, Any]
    has_tokenizer: bool
    arguments: tuple[str, ...] = ()

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return int(self.config["vocab_size"])


def find_model(name: str, folder: Path = FOLDER) -> Model:
    """A model by name; a shape's config is written to the folder, without weights.

    Raises:
        ConfigurationError: there is no such shape or folder, and no model of that name on the Hub.
    """
    if name in CONFIGS:
        served = str(write_model(name, folder))
        dummy = ("--load-format", "dummy", "--skip-tokenizer-init")
        return Model(name, served, CONFIGS[name], has_tokenizer=False, arguments=dummy)
    if name != RECALL and "/" not in name and not Path(name).exists():
        # A shape that is misspelled: the Hub would be asked for half a minute where there is none.
        raise ConfigurationError(
            f"there is no model {name}: give a shape ({', '.join(CONFIGS)}), {RECALL}, a folder, "
            "or ORGANISATION/NAME of the Hugging Face Hub"
        )
    served = str(bundled_model()) if name == RECALL else name
    return Model(name, served, read_config(served), has_tokenizer=True)


@dataclass(frozen=True)
class Side:
    """One of the servers.

    Attributes:
        name: of `SIDES`.
        arguments: of `vllm serve`, model first.
        plan: of compression; None for a stock server.
    """

    name: str
    arguments: tuple[str, ...]
    plan: CompressionPlan | None


def server_options(side: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Of a command's options those that make another server of this side."""
    unused: tuple[str, ...] = () if side in COMPRESSED else COMPRESSION_OPTIONS
    unused += () if side == "offload" else ("offload_gib",)
    return {name: options.get(name) for name in SERVER_OPTIONS if name not in unused}


def make_side(name: str, model: Model, args: Any, folder: Path = FOLDER) -> Side:
    """The arguments of a side.

    Args:
        name: of `SIDES`.
        model: what it serves.
        args: options of `drive.parser`.
        folder: for a profile.
    """
    arguments = [model.served, "--served-model-name", SERVED_NAME, *model.arguments]
    arguments += ["--max-model-len", str(args.max_model_len), "--seed", str(args.seed)]
    arguments += ["--gpu-memory-utilization", str(args.gpu_memory_utilization)]
    arguments += ["--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
    arguments += ["--dtype", args.dtype] if args.dtype else []
    arguments += shlex.split(args.server_args)
    if name == "fp8":
        arguments += ["--kv-cache-dtype", "fp8"]
    if name == "offload":
        arguments += ["--kv-offloading-size", str(args.offload_gib)]
    if name.endswith("-nocache"):
        arguments.append("--no-enable-prefix-caching")
    if name not in COMPRESSED:
        return Side(name, tuple(arguments), None)
    options, plan = compression(name, model, args, folder)
    arguments += compression_arguments(options)
    return Side(name, tuple(arguments), plan)


def compression(
    name: str, model: Model, args: Any, folder: Path
) -> tuple[CompressionOptions, CompressionPlan]:
    """(options, what they plan) of a compressed side.

    `unragged` takes uniform budgets as long as the longest of those that are asked for: what the
    same choice of rows holds in pages that span all heads.
    """
    if model.name in CONFIGS:
        given = compression_options(
            model.name,
            folder,
            retention=args.retention,
            budgets=args.budgets,
            scorer_name=args.scorer,
            ratio=args.ratio,
            seed=args.seed,
        )
    else:
        given = {"compression_ratio": args.ratio, "compression_scorer": args.scorer}
        given |= {"compression_profile": args.profile or NO_PROFILE}
        if model.name == RECALL and not args.profile:
            given |= bundled_profile_options()
    if name == "uniform":
        given["compression_level"] = "uniform"
    options, plan = _planned(given, model, args)
    if name == "unragged":
        longest = max(map(max, plan.geometry.head_groups.pages))
        rows = longest * plan.geometry.page_size_rows
        given["compression_level"] = "uniform"
        given["compression_ratio"] = rows / plan.geometry.chunk_size_tokens
        options, plan = _planned(given, model, args)
    return options, plan


def _planned(
    given: dict[str, Any], model: Model, args: Any
) -> tuple[CompressionOptions, CompressionPlan]:
    sizes = {"compression_chunk_size": args.chunk_size, "page_group_size": args.page_group_size}
    options = CompressionOptions.from_mapping({**given, **sizes})
    identity = ModelIdentity.from_config(model.config)
    dtype = args.dtype or served_dtype(model.config)
    return options, make_plan(options, identity, ITEMSIZE_BYTES[dtype])


def check_side(server: Server, side: Side) -> dict[str, Any]:
    """What a healthy server is, from its own log and metrics.

    Raises:
        ServerError: it is not the side that was asked for.
    """
    metrics = parse(server.get("/metrics"))
    active = _ACTIVE.search(server.log_text())
    layout = active[1] if active else None
    planned = side.plan.geometry.digest if side.plan else None
    if layout != planned:
        raise ServerError(
            f"{side.name} serves layout {layout} and {planned} was planned: see {server.log}"
        )
    recent = side.plan.geometry.recent_block_tokens if side.plan else None
    if recent is not None and metrics.block_tokens != recent:
        raise ServerError(
            f"{side.name} has blocks of {metrics.block_tokens} tokens and {recent} was planned: "
            f"its cache is not the compressed one; see {server.log}"
        )
    return {
        "layout": layout,
        "blocks": metrics.num_blocks,
        "block_tokens": metrics.block_tokens,
        "cache_tokens": _cache_tokens(metrics.num_blocks - 1, side, metrics.block_tokens),
        "scorer": side.plan.scorer_name if side.plan else None,
        "budgets": side.plan.level if side.plan else None,
    }


def _cache_tokens(blocks: int, side: Side, block_tokens: int) -> int:
    """Tokens of history that the pool holds; of a compressed one, sealed."""
    geometry = side.plan.geometry if side.plan else None
    return blocks * (geometry.chunk_size_tokens if geometry else block_tokens)
