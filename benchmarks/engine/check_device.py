"""Does the GPU engine answer as it should? Run before any timing; prints one line a check.

    python benchmarks/engine/check_device.py --out check.jsonl

The bundled recall model in bfloat16: stock vLLM against ratio 1 (log-probabilities), CUDA graphs
against eager steps, one request at a time against all at once, cached history against none, and the
answers of conversations at a lower ratio. Exits 1 if a check fails.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from vllm import LLM, SamplingParams  # noqa: E402

import tangram  # noqa: E402
from benchmarks.kernels.common import provenance, write_line  # noqa: E402
from tangram.bundled import recall_model_path  # noqa: E402
from tangram.conversations import is_right, make_conversation  # noqa: E402

CONTEXT_TOKENS = 3000
SEED = 7_000_000
GRAPHS_ONLY = {
    "mode": 0,
    "cudagraph_mode": "FULL_DECODE_ONLY",
    "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 32],
}
TURNS = 5


def engine(compressed: bool, **options: Any) -> Any:
    """An engine of the recall model, small enough to stand beside others."""
    cls = tangram.LLM if compressed else LLM
    settings = {"dtype": "bfloat16", "max_model_len": 8192, "gpu_memory_utilization": 0.2}
    return cls(str(recall_model_path()), **settings, **options)


def ask(llm: Any, prompts: list[list[int]], max_tokens: int) -> list[Any]:
    """Greedy answers with the best log-probabilities."""
    parameters = SamplingParams(max_tokens=max_tokens, temperature=0, logprobs=1, ignore_eos=True)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [output.outputs[0] for output in llm.generate(inputs, parameters, use_tqdm=False)]


def close(mine: list[Any], theirs: list[Any]) -> tuple[float, float]:
    """(share of answers whose tokens are all equal, largest difference of a shared first token)."""
    equal = sum(list(a.token_ids) == list(b.token_ids) for a, b in zip(mine, theirs, strict=True))
    worst = 0.0
    for a, b in zip(mine, theirs, strict=True):
        first = a.token_ids[0]
        if first in b.logprobs[0]:
            worst = max(worst, abs(a.logprobs[0][first].logprob - b.logprobs[0][first].logprob))
    return equal / len(mine), worst


def accuracy(llm: Any, conversations: list[Any]) -> float:
    """Share of right answers, every turn with the whole history."""
    tokenizer, right = llm.get_tokenizer(), 0
    for turn in range(TURNS):
        prompts = [
            tokenizer.apply_chat_template(
                c.messages(turn), add_generation_prompt=True, return_dict=False
            )
            for c in conversations
        ]
        answers = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(max_tokens=8, temperature=0),
            use_tqdm=False,
        )
        right += sum(
            is_right(answer.outputs[0].text, c.turns[turn].answer)
            for answer, c in zip(answers, conversations, strict=True)
        )
    return right / (TURNS * len(conversations))


def brief(conversations: list[Any]) -> int:
    """Whether conversations are answered as they should be with half of the rows.

    Without a kernel being compiled once the engine serves: that ends it.
    """
    llm = engine(compressed=True, compilation_config=GRAPHS_ONLY, compression_ratio=0.5,
                 compression_profile="none", page_group_size=1,
                 jit_monitor_mode="error")  # fmt: skip
    right = accuracy(llm, conversations)
    print(f"{'ok  ' if right > 0.93 else 'FAIL'} answers at ratio 0.5: {right:.3f} right")
    return int(right <= 0.93)


def main() -> int:
    """Run the checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scorers", default="key_diff,snap_kv")
    parser.add_argument("--conversations", type=int, default=24)
    parser.add_argument(
        "--compiled", default="", help="scorer whose engine is compiled too, as servers are"
    )
    parser.add_argument(
        "--brief", action="store_true", help="only answers at ratio 0.5, with graphs"
    )
    parser.add_argument("--out", type=Path, help="JSON lines are appended there, one a check")
    args = parser.parse_args()
    conversations = [
        make_conversation(SEED + i, CONTEXT_TOKENS, facts=40, turns=TURNS)
        for i in range(args.conversations)
    ]
    if args.brief:
        return brief(conversations)
    failures = 0

    def report(name: str, ok: bool, text: str, **figures: float) -> None:
        nonlocal failures
        failures += not ok
        print(f"{'ok  ' if ok else 'FAIL'} {name}: {text}", flush=True)
        if args.out:
            line = {"benchmark": "check_device", "check": name, "ok": ok, **figures}
            write_line(args.out, provenance(SEED) | line)

    stock = engine(compressed=False, enforce_eager=True)
    tokenizer = stock.get_tokenizer()
    prompts = [
        tokenizer.apply_chat_template(c.messages(0), add_generation_prompt=True, return_dict=False)
        for c in conversations
    ]
    lengths = (1, 63, 64, 65, 255, 256, 257, 511, 700, 1100, 1500, 2047)
    prompts = [p[:n] for p, n in zip(prompts, lengths, strict=False)] + prompts[len(lengths) :]
    expected = ask(stock, prompts, 24)
    full = accuracy(stock, conversations)
    report("stock answers", full > 0.97, f"{full:.3f} right", right=full)
    del stock

    for scorer in args.scorers.split(","):
        started = time.monotonic()
        whole = engine(
            compressed=True, compression_ratio=1.0, compression_scorer=scorer, enforce_eager=True
        )
        equal, worst = close(ask(whole, prompts, 24), expected)
        right = accuracy(whole, conversations)
        report(f"{scorer} ratio 1 as stock", right > full - 0.01 and worst < 0.5,
               f"{equal:.2f} of the answers equal, first log-probability within {worst:.3f}, "
               f"{right:.3f} right", right=right, equal=equal)  # fmt: skip
        del whole
        options = {"compression_ratio": 0.5, "compression_scorer": scorer, "page_group_size": 1,
                   "compression_profile": "none"}  # fmt: skip
        how = {} if scorer == args.compiled else {"compilation_config": GRAPHS_ONLY}
        graphs = engine(compressed=True, **how, **options)
        together = ask(graphs, prompts, 300)
        again = ask(graphs, prompts, 300)
        alone = [ask(graphs, [prompt], 300)[0] for prompt in prompts[:4]]
        right = accuracy(graphs, conversations)
        del graphs
        eager = engine(compressed=True, enforce_eager=True, **options)
        one_by_one = ask(eager, prompts, 300)
        eager_right = accuracy(eager, conversations)
        del eager
        for name, answers, reference in (
            ("graphs as eager", together, one_by_one),
            ("cached as computed", again, together),
            ("alone as together", alone, together[:4]),
        ):
            equal, worst = close(answers, reference)
            report(f"{scorer} {name}", worst < 0.5,
                   f"{equal:.2f} of 300-token answers equal, first log-probability within "
                   f"{worst:.3f}", equal=equal)  # fmt: skip
        report(f"{scorer} ratio 0.5", abs(right - eager_right) < 0.03,
               f"{right:.3f} right with graphs, {eager_right:.3f} eager; "
               f"{time.monotonic() - started:.0f} s",
               right=right, right_eager=eager_right)  # fmt: skip
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
