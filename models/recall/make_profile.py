"""Makes the recall model's own profile: 50 conversations, read by stock vLLM with full KV.

    python models/recall/make_profile.py

writes `expected_attention.profile` into this folder. Conversations are drawn from
seeds that neither training nor any evaluation uses.
"""

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from tangram.cli.record import record_profile
from tangram.evaluate.recall import make_conversation

HERE = Path(__file__).parent
FIRST_SEED = 2_000_000


def main() -> None:
    """Write the profile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--context-tokens", type=int, default=3000)
    parser.add_argument("--scorer", default="expected_attention")
    parser.add_argument("--out", type=Path, default=None, help="file to write")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(HERE)
    samples = []
    for seed in range(FIRST_SEED, FIRST_SEED + args.samples):
        talk = make_conversation(seed, context_tokens=args.context_tokens, facts=40, turns=10)
        messages = talk.messages(len(talk.turns) - 1)
        samples.append(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        )
    profile = record_profile(
        str(HERE),
        samples,
        scorer_name=args.scorer,
        description=f"recall conversations, seeds {FIRST_SEED} to {FIRST_SEED + args.samples - 1}, "
        f"{args.context_tokens} tokens, 40 facts, 10 turns",
        progress=lambda done: print(f"\r{done} of {len(samples)}", end="", flush=True),
        dtype="float32",
        kv_cache_memory_bytes=256 << 20,
    )
    # Not .safetensors: an engine that loads this folder would take it for weights.
    out = args.out or HERE / f"{args.scorer}.profile"
    profile.save(out)
    print(f"\nwrote {out}, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
