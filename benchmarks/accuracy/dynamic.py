"""Static budgets against budgets that every input decides anew, on the recall model.

    python -m benchmarks.accuracy.dynamic --profile 'FOLDER/{scorer}-256.profile' --out FILE

The published method takes the threshold from the input: after each chunk, over the scores of all
heads of the model (crosslayer) or of each layer (perlayer), so that a head's rows vary. Both kinds
run in plain torch (`plain.py`), keep the same rows in all of every chunk, and see what the engine
would show them; a chunk's rows are chosen once it has gone through all layers, as in a chunked
prefill, so neither kind needs a second pass.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.accuracy.plain import (
    FIRST,
    PAGE_ROWS,
    Keep,
    Sizes,
    add_texts,
    head_groups,
    load_profile,
    load_texts,
    places,
    play,
    rows_of,
    static,
)
from models.recall.model import RecallModel
from tangram.evaluate.results import wilson_interval
from tangram.installed import commit, machine, versions
from tangram.scorers import get_scorer

SIZES = Sizes()


def dynamic(rows: Tensor, scope: str, floor_rows: int = 0) -> Keep:
    """The best of all heads of the model, or of each layer, as many as `rows` has in all.

    Args:
        rows: [layers, kv_heads], static budgets: what their sums are.
        scope: `crosslayer` or `perlayer`.
        floor_rows: rows that every head keeps whatever the others' scores.
    """

    def keep(order: Tensor) -> Tensor:
        order = order.masked_fill(places(order) < floor_rows, FIRST)
        layers = order.flatten(1) if scope == "perlayer" else order.reshape(1, -1)
        totals = rows.sum(dim=1) if scope == "perlayer" else rows.sum()[None]
        kept = torch.zeros_like(layers, dtype=torch.bool)
        for pool, total, mask in zip(layers, totals.tolist(), kept, strict=True):
            mask[pool.argsort(descending=True, stable=True)[: int(total)]] = True
        return kept.view_as(order)

    return keep


def compare(args: argparse.Namespace, model: RecallModel, texts: list) -> None:
    """Every scorer, scope and ratio, static and dynamic; a JSON line each."""
    about = {"versions": versions(), "machine": machine(), "commit": commit(), "seed": args.seed,
             "context_tokens": args.context_tokens, "conversations": args.conversations,
             "sizes": asdict(SIZES), "dtype": "float32"}  # fmt: skip
    for name in args.scorers:
        profile = load_profile(args.profile, name)
        for ratio in args.ratios:
            for scope in ("crosslayer", "perlayer"):
                rows = rows_of(head_groups(profile, scope, ratio, SIZES))
                kinds = {
                    "static": static(rows),
                    "dynamic": dynamic(rows, scope),
                }
                if ratio * SIZES.chunk < 2 * PAGE_ROWS:
                    kinds["dynamic, floor of a page"] = dynamic(rows, scope, PAGE_ROWS)
                base = None
                for kind, keep in kinds.items():
                    begun = time.perf_counter()
                    right, of_chunks = play(model, get_scorer(name), SIZES, keep, texts)
                    kept = torch.stack(of_chunks)
                    base = right if base is None else base
                    cell = {
                        "scorer": name, "scope": scope, "ratio": ratio, "budgets": kind,
                        "questions": len(right), "right": int(right.sum()),
                        "accuracy": right.double().mean().item(),
                        "interval_95": wilson_interval(int(right.sum()), len(right)),
                        "right_here_alone": int((right & ~base).sum()),
                        "right_static_alone": int((base & ~right).sum()),
                        # Half the differences: the share of a chunk's rows that lie elsewhere.
                        "rows_moved": ((kept - rows).abs().sum() / 2 / kept.sum()).item(),
                        "rows_of_head_mean": kept.double().mean(0).flatten().tolist(),
                        "rows_of_head_std": kept.double().std(0).flatten().tolist(),
                        "seconds": time.perf_counter() - begun, **about,
                    }  # fmt: skip
                    print({n: cell[n] for n in ("scorer", "scope", "ratio", "budgets", "right",
                          "questions", "rows_moved", "seconds")}, flush=True)  # fmt: skip
                    with args.out.open("a") as out:
                        out.write(json.dumps(cell) + "\n")


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", required=True, help="file; {scorer} stands for the name")
    parser.add_argument("--scorers", nargs="+", default=["key_diff", "snap_kv"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.25, 0.1])
    parser.add_argument("--out", type=Path, required=True)
    add_texts(parser, conversations=5)
    args = parser.parse_args()
    compare(args, *load_texts(args))


if __name__ == "__main__":
    main()
