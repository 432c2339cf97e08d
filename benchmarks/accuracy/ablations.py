"""What chunk size, window, sinks and page groups are worth, on the recall model.

    python -m benchmarks.accuracy.ablations --profile 'FOLDER/key_diff-{chunk}.profile' --out FILE

One size is changed at a time, the others stay at C 256, W 32, S 4 and H_p 1. Played in plain torch
(`plain.py`), with the memory that a request holds by the layout, beside full KV.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.accuracy.plain import (
    PAGE_ROWS,
    Sizes,
    add_texts,
    head_groups,
    load_profile,
    load_texts,
    play,
    rows_of,
    static,
)
from tangram.errors import BudgetError, ScorerError
from tangram.evaluate.results import wilson_interval
from tangram.geometry import Geometry, HeadGroups
from tangram.installed import commit, machine, versions
from tangram.scorers import get_scorer

AXES = {
    "chunk": (128, 256, 512, 1024, 2048),
    "window": (0, 16, 32, 64, 128),
    "sinks": (0, 4, 16),
    "group": (1, 2, 4),
}
LEVELS = ("uniform", "error", "measured")
MEASURED_CHUNKS = (256, 512)
"""For which there is a profile with measured budgets; the others read that of the first."""
LONG_TOKENS = 32768


def settings(axes: list[str], ratios: list[float]) -> Iterator[tuple[str, Sizes, float, str]]:
    """(axis, sizes, ratio, level), the common middle once, as part of the first axis."""
    for axis in axes:
        for value in AXES[axis]:
            sizes = replace(Sizes(), **{axis: value})
            if sizes == Sizes() and axis != axes[0]:
                continue
            for ratio in ratios:
                for level in LEVELS:
                    fits = sizes.chunk in MEASURED_CHUNKS and sizes.group == 1
                    if level != "measured" or fits:
                        yield axis, sizes, ratio, level


def held_share(groups: HeadGroups, sizes: Sizes, lengths: range) -> float:
    """Bytes of the cache that a request holds, of those with full KV, mean over its lengths."""
    layout = Geometry(
        head_groups=groups,
        num_query_heads=8,
        head_size=64,
        itemsize_bytes=2,
        chunk_size_tokens=sizes.chunk,
        window_size_tokens=sizes.window,
        n_sink_tokens=sizes.sinks,
        page_size_rows=PAGE_ROWS,
    )
    return sum(layout.held_bytes(n) / layout.full_bytes(n) for n in lengths) / len(lengths)


def main() -> None:
    """Play all settings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", required=True, help="file; {chunk} stands for 256 or 512")
    parser.add_argument("--scorer", default="key_diff")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.25, 0.15, 0.1])
    parser.add_argument("--out", type=Path, required=True)
    add_texts(parser, conversations=4)
    args = parser.parse_args()
    model, texts = load_texts(args)
    scorer = get_scorer(args.scorer)
    about = {"versions": versions(), "machine": machine(), "commit": commit(), "seed": args.seed,
             "conversations": args.conversations, "context_tokens": args.context_tokens,
             "scorer": args.scorer, "dtype": "float32"}  # fmt: skip
    for axis, sizes, ratio, level in settings(args.axes, args.ratios):
        chunk = sizes.chunk if sizes.chunk in MEASURED_CHUNKS else MEASURED_CHUNKS[0]
        profile = load_profile(args.profile.replace("{chunk}", str(chunk)), args.scorer, level)
        try:
            scorer.check_inputs(sizes.window, ())
            groups = head_groups(profile, level, ratio, sizes)
        except (BudgetError, ScorerError) as error:
            print(f"left out: {error}")
            continue
        begun = time.perf_counter()
        right, _ = play(model, scorer, sizes, static(rows_of(groups)), texts)
        asked = range(int(texts[0].answers.min()), int(texts[0].answers.max()))
        long = range(LONG_TOKENS, LONG_TOKENS + sizes.chunk)
        cell = {
            "axis": axis, **asdict(sizes), "ratio": ratio, "level": level,
            "questions": len(right), "right": int(right.sum()),
            "accuracy": right.double().mean().item(),
            "interval_95": wilson_interval(int(right.sum()), len(right)),
            "held_share": held_share(groups, sizes, asked),
            "held_share_32k": held_share(groups, sizes, long),
            "seconds": time.perf_counter() - begun, **about,
        }  # fmt: skip
        print({n: cell[n] for n in (*asdict(sizes), "ratio", "level", "right", "questions",
              "held_share", "held_share_32k", "seconds")}, flush=True)  # fmt: skip
        with args.out.open("a") as out:
            out.write(json.dumps(cell) + "\n")


if __name__ == "__main__":
    main()
