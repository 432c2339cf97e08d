"""`tangram demo`: the same conversations against stock vLLM and against compression, compared.

Two real servers of the bundled recall model, one after the other, with the same memory for the KV
cache. The conversations are played through the `openai` client; then all of them are held open at
once for a moment, which is when the cache holds most.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tangram.arguments import Parser, check_output, count, tokens
from tangram.children import ended_by_sigterm
from tangram.cli.demo_report import print_report, report, server_figures
from tangram.conversations import TURN_TOKENS, Conversation, make_conversation
from tangram.errors import ConfigurationError
from tangram.installed import is_cpu_build
from tangram.plan.cached import with_profile_at_hand
from tangram.plan.compression_plan import CompressionPlan, make_plan
from tangram.plan.models import (
    RECALL,
    RECALL_GROUP_SIZE,
    bundled_model,
    bundled_profile_options,
    read_config,
)
from tangram.plan.options import CompressionOptions, compression_arguments
from tangram.profile import ModelIdentity
from tangram.scorers import is_auto
from tangram.serving.played import MAX_ANSWER_TOKENS, client_of, hold_all, play
from tangram.serving.scrape import PeakSampler, parse
from tangram.serving.server import Server, ServerError

STOCK, COMPRESSED = "stock", "compressed"
START_TIMEOUT_S = 300.0
HOLD_TOKENS = 256
"""Of the answers that hold all conversations open: enough for metrics read ten times a second."""
MOST_HOLDS, ENOUGH_SAMPLES = 5, 5
"""A busy machine reads the metrics less often: they are held open again until it has."""
STEP_TOKENS = 1024

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class Demo:
    """What is played, and how both servers are started."""

    conversations: tuple[Conversation, ...]
    concurrency: int
    options: CompressionOptions
    plan: CompressionPlan
    server_arguments: tuple[str, ...]
    kv_cache_memory_bytes: int


def run(argv: Sequence[str]) -> int:
    """Play the demo; 0 when every server answered and compression was really active."""
    args = parser().parse_args(argv)
    check_output("--json", args.json, args.profile)
    console = Console()
    demo = prepare(args)
    names = [COMPRESSED] if args.skip_stock else [STOCK, COMPRESSED]
    logs = Path(tempfile.mkdtemp(prefix="tangram-demo-"))
    with ended_by_sigterm():
        try:
            servers = {name: _play_against(name, demo, logs, console) for name in names}
        except ServerError as error:
            console.print(f"tangram: {error}", style="red", markup=False, highlight=False)
            return 1
        except (KeyboardInterrupt, SystemExit):
            shutil.rmtree(logs)
            raise
    result = report(demo.plan, servers, args, argv)
    print_report(result, console)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    for name, figures in servers.items():
        if figures["not_as_planned"]:
            wrong = "compression was not active" if name == COMPRESSED else "stock was not stock"
            message = f"tangram: {wrong}: {'; '.join(figures['not_as_planned'])}; logs: {logs}"
            console.print(message, style="red", markup=False)
            return 1
    shutil.rmtree(logs)
    return 0


def prepare(args: argparse.Namespace) -> Demo:
    """The conversations, the plan and the servers' arguments.

    Raises:
        ConfigurationError: arguments that do not fit each other or the model.
    """
    conversations = tuple(
        make_conversation(args.seed + number, args.context_tokens, args.facts, args.turns)
        for number in range(args.conversations)
    )
    config = read_config(str(bundled_model()))
    # Wrong answers may be longer than right ones, and stay in the history.
    spare_tokens = args.turns * (MAX_ANSWER_TOKENS + TURN_TOKENS) + HOLD_TOKENS
    max_model_len = args.context_tokens + spare_tokens
    if max_model_len > config["max_position_embeddings"]:
        raise ConfigurationError(
            f"--context-tokens is {args.context_tokens}: with its answers a conversation takes "
            f"{max_model_len}, and the model {config['max_position_embeddings']}; ask for less"
        )
    identity = ModelIdentity.from_config(config)
    options = with_profile_at_hand(_options(args), str(bundled_model()), identity, "--profile")
    dtype, itemsize_bytes = ("float32", 4) if is_cpu_build() else ("bfloat16", 2)
    plan = make_plan(options, identity, itemsize_bytes)
    if args.kv_memory is None:
        # Room for every conversation at its longest, uncompressed, and half as much again.
        memory = plan.geometry.full_bytes(max_model_len * args.conversations) * 3 // 2
    else:
        memory = args.kv_memory << 20
        layout = plan.geometry
        needed = (layout.held_bytes if args.skip_stock else layout.full_bytes)(max_model_len)
        if memory < needed:
            raise ConfigurationError(
                f"--kv-memory is {args.kv_memory}: a conversation of {max_model_len} tokens takes "
                f"{needed / 2**20:.1f} MiB: give more, or less --context-tokens"
            )
    arguments = ["--served-model-name", RECALL, "--dtype", dtype, "--enforce-eager"]
    arguments += ["--max-model-len", str(max_model_len), "--kv-cache-memory-bytes", str(memory)]
    # What a step computes is raw until its end, so long steps would hide what is held between them.
    arguments += ["--max-num-batched-tokens", str(STEP_TOKENS)]
    return Demo(conversations, args.concurrency, options, plan, tuple(arguments), memory)


def _options(args: argparse.Namespace) -> CompressionOptions:
    """What is asked for; the bundled profile where nothing else is."""
    given = {
        "compression_ratio": args.ratio,
        "page_group_size": args.page_group_size,
        "compression_chunk_size": args.chunk_size,
        "compression_scorer": args.scorer,
        "compression_level": args.level,
        "compression_profile": args.profile,
    }
    asked = args.profile or (args.scorer and not is_auto(args.scorer))
    return CompressionOptions.from_mapping(
        {**given, **({} if asked else bundled_profile_options())}
    )


def _play_against(name: str, demo: Demo, logs: Path, console: Console) -> dict[str, Any]:
    """Start a server, play everything, end the server; its figures.

    Raises:
        ServerError: it did not come up, or stopped answering.
    """
    import openai

    arguments = [str(bundled_model()), *demo.server_arguments]
    if name == COMPRESSED:
        arguments += compression_arguments(demo.options)
    called = "vLLM with compression" if name == COMPRESSED else "stock vLLM"
    turns = sum(len(conversation.turns) for conversation in demo.conversations)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:g}/{task.total:g}"),
        TimeElapsedColumn(),
    )
    server = Server(called, arguments, logs / f"{name}.log", _ENVIRONMENT)
    with server, Progress(*columns, console=console) as progress:
        starting = progress.add_task(f"{called}: starting", total=1)
        server.wait_until_healthy(START_TIMEOUT_S)
        progress.update(starting, completed=1)
        playing = progress.add_task(f"{called}: questions", total=turns)
        try:
            with client_of(server.url) as client:
                client.completions.create(model=RECALL, prompt="warm up", max_tokens=2)
                before = parse(server.get("/metrics"))
                with PeakSampler(lambda: server.get("/metrics")) as sampler:
                    started_s = progress.get_time()
                    replies = play(
                        client,
                        RECALL,
                        demo.conversations,
                        concurrency=demo.concurrency,
                        on_reply=lambda reply: progress.advance(playing),
                    )
                    seconds = progress.get_time() - started_s
                    after = parse(server.get("/metrics"))
                    for _ in range(MOST_HOLDS):
                        seen = sampler.num_samples
                        hold_all(client, RECALL, demo.conversations, replies, tokens=HOLD_TOKENS)
                        if sampler.num_samples >= seen + ENOUGH_SAMPLES:
                            break
        except (openai.OpenAIError, OSError, ValueError) as error:
            server.check_alive()
            raise ServerError(f"{called} did not answer: {error}; its log: {server.log}") from error
        return server_figures(
            demo.plan,
            server,
            replies,
            before=before,
            after=after,
            peak_blocks=sampler.peak_blocks,
            num_samples=sampler.num_samples,
            seconds=seconds,
            memory_bytes=demo.kv_cache_memory_bytes,
            compressed=name == COMPRESSED,
        )


def parser() -> argparse.ArgumentParser:
    """The subcommand's parser."""
    made = Parser(
        prog="tangram demo",
        description="Play conversations against stock vLLM and against compression, and compare.",
    )
    add = made.add_argument
    add("--ratio", type=float, default=0.25, help="share of all rows that is KEPT (default: 0.25)")
    add("--conversations", type=count, default=8, metavar="N", help="(default: 8)")
    add("--turns", type=count, default=4, metavar="K", help="questions in each (default: 4)")
    add(
        "--context-tokens",
        type=tokens,
        default=3000,
        metavar="T",
        help="of a whole conversation (default: 3000)",
    )
    add("--facts", type=count, default=24, metavar="F", help="told in each (default: 24)")
    add("--concurrency", type=count, default=4, metavar="N", help="at a time (default: 4)")
    add("--seed", type=int, default=1, help="of the conversations (default: 1)")
    add("--chunk-size", type=tokens, metavar="C", help="tokens that are sealed together")
    add(
        "--page-group-size",
        type=count,
        default=RECALL_GROUP_SIZE,
        metavar="H",
        help=f"KV heads that share a budget (default: {RECALL_GROUP_SIZE})",
    )
    add("--scorer", help="which tokens are worth keeping")
    add("--level", help="rule that turns a profile into budgets")
    add(
        "--profile",
        help="calibration file (default: the bundled one; of another scorer one that is cached), "
        "or none for uniform budgets, which lose answers",
    )
    add("--kv-memory", type=count, metavar="MIB", help="of either server's KV cache")
    add("--skip-stock", action="store_true", help="only the server with compression")
    add("--json", type=Path, metavar="FILE", help="write every figure there")
    return made
