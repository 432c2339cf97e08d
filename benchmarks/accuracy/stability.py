"""How much budgets depend on the samples that calibration read, on the recall model.

    python models/recall/make_profile.py --scorer key_diff --samples 500 --context-tokens 1500 \
        --out FOLDER/key_diff-500.profile
    python -m benchmarks.accuracy.stability compare --profile FOLDER/key_diff-500.profile --out FILE
    python -m benchmarks.accuracy.stability compare --retention RETENTION --out FILE
    python -m benchmarks.accuracy.stability record --text filler --out FOLDER/filler.profile
    python -m benchmarks.accuracy.stability loss --profiles FOLDER/*.profile --out FILE

`compare` takes a profile's samples apart: budgets from disjoint subsets beside those from all of
them, and the heads' order by single samples beside that by all. For a file of other models' shares
([samples, layers, KV heads] at one ratio) it compares two kinds of text. `record` makes a profile
of text in which nothing is told or asked (`filler`), or of a profile's first samples (`recall`),
and `loss` plays the budgets of such profiles.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.accuracy.plain import (
    PAGE_ROWS,
    Sizes,
    add_texts,
    head_groups,
    load_texts,
    pages_of,
    play,
    static,
)
from benchmarks.kernels.budgets import FILE_RATIO, make_benchmark_profile
from tangram.budgets import allocate
from tangram.bundled import recall_model_path
from tangram.conversations import FILLER, SLOTS
from tangram.evaluate.results import wilson_interval
from tangram.installed import commit, machine, versions
from tangram.profile import ERROR_CURVE, MASS_CURVE, ModelIdentity, Profile, threshold_share
from tangram.scorers import get_scorer

RULES = ("crosslayer", "perlayer", "mass", "error")
RATIOS = (0.5, 0.25, 0.1)
SIZES = (10, 25, 50, 100, 250)
FILE_SAMPLES, KIND_BOUNDARY = 28, 16
"""Of a retention file; the samples before and after are of two kinds of text: within a kind the
heads' shares correlate far more than across."""
SAMPLE_AXES = {
    threshold_share("crosslayer"): 1,
    threshold_share("perlayer"): 1,
    MASS_CURVE: 0,
    ERROR_CURVE: 0,
}
C, P, S = 256, PAGE_ROWS, 4


def of_samples(profile: Profile, samples: slice) -> Profile:
    """The profile that those samples alone would have given."""
    arrays = {
        name: np.moveaxis(np.moveaxis(array, SAMPLE_AXES[name], 0)[samples], 0, SAMPLE_AXES[name])
        if name in SAMPLE_AXES
        else array
        for name, array in profile.arrays.items()
    }
    count = next(arrays[name].shape[axis] for name, axis in SAMPLE_AXES.items() if name in arrays)
    return replace(profile, arrays=arrays, data={**profile.data, "n_samples": count})


def rows_of(profile: Profile, level: str, ratio: float, page_rows: int) -> np.ndarray:
    """[layers * kv_heads], rows that each head keeps of a chunk, none below a page of `P` rows.

    With pages of one row this is the budget before it is rounded to pages.
    """
    model = profile.model
    groups = allocate(
        level, num_layers=model.num_layers, num_kv_heads=model.num_kv_heads, ratio=ratio,
        chunk_size_tokens=C, page_size_rows=page_rows, page_group_size=1,
        n_sink_tokens=S if page_rows == P else P, profile=profile,
    )  # fmt: skip
    return (pages_of(groups) * page_rows).numpy().reshape(-1)


def ranks(values: np.ndarray) -> np.ndarray:
    """Places in ascending order, equal values sharing their mean place."""
    ordered = np.sort(values)
    return (np.searchsorted(ordered, values) + np.searchsorted(ordered, values, "right")) / 2


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Correlation of ranks; 0 where one of them tells no two heads apart."""
    one, other = (ranks(values) - ranks(values).mean() for values in (one, other))
    scale = np.sqrt((one**2).sum() * (other**2).sum())
    return float((one * other).sum() / scale) if scale else 0.0


def differences(profile: Profile, level: str, ratio: float, pairs: Sequence) -> dict:
    """How far budgets lie apart, over the heads of all pairs of sets of samples."""
    off = {
        rows: np.abs(
            [
                np.subtract(*(rows_of(of_samples(profile, s), level, ratio, rows) for s in pair))
                for pair in pairs
            ]
        )
        / P
        for rows in (P, 1)
    }
    pages, exact = off[P], off[1]
    return {
        "rule": level, "ratio": ratio, "pairs": len(pairs), "heads": pages.shape[1],
        "same_pages": float((pages < 1).mean()), "within_a_page": float((pages <= 1).mean()),
        "mean_pages": float(pages.mean()), "worst_pages": float(pages.max()),
        "unrounded_below_a_page": float((exact < 1).mean()),
        "unrounded_mean_pages": float(exact.mean()),
        "unrounded_worst_pages": float(exact.max()),
    }  # fmt: skip


def rank_correlations(profile: Profile, level: str, ratio: float, of: slice, to: slice) -> dict:
    """Spearman of the heads' order by each single sample with that by a set of samples."""
    common = rows_of(of_samples(profile, to), level, ratio, 1)
    single = [
        spearman(rows_of(of_samples(profile, slice(i, i + 1)), level, ratio, 1), common)
        for i in range(of.start, of.stop)
    ]
    return {"spearman_mean": float(np.mean(single)), "spearman_least": float(np.min(single))}


