"""vLLM's own client, `vllm bench serve`, against the sides that `drive.py` starts.

    python -m benchmarks.serving.vllm_bench --model qwen3-4b --retention FILE \
        --out bench.jsonl -- --dataset-name prefix_repetition --num-prompts 400 --request-rate 4 \
        --prefix-repetition-prefix-len 8000 --prefix-repetition-num-prefixes 40

What follows `--` is handed on. Its multi-turn client is no part of the installed package in 0.32;
of the installed data sets `prefix_repetition` comes closest: histories that are asked again. It
draws text, so a shape is served with a tokenizer of a word for each id. One line a side, with what
the command reports; it is a check of our client by one that is not ours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.serving.drive import add_server_options, listed, provenance, served
from benchmarks.serving.load import COUNTERS
from benchmarks.serving.mistakes import output_file, tells_mistakes
from benchmarks.serving.sides import COMPRESSED, SERVED_NAME, SIDES, Model, find_model, make_side
from benchmarks.serving.words import write_tokenizer
from tangram.evaluate.results import append_line
from tangram.installed import vllm_command
from tangram.serving.scrape import totals
from tangram.serving.server import Server, ServerError

TIMEOUT_S = 540.0


def with_tokenizer(model: Model) -> Model:
    """The model served so that it takes text."""
    if model.has_tokenizer:
        return model
    arguments = [name for name in model.arguments if name != "--skip-tokenizer-init"]
    tokenizer = ("--tokenizer", str(write_tokenizer(model.vocab_size)))
    return replace(model, has_tokenizer=True, arguments=(*arguments, *tokenizer))


def bench(server: Server, tokenizer: str, further: list[str], folder: Path) -> dict[str, Any]:
    """Run `vllm bench serve`; its result file.

    Raises:
        ServerError: it failed; the message holds the end of what it printed.
    """
    command = vllm_command(
        "bench", "serve", "--backend", "openai", "--base-url", server.url,
        "--endpoint", "/v1/completions", "--model", SERVED_NAME, "--tokenizer", tokenizer,
        "--ignore-eos", "--temperature", "0", "--percentile-metrics", "ttft,tpot,itl,e2el",
        "--metric-percentiles", "50,95,99", "--disable-tqdm", "--save-result",
        "--result-dir", str(folder), "--result-filename", "result.json", *further,
    )  # fmt: skip
    environment = {**os.environ, "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment
    )
    result = folder / "result.json"
    if done.returncode or not result.exists():
        raise ServerError(f"vllm bench serve failed:\n{(done.stdout + done.stderr)[-3000:]}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


@tells_mistakes
def main(argv: list[str] | None = None) -> int:
    """Run it against every side."""
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    args, further = parser().parse_args(argv[:split]), argv[split + 1 :]
    told = provenance(args, argv, "vllm_bench")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = with_tokenizer(find_model(args.model))
        tokenizer = model.arguments[-1] if "--tokenizer" in model.arguments else model.served
        for side in [make_side(side, model, args) for side in args.sides]:
            try:
                with served(side, args) as (server, about):
                    before = totals(server.get("/metrics"))
                    found = bench(server, tokenizer, further, folder)
                    after = totals(server.get("/metrics"))
            except ServerError as error:
                print(error, file=sys.stderr)
                return 1
            counted = {
                key: after[metric] - before.get(metric, 0.0)
                for key, metric in COUNTERS.items()
                if metric in after
            }
            line = {"what": "vllm bench", "model": args.model, "side": side.name}
            line |= {"ratio": args.ratio if side.name in COMPRESSED else None}
            line |= {"counters": counted, "result": found}
            print(side.name, json.dumps({k: found.get(k) for k in BRIEF}), flush=True)
            append_line(args.out, json.dumps(told | about | line))
    return 0


BRIEF = (
    "completed", "request_throughput", "output_throughput", "p50_ttft_ms", "p95_ttft_ms",
    "p50_tpot_ms",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command's own options, without those that are handed on."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_server_options(made)
    add = made.add_argument
    add("--sides", type=listed(SIDES), default=["stock", "tangram"], help=", ".join(SIDES))
    add("--logs", type=Path, default=Path(tempfile.gettempdir()) / "bench-serving")
    add("--commit", help="where the tree is no git checkout")
    add("--out", type=output_file, required=True, help="JSON lines are appended there")
    return made


if __name__ == "__main__":
    sys.exit(main())
