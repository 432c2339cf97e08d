"""The engine against stock vLLM: decode step, first token, capacity, throughput.

    python -m benchmarks.engine.bench_engine --retention FILE --out engine.jsonl

A model's shape with random weights; budgets of real heads from FILE, or of heads of the same
spread. Answers of the recall model are checked first (not with `--no-gate`, for a run right after
`check_device.py`). Every engine runs in a process of its own, one after the other: `stock` is vLLM
with the plugin installed and none of its flags, `stock-full` the same with full CUDA graphs
for every step that a graph serves, `absent` is vLLM that does not load the plugin.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.engine.shapes import CONFIGS, compression_options, write_model
from benchmarks.engine.side import MARK
from benchmarks.kernels.budgets import BUDGETS
from benchmarks.kernels.common import provenance, write_line
from benchmarks.loads import draw

UNEVEN = "1x128K-31x2K"
CACHED, DECODES = (8192, 47104), (0, 16, 48)
DECODE_POINTS = ((4, 32768), (16, 32768), (64, 8192))
CONTEXT = 32768


def main() -> int:
    """Run what is asked for; print and write it."""
    args = parser().parse_args()
    if not args.no_gate:
        check = [sys.executable, str(Path(__file__).with_name("check_device.py")), "--brief"]
        if subprocess.run(check).returncode:
            print("answers are wrong: nothing is timed")
            return 1
    told = provenance(args.seed) | {
        "model": args.model,
        "budgets": args.budgets,
        "ratio": args.ratio,
    }
    jobs = make_jobs(args)
    sides = {}
    for name in args.sides.split(","):
        sides[name] = run_side(name, jobs[name], args.timeout_s)
        for line in sides[name]:
            write_line(args.out, {"side": name, **line, **told})
    for line in compare(sides):
        print(line, flush=True)
        write_line(args.out, {**line, **told})
    return 0


def make_jobs(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What each engine has to do, by its name."""
    model = write_model(args.model)
    compression = compression_options(
        args.model,
        retention=args.retention,
        budgets=args.budgets,
        scorer_name=args.scorer,
        ratio=args.ratio,
        seed=args.seed,
    )
    common = {
        "model": str(model),
        "seed": args.seed,
        "max_model_len": args.max_model_len,
        "gpu_memory_utilization": args.gpu_memory_utilization,
    }
    wanted = args.what.split(",")
    stock = {**common, "tasks": tasks(wanted, args, share=args.ratio)}
    return {
        "stock": stock,
        "absent": stock,
        "stock-full": {**stock, "engine": {"compilation_config": {"cudagraph_mode": "FULL"}}},
        "tangram": {**common, "tasks": tasks(wanted, args, share=1), "compression": compression},
    }


def tasks(wanted: list[str], args: argparse.Namespace, share: float) -> list[dict[str, Any]]:
    """Measurements; decode runs at `share` of each context, for the same KV bytes on both sides."""
    made: list[dict[str, Any]] = []

    def add(what: str, key: str, **arguments: Any) -> None:
        made.append({"what": what, "key": key, "arguments": arguments})

    if "capacity" in wanted:
        add("capacity", "capacity", context=CONTEXT)
    if "first_token" in wanted:
        add("first_token", "first_token", tokens=CONTEXT, repeats=5)
    if "decode_step" in wanted:
        for requests, context in DECODE_POINTS:
            key = f"decode {requests} x {context}"
            add("decode_step", key, requests=requests, context=int(context * share), repeats=3)
    if "uneven" in wanted:
        lengths = draw(UNEVEN, args.seed)
        if share < 1:
            lengths = tuple(mean_rows(length, share) for length in lengths)
        add("uneven_decode_step", f"decode {UNEVEN}", lengths=lengths, repeats=3)
    if "follow_up" in wanted:
        for cached, decodes in itertools.product(args.cached, DECODES):
            key = f"follow-up {cached} beside {decodes}"
            add("follow_up", key, cached=cached, new=214, decodes=decodes, repeats=9)
    if "throughput" in wanted:
        add("throughput", "throughput", requests=args.requests, tokens=CONTEXT, answer=512,
            turns=args.turns)  # fmt: skip
    return made


def mean_rows(tokens: int, ratio: float, chunk_tokens: int = 256, window_tokens: int = 32) -> int:
    """Rows that a query sees of a head on average, raw ones included, with that many tokens."""
    chunks = (tokens - 1) // chunk_tokens
    return (
        round(chunks * chunk_tokens * ratio)
        + tokens
        - max(0, chunks * chunk_tokens - window_tokens)
    )


def run_side(name: str, job: dict[str, Any], timeout_s: float) -> list[dict[str, Any]]:
    """Lines that the engine's process tells."""
    environment = dict(os.environ)
    if name == "absent":
        environment["VLLM_PLUGINS"] = "none"
    log = Path(tempfile.gettempdir()) / f"bench-{name}.log"
    with log.open("w") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.engine.side", json.dumps(job)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        lines = []
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith(MARK):
                print(name, line.removeprefix(MARK).rstrip(), flush=True)
                lines.append(json.loads(line.removeprefix(MARK)))
        if child.wait(timeout_s):
            raise SystemExit(f"{name} failed:\n{log.read_text()[-3000:]}")
    return lines


def compare(sides: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Ratios of the same measurement, against stock vLLM."""
    found = {
        name: {line["key"]: line for line in lines if "key" in line}
        for name, lines in sides.items()
    }
    result = []
    for name in sides:
        for key, ours in found[name].items():
            stock = found.get("stock", {}).get(key)
            if name == "stock" or stock is None:
                continue
            line: dict[str, Any] = {"side": name, "compare": key}
            for field in ("tokens", "median_s", "median_ms", "step_ms"):
                if field in ours and (field != "tokens" or key == "capacity"):
                    line[f"{field}_over_stock"] = round(ours[field] / stock[field], 4)
            if key == "throughput":
                for turn, (a, b) in enumerate(zip(ours["turns"], stock["turns"], strict=True)):
                    gain = a["output_tokens_per_s"] / b["output_tokens_per_s"]
                    line[f"output_over_stock_turn_{turn}"] = round(gain, 4)
            result.append(line)
    return result


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("--model", choices=list(CONFIGS), default="qwen3-4b")
    made.add_argument("--retention", type=Path, help=".npz of shares of real heads")
    made.add_argument("--budgets", choices=BUDGETS, default=BUDGETS[0])
    made.add_argument("--scorer", default="key_diff")
    made.add_argument("--ratio", type=float, default=0.25)
    made.add_argument("--what", default="capacity,first_token,decode_step")
    made.add_argument(
        "--sides", default="stock,tangram", help="of stock, stock-full, tangram, absent"
    )
    made.add_argument("--cached", type=int, nargs="+", default=CACHED, help="of follow-ups")
    made.add_argument("--requests", type=int, default=128, help="of the throughput run")
    made.add_argument("--turns", type=int, default=1, help="of the throughput run")
    made.add_argument("--max-model-len", type=int, default=36864)
    made.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--timeout-s", type=float, default=1200)
    made.add_argument("--no-gate", action="store_true")
    made.add_argument("--out", type=Path, help="JSON lines are appended there")
    return made


if __name__ == "__main__":
    sys.exit(main())
