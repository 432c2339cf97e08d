"""Multi-turn serving of compression against stock vLLM, over real OpenAI servers.

    python -m benchmarks.serving.drive --model qwen3-4b --sides stock,tangram \
        --cells long/closed:24,short/open:2 --retention FILE --out serving.jsonl --resume

Sides are started one after the other on this machine. Every (model, side, workload, level) is a
cell: one JSON line, appended when it is done, and skipped with `--resume` when it is there. With
`--time-limit-s` no cell is begun that could not end in time; the exit code is then 3, and the same
command goes on. docs/serving-benchmarks.md tells the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.kernels.budgets import BUDGETS
from benchmarks.serving.client import DIALOGUES, Run, TokenDialogue
from benchmarks.serving.load import Level, Phases, run_load
from benchmarks.serving.mistakes import existing_file, output_file, tells_mistakes
from benchmarks.serving.rates import TooFewRequests, best_rate, next_rate, sustained
from benchmarks.serving.records import Record
from benchmarks.serving.sides import (
    COMPRESSED,
    ROOT,
    SERVED_NAME,
    SIDES,
    Model,
    Side,
    check_side,
    find_model,
    make_side,
    server_options,
)
from benchmarks.serving.workloads import WORKLOADS, Workload
from tangram.arguments import share
from tangram.evaluate.results import append_line
from tangram.installed import machine, versions
from tangram.plan.dtypes import ITEMSIZE_BYTES
from tangram.serving.server import Server, ServerError

START_TIMEOUT_S = 300.0
NOT_DONE = 3
"""Exit code when the time limit left cells for another run."""


class Cells:
    """The cells in a file, and those still to do.

    Args:
        path: JSON lines; those that are there count only with `resume`.
        resume: whether to keep what was done.
        time_limit_s: from now on; None for no limit.
    """

    def __init__(self, path: Path, *, resume: bool, time_limit_s: float | None = None) -> None:
        self.path = path
        self._begun = time.monotonic()
        self._limit_s = time_limit_s
        self._done: dict[tuple[Any, ...], dict[str, Any]] = {}
        if resume and path.exists():
            for text in path.read_text().splitlines():
                try:
                    line = json.loads(text)
                except ValueError:
                    continue  # cut off when a run was killed
                self._done[cell_key(line)] = line

    def find(self, about: dict[str, Any]) -> dict[str, Any] | None:
        """The line of a cell that is done."""
        return self._done.get(cell_key(about))

    def lines(self) -> list[dict[str, Any]]:
        """The lines of all cells that are done."""
        return list(self._done.values())

    def add(self, line: dict[str, Any]) -> None:
        """Append a line."""
        self._done[cell_key(line)] = line
        append_line(self.path, json.dumps(line))

    def has_time_for(self, seconds: float) -> bool:
        """Whether so much is left."""
        return self._limit_s is None or time.monotonic() - self._begun + seconds <= self._limit_s


KEY = (
    "what", "model", "side", "ratio", "workload", "factor", "api", "level", "phases", "seed",
    "options", "ttft_limit_s",
)  # fmt: skip


def cell_key(line: dict[str, Any]) -> tuple[Any, ...]:
    """What tells one cell from another."""
    made = {"options": server_options(line.get("side", ""), line.get("options") or {})}
    return tuple(json.dumps((line | made).get(name)) for name in KEY)


class OutOfTime(Exception):
    """The time limit leaves no room for the next cell."""


@tells_mistakes
def main(argv: list[str] | None = None) -> int:
    """Run what is asked for and not yet done."""
    args = parser().parse_args(argv)
    cells = Cells(args.out, resume=args.resume, time_limit_s=args.time_limit_s)
    model = find_model(args.model)
    told = provenance(args, argv if argv is not None else sys.argv[1:], "drive")
    # All are planned first: a mistake is to be told before a server has run for minutes.
    sides = [make_side(name, model, args) for name in args.sides]
    try:
        for side in sides:
            play_side(side, model, args, cells, told)
    except OutOfTime as error:
        print(error, flush=True)
        return NOT_DONE
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def play_side(
    side: Side, model: Model, args: argparse.Namespace, cells: Cells, told: dict[str, Any]
) -> None:
    """All cells of a side that are not done; the server starts for the first of them.

    Raises:
        OutOfTime: not all of them were begun.
        ServerError: the server did not come up, or is not what was asked for.
    """
    todo = list(_todo(side, args, cells))
    if not todo:
        return
    phases = Phases(args.warmup_s, args.window_s, args.drain_s, args.warmup_most_s)
    if not cells.has_time_for(args.start_s + phases.most_s):
        raise OutOfTime(f"no time for {side.name}: run the same command again")
    with served(side, args) as (server, found):
        for workload, level in todo:
            base = told | found | about(side.name, args, workload, level)
            scaled = WORKLOADS[workload].scaled(args.factor)
            if level.kind == "search":
                _search(server, scaled, level.amount, model, args, cells, base)
            else:
                _cell(server, scaled, level, model, args, cells, base)


def _todo(side: Side, args: argparse.Namespace, cells: Cells) -> Iterator[tuple[str, Level]]:
    for workload, level in args.cells:
        if cells.find(about(side.name, args, workload, level)) is None:
            yield workload, level


def about(side: str, args: argparse.Namespace, workload: str, level: Level) -> dict[str, Any]:
    """What tells a cell of a side from another: the fields of `KEY`, from the options.

    A file of shares is told by its contents, 12 digits of their SHA-256.
    """
    options = dict(vars(args))
    if args.retention:
        options["retention"] = hashlib.sha256(args.retention.read_bytes()).hexdigest()[:12]
    return {
        "what": "sustainable" if level.kind == "search" else "cell",
        "model": args.model,
        "side": side,
        "ratio": args.ratio if side in COMPRESSED else None,
        "workload": workload,
        "factor": args.factor,
        "api": args.api,
        "level": str(level),
        "phases": [args.warmup_s, args.window_s],
        "seed": args.seed,
        "options": server_options(side, options),
        "ttft_limit_s": args.ttft_limit_s if level.kind == "search" else None,
    }


@contextmanager
def served(side: Side, args: argparse.Namespace) -> Iterator[tuple[Server, dict[str, Any]]]:
    """A server that is up, is what was asked for, and has answered once."""
    log = args.logs / f"{args.model.replace('/', '_')}-{side.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    environment = {"VLLM_LOGGING_LEVEL": "INFO"}
    with Server(side.name, side.arguments, log, environment) as server:
        server.wait_until_healthy(START_TIMEOUT_S)
        found = check_side(server, side) | {"server_start_s": time.monotonic() - begun}
        record = asyncio.run(_first_answer(server))
        if record.outcome != "done":
            raise ServerError(f"{side.name} does not answer: {record.reason}; see {server.log}")
        print(side.name, json.dumps(found), flush=True)
        try:
            # Model and profile lie in a folder of this machine.
            told = [Path(word).name if word.startswith("/") else word for word in side.arguments]
            yield server, found | {"server": shlex.join(told)}
        except (aiohttp.ClientError, OSError, KeyError) as error:
            server.check_alive()
            raise ServerError(f"{side.name}: {error!r}; see {server.log}") from error


async def _first_answer(server: Server) -> Record:
    async with Run(server.url, SERVED_NAME) as run:
        record = Record(0, 0, run.now())
        await run.request(record, TokenDialogue(), list(range(10, 60)) * 20, 16)
        return record


def _cell(
    server: Server,
    workload: Workload,
    level: Level,
    model: Model,
    args: argparse.Namespace,
    cells: Cells,
    base: dict[str, Any],
) -> dict[str, Any]:
    """Measure one cell and write it."""
    phases = Phases(args.warmup_s, args.window_s, args.drain_s, args.warmup_most_s)
    if not cells.has_time_for(phases.most_s):
        raise OutOfTime(f"no time for {base['workload']}, {level}: run the same command again")
    server.check_alive()
    found = asyncio.run(_load(server, workload, level, phases, model, args))
    line = base | found
    cells.add(line)
    print(_brief(line), flush=True)
    return line


async def _load(
    server: Server,
    workload: Workload,
    level: Level,
    phases: Phases,
    model: Model,
    args: argparse.Namespace,
) -> dict[str, Any]:
    run = Run(server.url, SERVED_NAME, DIALOGUES[args.api], seed=args.seed)
    async with run:
        found = await run_load(run, workload, level, phases, vocab_size=model.vocab_size)
    reasons = sorted({r.reason for r in run.records if r.outcome in ("error", "refused")})
    return found | {"lengths": asdict(workload), "reasons": reasons[:5]}


def _search(
    server: Server,
    workload: Workload,
    start: float,
    model: Model,
    args: argparse.Namespace,
    cells: Cells,
    base: dict[str, Any],
) -> None:
    """Find the sustainable rate; every rate that is tried is a cell, so that a search resumes."""
    tried: dict[float, bool] = {}
    while (rate := next_rate(tried, start)) is not None:
        level = Level("open", rate)
        cell = base | about(base["side"], args, base["workload"], level)
        line = cells.find(cell) or _cell(server, workload, level, model, args, cells, cell)
        try:
            tried[rate], why = sustained(line, args.ttft_limit_s)
        except TooFewRequests as error:
            raise ServerError(f"{rate:g} conversations/s cannot be judged: {error}") from error
        print(f"  {rate:g} conversations/s: {why or 'sustained'}", flush=True)
    best = best_rate(tried)
    tried_rates = {f"{rate:g}": ok for rate, ok in tried.items()}
    cells.add(base | {"rate_per_s": best, "tried": tried_rates})
    print(f"{base['side']}, {base['workload']}: sustains {best} conversations/s")


def _brief(line: dict[str, Any]) -> str:
    first = line["ttft_s"] or {"p50": float("nan"), "p95": float("nan")}
    share = line["cached_share"]
    return (
        f"{line['side']}, {line['workload']}, {line['level']}: {line['requests_per_s']:.3f} req/s, "
        f"{line['output_tokens_per_s']:.0f} tokens/s, first token {first['p50']:.2f} s "
        f"(p95 {first['p95']:.2f}), cached {'-' if share is None else f'{share:.2f}'}, "
        f"{line['outcomes']}"
    )


def provenance(args: argparse.Namespace, argv: list[str], script: str) -> dict[str, Any]:
    """Machine, versions, commit and command; asks no library that would start a CUDA context."""
    return {
        "machine": _gpus() or platform.processor() or platform.machine(),
        "host": machine(),
        "versions": versions(),
        "commit": args.commit or output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "command": shlex.join(["python", "-m", f"benchmarks.serving.{script}", *argv]),
        "seed": args.seed,
    }


def _gpus() -> str | None:
    """`NVIDIA H200`, or `4 x NVIDIA H200` on a machine of several."""
    names = (output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "").splitlines()
    counts = {name: names.count(name) for name in names}
    return ", ".join(n if many == 1 else f"{many} x {n}" for n, many in counts.items()) or None


def output(*command: str) -> str | None:
    """What a command prints, or None where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def cells_of(text: str) -> list[tuple[str, Level]]:
    """Cells, separated by commas."""
    return [cell_of(part) for part in text.split(",")]


