"""Makes the recall model's own profile: 50 conversations, read by stock vLLM with full KV.

    python models/recall/make_profile.py

writes `expected_attention.profile` into this folder. Conversations are drawn from
seeds that neither training nor any evaluation uses.

    python models/recall/make_profile.py --scorer key_diff --measure 0.25 0.1 --time-limit-s 600

also measures budgets, on conversations of their own, and prints what was tried; with `--profile
FILE` it goes on from the statistics and the measured budgets of that file. On a GPU add
`--dtype bfloat16 --kv-cache-gib 20`.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from tangram.budgets import measured_entries
from tangram.calibrate.budget_search.measure import measure_budgets
from tangram.calibrate.recording.record import record_profile
from tangram.conversations import CODE_DIGITS, Conversation, make_conversation
from tangram.profile import Profile

HERE = Path(__file__).parent
FIRST_SEED = 2_000_000
ANSWER_TOKENS = CODE_DIGITS // 2 + 1
"""Two digits are a token; the end of the answer is one too."""


FIRST_MEASURED_SEED = 3_000_000
TURNS = 10


def main() -> None:
    """Write the profile."""
    args = _parser().parse_args()
    tokenizer = AutoTokenizer.from_pretrained(HERE)
    engine = dict(dtype=args.dtype, kv_cache_memory_bytes=int(args.kv_cache_gib * (1 << 30)))
    if args.gpu_memory_utilization is not None:
        engine["gpu_memory_utilization"] = args.gpu_memory_utilization
    profile = Profile.load(args.profile) if args.profile else _recorded(tokenizer, args, engine)
    # Not .safetensors: an engine that loads this folder would take it for weights.
    out = args.out or HERE / f"{profile.scorer_name}.profile"
    profile.save(out)
    print(f"\nwrote {out}, {out.stat().st_size} bytes")
    if args.measure:
        _measured(profile, tokenizer, args, engine).save(out)
        print(f"wrote {out}, {out.stat().st_size} bytes")


def _recorded(tokenizer: Any, args: argparse.Namespace, engine: Any) -> Profile:
    """Statistics of the conversations that calibration reads."""
    samples = []
    for seed in range(FIRST_SEED, FIRST_SEED + args.samples):
        talk = make_conversation(seed, context_tokens=args.context_tokens, facts=40, turns=TURNS)
        samples.append(_tokens(tokenizer, talk.messages(TURNS - 1)))
    return record_profile(
        str(HERE),
        samples,
        scorer_name=args.scorer,
        description=f"recall conversations, seeds {FIRST_SEED} to {FIRST_SEED + args.samples - 1}, "
        f"{args.context_tokens} tokens, 40 facts, {TURNS} turns",
        progress=lambda done: print(f"\r{done} of {len(samples)}", end="", flush=True),
        chunk_size_tokens=args.chunk_size,
        **engine,
    )


def _measured(profile: Profile, tokenizer: Any, args: argparse.Namespace, engine: Any) -> Profile:
    """The profile with budgets measured on held-back conversations of all the lengths, in turn."""
    samples, later = [], []
    for number in range(args.measure_samples):
        context = args.measure_context_tokens[number % len(args.measure_context_tokens)]
        talk = make_conversation(
            FIRST_MEASURED_SEED + number,
            context_tokens=context,
            facts=args.measure_facts,
            turns=args.measure_turns,
        )
        tokens, positions = conversation_positions(tokenizer, talk)
        samples.append(tokens)
        later.append(positions)
    begun = time.monotonic()
    for size in args.page_group_size:
        profile = measure_budgets(
            profile,
            str(HERE),
            samples,
            later=later,
            ratios=args.measure,
            page_group_size=size,
            chunk_size_tokens=args.chunk_size,
            time_limit_s=args.time_limit_s / len(args.page_group_size),
            seed=args.seed,
            progress=lambda line: print(f"{time.monotonic() - begun:7.1f} s  {line}", flush=True),
            **engine,
        )
    for entry in measured_entries(profile):
        print(f"ratio {entry.ratio:g}, {entry.page_group_size} heads a page:")
        print(f"  { ({k: v for k, v in entry.log.items() if k != 'candidates'}) }")
        for trial in entry.log["candidates"]:
            print(f"  {trial['name']:<40} {trial['divergence']} {trial['checked']}")
        for layer, pages in enumerate(entry.head_groups.pages):
            print(f"  layer {layer}: {entry.head_groups.heads[layer]} {pages}")
    return profile


def conversation_positions(tokenizer: Any, talk: Conversation) -> tuple[list[int], list[int]]:
    """A conversation's tokens, all answers included, and where its later turns' answers are told.

    An answer counts from the end of its question to its own end: the positions whose next tokens
    are the answer's and the mark that ends it.
    """
    last = len(talk.turns) - 1
    history = [*talk.messages(last), {"role": "assistant", "content": talk.turns[last].answer}]
    tokens = _tokens(tokenizer, history, add_generation_prompt=False)
    positions: list[int] = []
    for turn in range(1, last + 1):
        begin = len(_tokens(tokenizer, talk.messages(turn))) - 1
        positions.extend(range(begin, begin + ANSWER_TOKENS))
    return tokens, positions


def _tokens(tokenizer: Any, messages: Any, add_generation_prompt: bool = True) -> list[int]:
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, return_dict=False
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--context-tokens", type=int, default=3000)
    parser.add_argument("--scorer", default="expected_attention")
    parser.add_argument("--chunk-size", type=int, default=256)
    parser.add_argument("--out", type=Path, default=None, help="file to write")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kv-cache-gib", type=float, default=0.5)
    parser.add_argument("--gpu-memory-utilization", type=float, default=None)
    measuring = parser.add_argument_group("measuring budgets")
    measuring.add_argument("--measure", type=float, nargs="+", metavar="RATIO", default=[])
    measuring.add_argument("--profile", type=Path, help="go on from this one")
    measuring.add_argument("--time-limit-s", type=float, default=600, help="for all of it")
    measuring.add_argument("--seed", type=int, default=0, help="of the search")
    measuring.add_argument("--page-group-size", type=int, nargs="+", default=[4])
    measuring.add_argument("--measure-samples", type=int, default=24)
    measuring.add_argument("--measure-context-tokens", type=int, nargs="+", default=[3000])
    measuring.add_argument("--measure-facts", type=int, default=40)
    measuring.add_argument("--measure-turns", type=int, default=25)
    return parser


if __name__ == "__main__":
    main()
