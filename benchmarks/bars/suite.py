"""Runs the commands that measure bars, one after the other, as far as the time goes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bars.figures import read_figures
from benchmarks.bars.table import BARS, Run
from benchmarks.serving import drive
from benchmarks.serving.report import read_lines
from benchmarks.serving.sides import ROOT


def done(run: Run, folder: Path) -> bool:
    """Whether the folder has every figure that bars of the run need."""
    found = read_figures(folder, run.file)
    return all(bar.name in found for bar in BARS if bar.run == run.name)


@dataclass
class Suite:
    """The commands that are asked for.

    A command's lines join those in the folder only when it has ended well: one that was stopped
    leaves nothing that could be taken for done. One that resumes writes there itself.

    Attributes:
        folder: for lines, and logs below it.
        retention: shares of real heads.
        time_limit_s: begin nothing that could end later; None for no limit.
        clock: seconds.
    """

    folder: Path
    retention: Path | None = None
    time_limit_s: float | None = None
    clock: Callable[[], float] = time.monotonic

    def run(self, runs: Sequence[Run]) -> bool:
        """Do what is not done; gives whether no command failed."""
        begun, sound = self.clock(), True
        self._logs.mkdir(parents=True, exist_ok=True)
        for run in runs:
            if done(run, self.folder):
                commit = read_lines(self.folder / run.file)[-1].get("commit")
                print(f"{run.name}: done before, at commit {commit}", flush=True)
                continue
            left_s = self._left_s(begun)
            if left_s is not None and left_s < (0 if run.resumes else run.minutes * 60):
                print(f"{run.name}: no time for its {run.minutes:.0f} min", flush=True)
                continue
            start = self.clock()
            code = self._run(run, left_s)
            told = "" if code in (0, drive.NOT_DONE) else f", see {self._log(run)}"
            print(f"{run.name}: exit {code} after {self.clock() - start:.0f} s{told}", flush=True)
            sound &= not told
        return sound

    def _left_s(self, begun: float) -> float | None:
        limit = self.time_limit_s
        return None if limit is None else limit - (self.clock() - begun)

    @property
    def _logs(self) -> Path:
        return self.folder / "logs"

    def _log(self, run: Run) -> Path:
        return self._logs / f"{run.name}.log"

    def _run(self, run: Run, left_s: float | None) -> int:
        """The exit code of a run's command."""
        out = self.folder / run.file
        part = out if run.resumes else self._logs / f"{run.name}.jsonl"
        command = [sys.executable, *run.command, "--out", str(part)]
        if run.takes_retention and self.retention:
            command += ["--retention", str(self.retention)]
        if run.resumes:
            command += ["--logs", str(self._logs / run.name)]
            command += [] if left_s is None else ["--time-limit-s", f"{left_s:.0f}"]
        else:
            part.unlink(missing_ok=True)
        paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        with self._log(run).open("w") as log:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            ).returncode
        if code == 0 and not run.resumes and part.exists():
            with out.open("a") as file:
                file.write(part.read_text())
        return code