def cell_of(text: str) -> tuple[str, Level]:
    """A workload and a level of load, `WORKLOAD/LEVEL`."""
    workload, _, level = text.partition("/")
    if workload not in WORKLOADS:
        raise argparse.ArgumentTypeError(
            f"{text}: give WORKLOAD/LEVEL, the workload one of {', '.join(WORKLOADS)}"
        )
    return workload, level_of(level)


def level_of(text: str) -> Level:
    """`closed:N` users, `open:R` conversations a second, or `search:R`, the sustainable rate."""
    kind, _, amount = text.partition(":")
    try:
        value = float(amount)
    except ValueError:
        value = 0.0
    whole = kind != "closed" or value.is_integer()
    if kind not in ("closed", "open", "search") or not value > 0 or not whole:
        raise argparse.ArgumentTypeError(
            f"{text}: give closed:USERS, open:RATE or search:FIRST_RATE"
        )
    return Level(kind, value)


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_server_options(made)
    add = made.add_argument
    add("--sides", type=listed(SIDES), default=["stock", "tangram"], help=", ".join(SIDES))
    add(
        "--cells",
        type=cells_of,
        default=[("short", Level("closed", 8))],
        help=f"WORKLOAD/LEVEL, several with commas; workloads: {', '.join(WORKLOADS)}; levels:\n"
        "closed:USERS, open:RATE (conversations/s), search:FIRST_RATE",
    )
    add("--api", choices=list(DIALOGUES), default="tokens")
    add("--factor", type=float, default=1.0, help="all lengths times this")
    add("--warmup-s", type=float, default=30)
    add("--warmup-most-s", type=float, default=0, help="closed loops wait so long for all users")
    add("--window-s", type=float, default=60)
    add("--drain-s", type=float, default=15)
    add("--ttft-limit-s", type=float, default=5, help="p95 that a sustained rate keeps")
    add("--start-s", type=float, default=80, help="time that a server's start is expected to take")
    add("--time-limit-s", type=float, help="begin no cell that could end later")
    add("--resume", action="store_true", help="skip cells that are in --out")
    add("--logs", type=Path, default=Path(tempfile.gettempdir()) / "bench-serving")
    add("--commit", help="where the tree is no git checkout")
    add("--out", type=output_file, required=True, help="JSON lines are appended there")
    return made


