"""The serving benchmark from one command, on as many GPUs as there are.

    python -m benchmarks.serving.study --retention FILE --out serving.jsonl
    python -m benchmarks.serving.study --list

A job is a server and the cells that it plays. Every free GPU takes the next job, so that the sides
of a pair run at the same time where there are two GPUs, and one after the other where there is one.
Cells go to --out as they are done; what is there is not run again, so the same command goes on
where it was stopped. With `--time-limit-s` nothing is begun that could end later, and the exit code
is 3 while anything is left.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.serving import drive
from benchmarks.serving.load import Phases
from benchmarks.serving.mistakes import existing_file, output_file, tells_mistakes
from benchmarks.serving.sides import ROOT
from tangram.errors import ConfigurationError

SERVER_ARGS = "--max-num-batched-tokens 8192 --max-num-seqs 256"
DRAIN_S = 2.0
FAILED, LEFT = 1, drive.NOT_DONE


@dataclass(frozen=True)
class Load:
    """Cells that share their phases."""

    cells: tuple[str, ...]
    phases: Phases


def load(warmup_s: float, warmup_most_s: float, window_s: float, *cells: str) -> Load:
    """Cells, and how long each is played."""
    return Load(cells, Phases(warmup_s, window_s, DRAIN_S, warmup_most_s))


LONG = load(30, 200, 110, "long/closed:20")
MID = load(25, 125, 100, "mid/closed:48")
# Fewer bytes a token, or more: as many users as stock's cache does not hold.
LONG_7B = load(30, 230, 110, "long/closed:28")
MID_32B = load(25, 125, 100, "mid/closed:12")
# More than a compressed cache holds with ease, where it matters what stays cached of each.
CROWDED = load(25, 190, 100, "mid/closed:72")
EVERY_BOUNDARY = ("--server-args", f"{SERVER_ARGS} --prefix-cache-retention-interval 256")
SHORT = load(20, 125, 60, "short/closed:160", "short/closed:48")
AGENT = load(30, 120, 100, "agent/closed:24")
SEARCH = load(30, 30, 70, "mid/search:0.3")
STOCKS_RATE = "stock"
AT_STOCKS_RATE = replace(SEARCH, cells=(f"mid/open:{STOCKS_RATE}",))
"""At the rate that stock was found to sustain: `SEARCH` of stock comes first."""


@dataclass(frozen=True)
class Job:
    """One server and what it plays."""

    model: str
    side: str
    load: Load
    ratio: float = 0.25
    options: tuple[str, ...] = ()
    """Further ones of the driver."""

    @property
    def name(self) -> str:
        """Tells jobs apart; a file name too."""
        words = (self.model, self.side, f"{self.ratio:g}", *self.load.cells, *self.options)
        return "-".join(re.sub(r"[^\w.]+", "_", word.strip("-")) for word in words)


def pair(model: str, load: Load, *sides: str, options: tuple[str, ...] = ()) -> list[Job]:
    """The same load on several sides."""
    return [Job(model, side, load, options=options) for side in sides or ("stock", "tangram")]


Q4 = "qwen3-4b"
PARTS: dict[str, list[Job]] = {
    "long": [*pair(Q4, LONG), *pair("llama-3.1-8b", LONG)],
    "mid": pair(Q4, MID),
    "short": pair(Q4, SHORT),
    "saturation": [*pair(Q4, SEARCH), Job(Q4, "tangram", AT_STOCKS_RATE)],
    "rivals": [
        Job(Q4, "fp8", LONG),
        Job(Q4, "tangram", LONG, 0.5),
        # Of the workloads the one whose users such a share of a host's memory holds.
        Job(Q4, "offload", AGENT, options=("--offload-gib", "160")),
    ],
    "ratios": [Job(Q4, "tangram", LONG, 0.1)],
    "models": [
        # Four KV heads: in one group of them all budgets would be alike.
        *pair("qwen2.5-7b", LONG_7B, options=("--page-group-size", "2")),
        *pair("qwen3-32b", MID_32B),
    ],
    "ablation": pair(Q4, MID, "unragged", "stock-nocache", "tangram-nocache", "uniform"),
    "agent": pair(Q4, AGENT),
    "crowded": [*pair(Q4, CROWDED), Job(Q4, "tangram", CROWDED, options=EVERY_BOUNDARY)],
}
"""Name -> jobs, in the order in which they are run."""


@tells_mistakes
def main(argv: Sequence[str] | None = None) -> int:
    """Run or list the jobs that are asked for."""
    args = _parser().parse_args(argv)
    jobs = [job for part in args.parts for job in PARTS[part]]
    if args.list:
        for job in jobs:
            left, dropped = _left(job, args)
            told = ", ".join(left + dropped) or "done"
            print(f"{job.model:14} {job.side:16} {job.ratio:<5g} {told}")
        return 0
    gpus = args.gpus or _gpus()
    args.logs.mkdir(parents=True, exist_ok=True)
    study = Study(jobs, args)
    workers = [threading.Thread(target=study.work, args=(gpu,)) for gpu in gpus]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return FAILED if study.failed else LEFT if study.left else 0


class Study:
    """The jobs that are still to do, shared by the GPUs' threads.

    Args:
        jobs: in order.
        args: options of the command.
        run: runs a command; gives its exit code.
        clock: seconds.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        args: argparse.Namespace,
        run: Callable[[Job, list[str], str], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._args, self._clock, self._begun = args, clock, clock()
        self._run = run or self._run_process
        self._jobs = list(jobs)
        self._lock = threading.Condition()
        self._running = 0
        self.left = self.failed = 0

    def work(self, gpu: str) -> None:
        """Do jobs on a GPU until none is left that could be begun."""
        while (found := self._take()) is not None:
            job, cells = found
            try:
                code = self._run(job, self._command(job, cells), gpu)
            except OSError as error:
                print(f"{job.name}: {error}", file=sys.stderr)
                code = FAILED
            with self._lock:
                self._running -= 1
                self.failed += code not in (0, LEFT)
                self.left += code == LEFT
                self._lock.notify_all()
            ended = f"exit {code}" + ("" if code in (0, LEFT) else f", see {self._logs(job)}")
            print(f"{self._spent():5.0f} s  GPU {gpu}  {job.name}: {ended}", flush=True)

    def _take(self) -> tuple[Job, list[str]] | None:
        """The next job that has what it needs; waits while that may still come."""
        with self._lock:
            while True:
                for job in list(self._jobs):
                    cells, dropped = _left(job, self._args)
                    if any(cell.endswith(STOCKS_RATE) for cell in cells):
                        continue  # the rate is not known yet
                    self._jobs.remove(job)
                    for reason in dropped:
                        print(f"{job.name}: {reason}", flush=True)
                    if not cells:
                        continue
                    if not self._has_time_for(job):
                        self.left += 1
                        continue
                    self._running += 1
                    return job, cells
                if not self._jobs or not self._running:
                    self.left += len(self._jobs)
                    self._jobs.clear()
                    return None
                self._lock.wait()

    def _spent(self) -> float:
        return self._clock() - self._begun

    def _has_time_for(self, job: Job) -> bool:
        limit = self._args.time_limit_s
        return limit is None or self._spent() + self._args.start_s + job.load.phases.most_s <= limit

    def _command(self, job: Job, cells: list[str]) -> list[str]:
        args = self._args
        command = [*_options(job, cells), "--start-s", f"{args.start_s:g}", "--out", str(args.out)]
        for option in ("retention", "commit"):
            if value := getattr(args, option):
                command += [f"--{option}", str(value)]
        if args.time_limit_s is not None:
            command += ["--time-limit-s", f"{args.time_limit_s - self._spent():.0f}"]
        return [*command, "--resume"]

    def _logs(self, job: Job) -> Path:
        return self._args.logs / job.name

    def _run_process(self, job: Job, command: list[str], gpu: str) -> int:
        logs = self._logs(job)
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / "drive.log").open("w") as log:
            return subprocess.run(
                [sys.executable, "-m", "benchmarks.serving.drive", *command, "--logs", str(logs)],
                cwd=ROOT,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu},
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode


def _left(job: Job, asked: argparse.Namespace) -> tuple[list[str], list[str]]:
    """(the job's cells that are not in the file, why others are not played).

    `open:stock` is the rate once that is known.
    """
    done = drive.Cells(asked.out, resume=True)
    left, dropped = [], []
    for cell in job.load.cells:
        known = _at_stocks_rate(job, cell, done)
        if known is None:
            dropped.append(f"stock sustains no rate that was tried: {cell} is not played")
        elif known.endswith(STOCKS_RATE) or _find(job, known, done, asked.retention) is None:
            left.append(known)
    return left, dropped


def _at_stocks_rate(job: Job, cell: str, done: drive.Cells) -> str | None:
    """The cell with the rate that stock sustains for `stock`, once a search is done.

    None if it found that stock sustains none.
    """
    workload, _, level = cell.partition("/")
    if level != f"open:{STOCKS_RATE}":
        return cell
    search = ("sustainable", "stock", job.model, workload)
    found = [
        line["rate_per_s"]
        for line in done.lines()
        if tuple(line.get(name) for name in ("what", "side", "model", "workload")) == search
    ]
    if not found:
        return cell
    rate = next((rate for rate in found if rate is not None), None)
    return None if rate is None else f"{workload}/open:{rate:g}"


def _find(job: Job, cell: str, done: drive.Cells, retention: Path | None) -> dict[str, Any] | None:
    """The line of a job's cell that is done, as the driver would look for it."""
    given = ["--retention", str(retention)] if retention else []
    args = drive.parser().parse_args([*_options(job, [cell]), *given, "--out", os.devnull])
    return done.find(drive.about(job.side, args, *args.cells[0]))


