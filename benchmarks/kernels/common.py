"""What kernel benchmarks share: timing by replays of a graph, the machine, JSON lines."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Timing(NamedTuple):
    """Milliseconds of one replay."""

    median_ms: float
    min_ms: float
    max_ms: float


def time_graph(work: Callable[[], None], *, replays: int = 9, warmup: int = 2) -> Timing:
    """Capture `work` in a graph and time its replays one by one; `work` rotates its own data."""
    work()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for _ in range(warmup):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]
    return Timing(statistics.median(times), min(times), max(times))


@triton.jit
def _read(data_ptr, out_ptr, count, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    total = tl.full([BLOCK], 0, tl.int32)
    for i in tl.range(0, count, num_stages=4):
        total += tl.load(data_ptr + (program * count + i) * BLOCK + tl.arange(0, BLOCK))
    tl.store(out_ptr + program, tl.sum(total))


def read_bytes_per_s(buffer: Tensor) -> float:
    """What a kernel reaches that reads `buffer` once and does nothing else."""
    words = buffer.view(-1).view(torch.int32)
    block, count = 4096, 32
    programs = words.numel() // (block * count)
    out = torch.empty(programs, dtype=torch.int32, device=buffer.device)

    def work() -> None:
        _read[(programs,)](words, out, count, BLOCK=block, num_warps=8)

    return programs * block * count * 4 / time_graph(work).median_ms * 1e3


def warm_up(seconds: float = 0.5) -> None:
    """Bring the clocks up: the first figures of a run are else taken at low ones."""
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(10):
            a @ a
        torch.cuda.synchronize()


def provenance(seed: int) -> dict[str, Any]:
    """Machine, versions, commit and command of a run."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True
    )
    return {
        "machine": torch.cuda.get_device_name(),
        "driver_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": done.stdout.strip() or None,
        "command": " ".join(["python", *sys.argv]),
        "seed": seed,
    }


def write_line(path: Path | None, line: dict[str, Any]) -> None:
    """Append one JSON line."""
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