def add_model_options(made: argparse.ArgumentParser) -> None:
    """What says which model is served, and how it is compressed."""
    add = made.add_argument
    add("--model", default="qwen3-4b", help="a shape, recall, or a real model")
    add("--ratio", type=share, default=0.25)
    add("--retention", type=existing_file, help=".npz of shares of real heads, for shapes")
    add("--budgets", choices=BUDGETS, default=BUDGETS[0])
    add("--scorer", default="key_diff")
    add("--profile", help="of a real model; the bundled one for recall")
    add("--chunk-size", type=int)
    add("--page-group-size", type=int)
    add("--max-model-len", type=int, default=131072)
    add("--seed", type=int, default=0)


def add_server_options(made: argparse.ArgumentParser) -> None:
    """What says which server is started."""
    add_model_options(made)
    add = made.add_argument
    add("--dtype", choices=list(ITEMSIZE_BYTES), help="of the server; the model's own without")
    add("--gpu-memory-utilization", type=float, default=0.9)
    add("--offload-gib", type=float, default=64, help="host memory of the side offload")
    add("--server-args", default="", help="further arguments of every server, as one string")


def listed(known: dict[str, Any]) -> Callable[[str], list[str]]:
    """Reads names with commas, all of which must be known."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(
                f"unknown {', '.join(unknown)}: choose of {', '.join(known)}"
            )
        return names

    return parse


if __name__ == "__main__":
    sys.exit(main())