def _options(job: Job, cells: Sequence[str]) -> list[str]:
    """The driver's options that say what is played."""
    phases = job.load.phases
    return [
        "--model", job.model, "--sides", job.side, "--ratio", f"{job.ratio:g}",
        "--cells", ",".join(cells), "--warmup-s", f"{phases.warmup_s:g}",
        "--warmup-most-s", f"{phases.warmup_most_s:g}", "--window-s", f"{phases.window_s:g}",
        "--drain-s", f"{phases.drain_s:g}", "--server-args", SERVER_ARGS, *job.options,
    ]  # fmt: skip


def _gpus() -> list[str]:
    """Those that are visible, by number.

    Raises:
        ConfigurationError: none is found.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return visible.split(",")
    listed = drive.output("nvidia-smi", "--query-gpu=index", "--format=csv,noheader")
    if not listed:
        raise ConfigurationError(
            "nvidia-smi finds no GPU: run the study where there is one, or name those to use with "
            "--gpus 0,1"
        )
    return listed.split()


def _path(text: str) -> Path:
    """Absolute: the driver runs in the project's root."""
    return Path(text).resolve()


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    known = dict.fromkeys(PARTS)
    add("--parts", type=drive.listed(known), default=list(PARTS), help=", ".join(PARTS))
    add("--gpus", type=lambda text: text.split(","), help="numbers, with commas (default: all)")
    add("--retention", type=existing_file, help=".npz of shares of real heads")
    add("--out", type=output_file, default="serving.jsonl", help="JSON lines are appended there")
    add("--logs", type=_path, default=Path(tempfile.gettempdir()) / "bench-serving")
    add("--start-s", type=float, default=150, help="time that a server's start is expected to take")
    add("--time-limit-s", type=float, help="begin nothing that could end later")
    add("--commit", help="where the tree is no git checkout")
    add("--list", action="store_true", help="tell what is done and what is left")
    return made


if __name__ == "__main__":
    sys.exit(main())
