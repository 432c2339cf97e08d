"""A server under more load than it can take, for minutes, with clients that leave.

    python -m benchmarks.serving.soak --model recall --rate 4 --minutes 10 --out soak.jsonl

Conversations arrive at twice `--rate`, the rate that the server sustains (`drive.py --cells
WORKLOAD/search:R` finds it); a share of the clients hangs up in the middle. Of the recall model,
answers are checked meanwhile. The load comes twice, half of the time each: a queue that grows is
memory too, which allocators keep, and only what a second one adds is a leak. It passes if

- nothing failed: refusals that say so are no failures,
- the checked answers were as good as before the load,
- all KV blocks are free at the end, with nothing running or waiting,
- the memory of the server's processes has not grown from one load to the next.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.serving.client import DIALOGUES, Run
from benchmarks.serving.drive import add_server_options, provenance, served
from benchmarks.serving.load import Level, Phases, run_load
from benchmarks.serving.mistakes import output_file, tells_mistakes
from benchmarks.serving.sides import SERVED_NAME, SIDES, Model, find_model, make_side
from benchmarks.serving.workloads import WORKLOADS, Workload
from tangram.conversations import is_right, make_conversation
from tangram.evaluate.results import append_line
from tangram.plan.models import RECALL
from tangram.serving.scrape import totals
from tangram.serving.server import Server, ServerError

OVERLOAD = 2.0
GROWTH = 1.1
"""Memory at the end over memory after the first load, above which it counts as a leak ..."""
SLACK_BYTES = 64 << 20
"""... beside what allocators keep."""
IDLE_TIMEOUT_S = 30.0
CHECK_EVERY_S = 2.0
ANSWERS_AT_ONCE = 4
WORSE = 0.1
"""Share of right answers that may be lost by chance."""


async def soak(
    server: Server, model: Model, workload: Workload, args: argparse.Namespace
) -> dict[str, Any]:
    """Everything that was seen; `failures` judges it.

    Args:
        server: up.
        model: that it serves.
        workload: of the load, scaled as wanted.
        args: options of `parser`.
    """
    rounds = itertools.count() if model.name == RECALL else None

    async def right() -> float | None:
        return await _right(server, next(rounds)) if rounds else None

    found: dict[str, Any] = {"right_before": await right()}
    found["memory_before_bytes"] = memory_bytes(server)
    loads = []
    for number, name in enumerate(("first", "last")):
        loads.append(await _under_load(server, model, workload, args, args.seed + number, rounds))
        found |= await _settle(server)
        found[f"memory_{name}_bytes"] = memory_bytes(server)
    found["right_after"] = await right()
    shares = [share for load in loads for share in load["right"]]
    found["right_meanwhile"] = sum(shares) / len(shares) if shares else None
    found["outcomes"] = dict(sum((load["outcomes"] for load in loads), Counter()))
    found["reasons"] = sorted({reason for load in loads for reason in load["reasons"]})[:10]
    found["waiting_most"] = max(load["waiting_most"] for load in loads)
    return found


def failures(found: dict[str, Any]) -> list[str]:
    """What is wrong with a soak, in words; empty if it passed."""
    wrong = []
    if errors := found["outcomes"].get("error", 0):
        wrong.append(f"{errors} requests failed: {found['reasons']}")
    if not found["outcomes"].get("done"):
        wrong.append("no request was answered")
    for name in ("running", "waiting", "usage"):
        if found[name]:
            wrong.append(f"{name} is {found[name]:g} with no client left")
    first, last = found["memory_first_bytes"], found["memory_last_bytes"]
    if last > first * GROWTH + SLACK_BYTES:
        wrong.append(f"memory grew from {first >> 20} to {last >> 20} MiB")
    before = found["right_before"]
    for name in ("right_meanwhile", "right_after"):
        if before is not None and (found[name] is None or found[name] < before - WORSE):
            wrong.append(f"{name} is {found[name]}, before the load it was {before:.2f}")
    return wrong


async def _under_load(
    server: Server,
    model: Model,
    workload: Workload,
    args: argparse.Namespace,
    seed: int,
    rounds: Iterator[int] | None,
) -> dict[str, Any]:
    """Half of the time; answers are checked meanwhile where there are rounds to take."""
    run = Run(server.url, SERVED_NAME, DIALOGUES[args.api], args.abort_share, seed)
    phases = Phases(warmup_s=0, window_s=args.minutes * 60 / 2, drain_s=args.drain_s)
    level = Level("open", OVERLOAD * args.rate)
    async with run:
        ended = asyncio.Event()
        checking = asyncio.create_task(_keep_checking(server, ended, rounds)) if rounds else None
        try:
            await run_load(run, workload, level, phases, vocab_size=model.vocab_size)
        finally:
            ended.set()
    return {
        "outcomes": Counter(record.outcome for record in run.records),
        "reasons": [r.reason for r in run.records if r.outcome in ("error", "refused")],
        "waiting_most": max((sample.waiting for sample in run.samples), default=0),
        "right": await checking if checking else [],
    }


async def _keep_checking(
    server: Server, ended: asyncio.Event, rounds: Iterator[int]
) -> list[float]:
    """Shares of right answers of conversations begun before the load ended, one round at least."""
    shares: list[float] = []
    while not (shares and ended.is_set()):
        shares.append(await _right(server, next(rounds)))
        await asyncio.sleep(CHECK_EVERY_S)
    return shares


async def _right(server: Server, round_number: int) -> float:
    """Share of right answers of a few conversations that nobody has played yet."""
    seeds = range(ANSWERS_AT_ONCE * round_number, ANSWERS_AT_ONCE * (round_number + 1))
    shares = await asyncio.gather(*(_right_answers(server, 1_000_000 + s) for s in seeds))
    return sum(shares) / len(shares)


async def _right_answers(server: Server, seed: int, turns: int = 2) -> float:
    """Share of right answers of a conversation of the recall model; a failure is a wrong one."""
    import openai

    conversation = make_conversation(seed, context_tokens=500, facts=6, turns=turns)
    answers: list[str] = []
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", timeout=600, max_retries=0
    ) as api:
        for turn in range(turns):
            try:
                response = await api.chat.completions.create(
                    model=SERVED_NAME,
                    messages=conversation.messages(turn, answers),
                    max_tokens=8,
                    temperature=0,
                )
            except openai.OpenAIError:
                break
            answers.append(response.choices[0].message.content or "")
    asked = zip(answers, conversation.turns, strict=False)
    return sum(is_right(answer, turn.answer) for answer, turn in asked) / turns


async def _settle(server: Server) -> dict[str, float]:
    """Wait until the server is idle; what it still holds then, or when patience ends."""
    deadline = asyncio.get_running_loop().time() + IDLE_TIMEOUT_S
    while True:
        server.check_alive()
        metrics = totals(await asyncio.to_thread(server.get, "/metrics"))
        held = {
            "running": metrics["vllm:num_requests_running"],
            "waiting": metrics["vllm:num_requests_waiting"],
            "usage": metrics["vllm:kv_cache_usage_perc"],
        }
        if not any(held.values()) or asyncio.get_running_loop().time() > deadline:
            return held
        await asyncio.sleep(0.25)


def memory_bytes(server: Server) -> int:
    """Resident memory of all processes of a server, from /proc; shared pages count in each."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # The name, in parentheses, may hold anything; the group is the third field after it.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) != server.process_group:
                continue
            status = (folder / "status").read_text()
        except (OSError, IndexError):
            continue  # it ended meanwhile
        for line in status.splitlines():
            if line.startswith("VmRSS:"):
                total += int(line.split()[1]) << 10
    return total