def of_profile(path: Path) -> Iterator[dict]:
    """Disjoint subsets of every size against all samples, a line for every rule and ratio."""
    profile = Profile.load(path)
    count = profile.arrays[MASS_CURVE].shape[0]
    whole = slice(0, count)
    for level in RULES:
        for ratio in RATIOS:
            order = rank_correlations(profile, level, ratio, whole, whole)
            for size in (size for size in SIZES if 2 * size <= count):
                starts = range(0, count - size + 1, size)
                pairs = [(slice(i, i + size), whole) for i in starts]
                yield {
                    **differences(profile, level, ratio, pairs), "samples": size, "of": count,
                    **order, "scorer": profile.scorer_name, "data": profile.data["description"],
                }  # fmt: skip


def of_retention(path: Path) -> Iterator[dict]:
    """Halves of one kind of text, and one kind against the other, for every array of a file."""
    first, second = slice(0, KIND_BOUNDARY), slice(KIND_BOUNDARY, FILE_SAMPLES)
    for name, shares in np.load(path).items():
        model, budgets = name.split("/", 1)
        layers, kv_heads = shares.shape[1:]
        identity = ModelIdentity(
            architecture=model, num_layers=layers, num_kv_heads=kv_heads, num_query_heads=kv_heads,
            head_size=128, hidden_size=1, vocab_size=1,
        )  # fmt: skip
        profile = make_benchmark_profile(
            path, model, budgets, identity=identity, scorer=get_scorer("key_diff"), seed=0
        )
        halves = [
            (slice(kind.start + half, kind.stop, 2), kind)
            for kind in (first, second)
            for half in (0, 1)
        ]
        sets = {
            "halves of a kind against the kind": (halves, first, first),
            "one kind against the other": ([(first, second)], second, first),
        }
        for what, (pairs, of, to) in sets.items():
            asked = profile, budgets.split("/")[1], FILE_RATIO
            yield {
                "what": what, **differences(*asked, pairs), **rank_correlations(*asked, of, to),
                "data": name,
            }  # fmt: skip


def compare(args: argparse.Namespace) -> None:
    """Write and print the figures."""
    about = {"versions": versions(), "machine": machine(), "commit": commit()}
    lines = of_retention(args.retention) if args.retention else of_profile(args.profile)
    with args.out.open("w") as out:
        for line in lines:
            out.write(json.dumps({**line, **about}) + "\n")
            print(", ".join(
                f"{name} {value:.3g}" if isinstance(value, float) else str(value)
                for name, value in line.items()
            ))  # fmt: skip


def filler_text(rng: random.Random, words: int) -> str:
    """Sentences of about so many words that tell no code."""
    sentences: list[str] = []
    while sum(map(len, sentences)) < words * 5:
        pattern = rng.choice(FILLER)
        sentences.append(re.sub(r"\{(\w+)\}", lambda slot: rng.choice(SLOTS[slot[1]]), pattern))
    return " ".join(sentences)


def record(args: argparse.Namespace) -> None:
    """Write a profile of other text, or of the first samples of one."""
    if args.text == "recall":
        of_samples(Profile.load(args.profile), slice(0, args.samples)).save(args.out)
        return
    from transformers import AutoTokenizer

    from tangram.calibrate.recording.record import record_profile

    model = str(recall_model_path())
    tokenizer = AutoTokenizer.from_pretrained(model)
    samples = []
    for seed in range(args.samples):
        text = filler_text(random.Random(seed), args.sample_tokens)
        message = [{"role": "user", "content": text}]
        tokens = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_dict=False
        )
        samples.append(tokens[: args.sample_tokens])
    record_profile(
        model, samples, scorer_name="key_diff", chunk_size_tokens=C, n_sink_tokens=S,
        description=f"{args.text}, {args.sample_tokens} tokens",
        progress=lambda done: print(f"\r{done} of {len(samples)}", end="", flush=True),
        dtype="float32", kv_cache_memory_bytes=1 << 29,
    ).save(args.out)  # fmt: skip


def loss(args: argparse.Namespace) -> None:
    """Play the budgets that each of several profiles gives, and write what was answered."""
    model, texts = load_texts(args)
    about = {"versions": versions(), "machine": machine(), "commit": commit()}
    for path in args.profiles:
        profile = Profile.load(path)
        for ratio in RATIOS[1:]:
            for level in RULES:
                pages = pages_of(head_groups(profile, level, ratio, Sizes()))
                keep = static(pages * PAGE_ROWS)
                right, _ = play(model, get_scorer(profile.scorer_name), Sizes(), keep, texts)
                cell = {
                    "calibrated_on": profile.data["description"],
                    "samples": profile.data["n_samples"], "rule": level, "ratio": ratio,
                    "questions": len(right), "right": int(right.sum()),
                    "interval_95": wilson_interval(int(right.sum()), len(right)),
                    "pages": pages.tolist(), "seed": args.seed,
                    "context_tokens": args.context_tokens, "scorer": profile.scorer_name, **about,
                }  # fmt: skip
                print({n: cell[n] for n in ("calibrated_on", "samples", "rule", "ratio", "right",
                      "questions")}, flush=True)  # fmt: skip
                with args.out.open("a") as out:
                    out.write(json.dumps(cell) + "\n")


def main() -> None:
    """Run a part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("compare", "record", "loss"))
    parser.add_argument("--profile", type=Path, help="of many samples")
    parser.add_argument("--retention", type=Path, help=".npz of real heads' shares, to compare")
    parser.add_argument("--text", choices=("filler", "recall"), default="filler")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--profiles", type=Path, nargs="+", help="to be played, for loss")
    parser.add_argument("--sample-tokens", type=int, default=1500)
    add_texts(parser, conversations=6)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    {"compare": compare, "record": record, "loss": loss}[args.part](args)


if __name__ == "__main__":
    main()
