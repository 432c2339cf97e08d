"""Measures again what the docs claim, and is red where a figure fell by more than its spread.

    python -m benchmarks.bars --retention FILE --out FOLDER
    python -m benchmarks.bars --judge FOLDER

The commands are those of the docs, kernels first, then the engine, then servers; `table.py` has
them, and every bar. Lines go to files in --out that are called as those in
`benchmarks/results/h200`, against which they are judged. A command whose figures are there is not
run again, so that the same command goes on where it was stopped: take a new folder for other code.

Exit code: 0 if every bar holds, 1 if one fell or a command failed, 3 if something is left to
measure.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.bars.judge import Verdict, judge, table
from benchmarks.bars.suite import Suite, done
from benchmarks.bars.table import BARS, RUNS
from benchmarks.serving import drive
from benchmarks.serving.mistakes import existing_file, tells_mistakes
from benchmarks.serving.sides import ROOT
from tangram.arguments import positive
from tangram.errors import ConfigurationError

RED, LEFT = 1, drive.NOT_DONE
COMMITTED = ROOT / "benchmarks" / "results" / "h200"


@tells_mistakes
def main(argv: Sequence[str] | None = None) -> int:
    """Run, then judge."""
    args = _parser().parse_args(argv)
    runs = [run for name, run in RUNS.items() if name in args.only]
    if args.list:
        for run in runs:
            state = "done" if done(run, args.out) else "left"
            print(f"{run.name:10} {run.minutes:4.0f} min  {state}  {shlex.join(run.command)}")
        print(f"{'':10} {sum(run.minutes for run in runs):4.0f} min on one GPU, estimated")
        return 0
    sound = True
    if args.judge is None:
        _make(args.out)
        sound = Suite(args.out, args.retention, args.time_limit_s).run(runs)
    bars = [bar for bar in BARS if bar.run in args.only]
    found = judge(bars, args.committed, args.judge or args.out)
    print(table(found))
    if not sound or any(each.verdict.is_red for each in found):
        return RED
    return LEFT if any(each.verdict is Verdict.LEFT for each in found) else 0


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"--out {folder} cannot be made ({error.strerror}): name a folder for the lines"
        ) from error


def _folder(text: str) -> Path:
    """The type of an argument that names a folder to be read; absolute."""
    path = Path(text).resolve()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no such folder")
    return path


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.bars",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--only", type=drive.listed(RUNS), default=list(RUNS), help=", ".join(RUNS))
    add("--retention", type=existing_file, help=".npz of shares of real heads, as in the docs")
    add(
        "--out",
        type=lambda text: Path(text).resolve(),
        default=Path(tempfile.gettempdir()) / "bench-bars",
        help="folder for lines and logs (default: %(default)s)",
    )
    add("--time-limit-s", type=positive, help="begin nothing that could end later")
    add("--list", action="store_true", help="print what would be run, and minutes on one GPU")
    add("--judge", type=_folder, help="run nothing: judge the lines in this folder")
    add("--committed", type=_folder, default=COMMITTED, help="folder of what they are judged by")
    return made


if __name__ == "__main__":
    sys.exit(main())