@tells_mistakes
def main(argv: list[str] | None = None) -> int:
    """Soak a server; 0 if it passed."""
    args = parser().parse_args(argv)
    model = find_model(args.model)
    side = make_side(args.side, model, args)
    workload = WORKLOADS[args.workload].scaled(args.factor)
    try:
        with served(side, args) as (server, about):
            found = asyncio.run(soak(server, model, workload, args))
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    wrong = failures(found)
    told = provenance(args, argv if argv is not None else sys.argv[1:], "soak")
    line = {"what": "soak", "model": args.model, "side": args.side, "rate_per_s": args.rate}
    line |= {"minutes": args.minutes, "abort_share": args.abort_share, "wrong": wrong}
    if args.out:
        append_line(args.out, json.dumps(told | about | line | found))
    print(json.dumps(line | found, indent=2))
    return 1 if wrong else 0


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_server_options(made)
    add = made.add_argument
    add("--side", choices=list(SIDES), default="tangram")
    add("--workload", choices=list(WORKLOADS), default="short")
    add("--factor", type=float, default=1.0, help="all lengths times this")
    add("--rate", type=float, required=True, help="conversations/s that the server sustains")
    add("--minutes", type=float, default=5, help="both loads together")
    add("--abort-share", type=float, default=0.2, help="of the requests, left in the middle")
    add("--drain-s", type=float, default=10, help="in which answers under way may end")
    add("--api", choices=list(DIALOGUES), default="tokens")
    add("--logs", type=Path, default=Path(tempfile.gettempdir()) / "bench-serving")
    add("--commit", help="where the tree is no git checkout")
    add("--out", type=output_file, help="a JSON line is appended there")
    return made


if __name__ == "__main__":
    sys.exit(main())
