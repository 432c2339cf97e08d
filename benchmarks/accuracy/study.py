"""Accuracy on the recall model: profiles with measured budgets, then every scorer, rule and ratio.

    python -m benchmarks.accuracy.study profiles --folder FOLDER
    python -m benchmarks.accuracy.study merge --folder FOLDER
    python -m benchmarks.accuracy.study cells --folder FOLDER

Runs `models/recall/make_profile.py` and `tangram evaluate`, one process a scorer and chunk size,
all of them at once on one GPU. Profiles and cells (JSON lines) go to the folder;
what a process printed is in its log there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from tangram.budgets import measured_entries, with_entry
from tangram.profile import Profile
from tangram.scorers import get_scorer, scorer_names

ROOT = Path(__file__).resolve().parents[2]
RATIOS = {256: (0.5, 0.25, 0.1), 512: (0.25, 0.1, 0.05)}
"""By chunk size: at 256 tokens no ratio is below 1/16."""
LEVELS = "uniform,crosslayer,perlayer,mass,error,measured"
CONTEXTS = (4096, 16384)
CONVERSATIONS, QUESTIONS = 20, 50
PROCESS_SHARE = 0.07
"""Of the GPU's memory, for one of a dozen processes."""


def profiles(args: argparse.Namespace) -> dict[str, list[str]]:
    """Commands that calibrate and measure, by name."""
    made = {}
    for scorer in args.scorers:
        for chunk, ratios in RATIOS.items():
            name = f"{scorer}-{chunk}"
            made[name] = [
                "models/recall/make_profile.py", "--scorer", scorer, "--chunk-size", str(chunk),
                "--samples", str(args.samples), "--context-tokens", "4096",
                "--measure", *map(str, ratios), "--time-limit-s", str(args.time_limit_s),
                "--page-group-size", "1", "--measure-context-tokens", "4096",
                "--measure-samples", str(args.measure_samples), "--measure-facts", "51",
                "--measure-turns", "40",
                "--dtype", args.dtype, "--kv-cache-gib", str(args.cache_gib),
                "--gpu-memory-utilization", str(PROCESS_SHARE),
                "--out", str(args.folder / f"{name}.profile"),
            ]  # fmt: skip
    return made


def cells(args: argparse.Namespace) -> dict[str, list[str]]:
    """Commands that evaluate every rule with the profiles, by name."""
    made = {}
    for scorer in args.scorers:
        for chunk, ratios in RATIOS.items():
            name = f"{scorer}-{chunk}"
            made[name] = [
                "-m", "tangram", "evaluate", "recall", "--tasks", "recall", "--dtype", args.dtype,
                "--context-tokens", ",".join(map(str, args.contexts)),
                "--conversations", str(args.conversations), "--questions", str(QUESTIONS),
                "--scorers", scorer, "--levels", LEVELS, "--ratios", ",".join(map(str, ratios)),
                "--profile", str(args.folder / f"{name}.profile"),
                "--chunk-sizes", str(chunk), "--page-group-sizes", "1",
                "--engine", f"kv_cache_memory_bytes={int(args.cache_gib * (1 << 30))}",
                "--engine", f"gpu_memory_utilization={PROCESS_SHARE}",
                "--out", str(args.folder / f"cells-{name}.jsonl"),
            ]  # fmt: skip
    return made


def merge(folder: Path, scorer: str) -> None:
    """Write `<scorer>.profile`: the statistics at the smallest chunk, measured budgets of all."""
    first, *others = (Profile.load(folder / f"{scorer}-{chunk}.profile") for chunk in RATIOS)
    for entry in (entry for other in others for entry in measured_entries(other)):
        first = with_entry(first, entry)
    first.save(folder / f"{scorer}.profile")


def run_together(commands: dict[str, list[str]], folder: Path, what: str) -> int:
    """Run all at once; tells how each ended, gives the number of those that failed."""
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "160",
    }
    begun = time.monotonic()
    running = {}
    for name, command in commands.items():
        log = (folder / f"{what}-{name}.log").open("w")
        running[name] = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
    failed = 0
    for name, process in running.items():
        code = process.wait()
        failed += code != 0
        print(f"{name}: exit {code}, {time.monotonic() - begun:.0f} s", flush=True)
    return failed


def main() -> int:
    """Run a part of the study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {"profiles": profiles, "cells": cells}
    parser.add_argument("part", choices=[*parts, "merge"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument(
        "--scorers",
        type=lambda text: text.split(","),
        default=[n for n in scorer_names(third_party=False) if not get_scorer(n).stores_scores],
    )
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--measure-samples", type=int, default=18)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cache-gib", type=float, default=5, help="KV cache of a process")
    parser.add_argument("--time-limit-s", type=float, default=150, help="of the search, a process")
    parser.add_argument("--conversations", type=int, default=CONVERSATIONS)
    parser.add_argument(
        "--contexts",
        type=lambda text: tuple(int(part) for part in text.split(",")),
        default=CONTEXTS,
    )
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.part == "merge":
        for scorer in args.scorers:
            merge(args.folder, scorer)
        return 0
    return run_together(parts[args.part](args), args.folder, args.part)


if __name__ == "__main__":
    sys.exit(main())
