"""Loads: many conversations at once against one server, with a warm-up and a measured window."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.client import Run
from benchmarks.serving.records import figures
from benchmarks.serving.workloads import Workload, make_script, open_loop
from tangram.serving.scrape import totals

COUNTERS = {
    "preemptions": "vllm:num_preemptions_total",
    "prefix_cache_queries": "vllm:prefix_cache_queries_total",
    "prefix_cache_hits": "vllm:prefix_cache_hits_total",
    "external_cache_hits": "vllm:external_prefix_cache_hits_total",
}


LATE_S = 60.0
"""For which arrivals go on; the run's stop is what ends them."""


@dataclass(frozen=True)
class Level:
    """How much load.

    Attributes:
        kind: `closed`: users who each play one conversation after the other; `open`: conversations
            arrive at random, whatever the server does.
        amount: users, or conversations a second.
    """

    kind: str
    amount: float

    def __str__(self) -> str:
        return f"{self.kind} {self.amount:g}"


@dataclass(frozen=True)
class Phases:
    """Seconds of a run.

    Attributes:
        warmup_s: before the window. In a closed loop it lasts until every user has had an answer
            too, so that all histories have been read once.
        warmup_most_s: at most, in a closed loop.
        window_s: what is measured.
        drain_s: after the window: nothing is sent, and answers under way may end.
    """

    warmup_s: float
    window_s: float
    drain_s: float
    warmup_most_s: float = 0.0

    @property
    def most_s(self) -> float:
        """Longest time that a run can take."""
        return max(self.warmup_s, self.warmup_most_s) + self.window_s + self.drain_s


async def run_load(
    run: Run, workload: Workload, level: Level, phases: Phases, *, vocab_size: int
) -> dict[str, Any]:
    """The figures of a workload at one level of load; `run` keeps every request.

    Args:
        run: an entered client; its seed decides the conversations and their arrivals.
        workload: what is played.
        level: how much of it.
        phases: how long.
        vocab_size: of the model.
    """

    def play(number: int, due_s: float, joined: bool) -> asyncio.Task[None]:
        script = make_script(workload, run.seed, number, vocab_size, joined=joined)
        return asyncio.create_task(run.play(script, due_s))

    watching = asyncio.create_task(run.watch())
    ready = asyncio.Event()
    if level.kind == "closed":
        users = int(level.amount)
        work = [asyncio.create_task(_user(run, users, u, play)) for u in range(users)]
        work_done = asyncio.create_task(_all_answered(run, users, ready))
    else:
        ready.set()
        # Some that come too late: the window begins when the server has told its counters.
        until = phases.warmup_s + phases.window_s + LATE_S
        work = [asyncio.create_task(_arrive(run, workload, level.amount, until, play))]
        work_done = None
    try:
        await run.sleep_until(phases.warmup_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, phases.warmup_most_s - run.now())):
                await ready.wait()
        before, start = totals(await run.get("/metrics")), run.now()
        run.stop_s = start + phases.window_s
        await asyncio.sleep(phases.window_s)
        after, stop = totals(await run.get("/metrics")), run.stop_s
        await asyncio.wait(work, timeout=phases.drain_s)
    finally:
        for task in (*work, watching, *([work_done] if work_done else [])):
            task.cancel()
        results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result
    open_loop = level.kind == "open"
    found = figures(run.records, run.samples, (start, stop), open_loop=open_loop, end_s=run.now())
    counted = {
        name: after[metric] - before.get(metric, 0.0)
        for name, metric in COUNTERS.items()
        if metric in after
    }
    share = cached_share(counted)
    found["cached_share"] = found["cached_share"] if share is None else share
    own = {name: value for name, value in after.items() if name.startswith("tangram:")}
    return found | {
        "warmup_s": start,
        "all_users_answered": ready.is_set(),
        "counters": counted,
        "tangram_metrics": own or None,
    }


def cached_share(counters: Mapping[str, float]) -> float | None:
    """Share of the prompts' tokens that came from caches; None of a server that does not count.

    What answers say of themselves leaves out those that are not through, the slowest.
    """
    asked = counters.get("prefix_cache_queries")
    if not asked:
        return None
    return (counters["prefix_cache_hits"] + counters.get("external_cache_hits", 0.0)) / asked


Play = Callable[[int, float, bool], asyncio.Task[None]]


async def _user(run: Run, users: int, user: int, play: Play) -> None:
    """Conversation after conversation; the first is joined in the middle."""
    for number in itertools.count(user, users):
        if run.now() >= run.stop_s:
            return
        before = len(run.records)
        await _stays(play(number, run.now(), number == user))
        if len(run.records) == before:
            return  # the run stopped before its first turn
        last = max((r for r in run.records if r.conversation == number), key=lambda r: r.turn)
        if last.outcome in ("refused", "error"):
            await asyncio.sleep(0.5)  # a server that fails at once is not to be flooded


async def _arrive(run: Run, workload: Workload, rate: float, until_s: float, play: Play) -> None:
    """Conversations under way at the start, and all that arrive, each on its own."""
    tasks: list[asyncio.Task[None]] = []
    try:
        for number, (moment, joined) in enumerate(open_loop(workload, rate, until_s, run.seed)):
            if not joined and not await run.sleep_until(moment):
                break
            tasks.append(play(number, moment, joined))
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _stays(task: asyncio.Task[None]) -> None:
    """Wait for a task, which goes when the waiter does."""
    try:
        await task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _all_answered(run: Run, users: int, ready: asyncio.Event) -> None:
    while len({r.conversation for r in run.records if r.output_tokens} & set(range(users))) < users:
        await asyncio.sleep(0.25)
    ready.set()
