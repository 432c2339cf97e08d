"""Any model as a test bed: needle conversations, and divergence on real text, against full KV.

    python -m benchmarks.accuracy.testbed --model FOLDER --profile default=FOLDER/{scorer}.profile \
        --scorers key_diff expected_attention --out FILE.jsonl
    python -m benchmarks.accuracy.testbed_report FILE.jsonl

Full KV is played first. Of a scorer, chunk size and ratio there is one engine; budgets of all
levels and profiles are swapped in it. A line is written as soon as its cell is there, and a cell
that is there is not played again. Profiles are named, so that the report can tell, say, one that
was calibrated without tables from one that was calibrated with them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.accuracy import testbed_report
from benchmarks.accuracy.needles import about, add_needles, kinds_of, make_scripts, scores_of
from benchmarks.accuracy.sources import KINDS, Passage, passages
from tangram.arguments import count, tokens
from tangram.errors import ConfigurationError
from tangram.evaluate.cells import Engines, Grid, Setting, make_engine, make_settings, play_scripts
from tangram.evaluate.chat import ChatFormat
from tangram.evaluate.play import Script
from tangram.evaluate.results import Cell, append_cell, read_cells, settings_digest
from tangram.installed import is_cpu_build
from tangram.plan.dtypes import ITEMSIZE_BYTES, served_dtype
from tangram.plan.models import bundled_model, is_bundled, read_config
from tangram.scorers import UNCALIBRATED_SCORER

REQUIRED = ("digest", "part", "task", "context_tokens", "scorer", "label", "ratio")
TOKENS_AT_ONCE = 32768
"""Of texts that are read in one step."""
LONGEST_REPLY = 80
"""Characters of a wrong answer that a line keeps."""


@dataclass(frozen=True)
class Side:
    """A setting, and what the report calls its budgets.

    Attributes:
        setting: full KV or compression.
        label: `uniform`, or the profile's name and the level; empty for full KV.
    """

    setting: Setting
    label: str


class Bed:
    """What is played, and the lines of what was.

    Args:
        args: options.
        command: the command line.
    """

    def __init__(self, args: argparse.Namespace, command: list[str]) -> None:
        self.args = args
        self.model = str(bundled_model()) if is_bundled(args.model) else args.model
        config = read_config(self.model)
        self.dtype = args.dtype or ("float32" if is_cpu_build() else served_dtype(config))
        self.about = {**about(self.model, command), "dtype": self.dtype}
        self.sides = make_sides(args, config, ITEMSIZE_BYTES[self.dtype])
        self._chat = ChatFormat.load(self.model) if args.tasks else None
        self.cells: dict[str, Cell] = {}
        if args.out.exists():
            self.cells = {c["digest"]: c for c in read_cells(args.out, "--out", REQUIRED)}

    @cached_property
    def scripts(self) -> list[Script]:
        """Needle conversations."""
        return [] if self._chat is None else make_scripts(self.args, self._chat)

    @cached_property
    def texts(self) -> dict[str, list[Passage]]:
        """Texts whose divergence is told, by kind."""
        if not self.args.text_kinds:
            return {}
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.model)
        sources = {**KINDS, **dict(self.args.texts)}
        return {
            kind: passages(
                kind,
                sources[kind],
                lambda text: tokenizer.encode(text, add_special_tokens=False, verbose=False),
                self.args.texts_a_kind,
                self.args.text_tokens,
            )
            for kind in self.args.text_kinds
        }

    def digest(self, part: str, content: str, side: Side) -> str:
        """Which cell it is: the same model, text, budgets and scorer give the same one."""
        setting = side.setting.to_json()
        setting.pop("profile")
        return settings_digest(
            {"part": part, "content": content, "setting": setting, "label": side.label,
             "statistics": side.setting.statistics_digest, "model": self.about["sha256"],
             "dtype": self.dtype}
        )  # fmt: skip

    def keep(self, digest: str, side: Side, figures: Mapping[str, Any]) -> None:
        """Write a cell's line."""
        setting = side.setting.to_json()
        setting["profile"] = setting["profile"] and Path(setting["profile"]).name
        cell = {"digest": digest, **figures, **setting, "label": side.label, **self.about}
        self.cells[digest] = cell
        append_cell(self.args.out, cell)

    def of(self, sides: Sequence[Side], part: str, content: Mapping[str, str]) -> list[Cell]:
        """The cells that are there, of what was asked for."""
        wanted = (self.digest(part, digest, side) for side in sides for digest in content.values())
        return [self.cells[digest] for digest in wanted if digest in self.cells]


def make_sides(args: argparse.Namespace, config: Mapping[str, Any], itemsize: int) -> list[Side]:
    """Full KV, then all that is asked for; what shares an engine lies side by side.

    Raises:
        ConfigurationError: a setting that cannot be served, or a profile that is not there.
    """
    made: dict[tuple[Any, ...], Side] = {}
    for name, pattern in args.profile or [("", "none")]:
        grid = Grid(
            ratios=args.ratios,
            scorers=args.scorers,
            levels=args.levels or [None],
            chunk_sizes=args.chunk_sizes,
            window_sizes=[args.window_size],
            page_group_sizes=[args.page_group_size],
            profile=pattern,
        )
        for setting in make_settings(grid, args.model, config, itemsize):
            plan = setting.plan
            label = "" if plan is None else f"{name} {plan.level}".strip()
            if plan is not None and plan.level == "uniform" and not plan.scorer.needs_statistics:
                label = plan.level
            layout = None if plan is None else (plan.scorer_name, plan.geometry.digest)
            made.setdefault((label, layout), Side(setting, label))

    def engine(side: Side) -> tuple[Any, ...]:
        plan = side.setting.plan
        if plan is None:
            return ()
        order = args.chunk_sizes.index(plan.geometry.chunk_size_tokens)
        return plan.scorer_name, order, -plan.ratio, side.setting.statistics_digest or ""

    return sorted(made.values(), key=engine)


def play_needles(bed: Bed, start: Callable[[Bed, Setting], Any]) -> None:
    """All cells of needle conversations that are not there yet."""
    with Engines(lambda setting: start(bed, setting), swaps=True) as engines:
        for side in bed.sides:
            missing = {
                digest: script
                for script in bed.scripts
                if (digest := bed.digest("needles", script.digest, side)) not in bed.cells
            }
            if not missing:
                continue
            engine = engines.of(side.setting)

            def keep(
                script: Script, figures: Cell, side: Side = side, device: str = engine.device
            ) -> None:
                replies = figures.pop("replies")
                lost = [
                    (r["conversation"], r["turn"], r["answer"][:LONGEST_REPLY])
                    for r in replies
                    if r["score"] < 1
                ]
                line = {
                    "part": "needles", **figures, "filler": bed.args.filler,
                    "script": script.digest, "kinds": kinds_of(script),
                    "scores": scores_of(script, replies), "lost": lost, "device": device,
                }  # fmt: skip
                bed.keep(bed.digest("needles", script.digest, side), side, line)
                print(
                    f"{side.setting.title} {side.label}: {script.spec}, {script.context_tokens:,} "
                    f"tokens, seed {script.sizes.seed}: {figures['right']:.4g} of "
                    f"{figures['questions']}, {figures['seconds']:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )

            play_scripts(engine, list(missing.values()), keep)


def start_greedy(bed: Bed, setting: Setting) -> Any:
    """An engine that answers conversations."""
    longest = max(script.longest_tokens for script in bed.scripts)
    options: dict[str, Any] = {"dtype": bed.dtype, "enforce_eager": True}
    if is_cpu_build():
        tokens_at_once = max(script.total_tokens for script in bed.scripts) + longest
        token_bytes = bed.sides[0].setting.token_bytes
        options["kv_cache_memory_bytes"] = int(token_bytes * tokens_at_once) * 3 // 2
    return make_engine(bed.model, setting, longest, {**options, **dict(bed.args.engine)})


def content_of(texts: Sequence[Passage]) -> str:
    """Differs when a text does."""
    return settings_digest({"texts": [text.digest for text in texts]})


def read_texts(bed: Bed, start: Callable[[Bed, Setting], Any]) -> None:
    """All cells of divergence that are not there yet."""
    asked = [
        (side, kind, bed.digest("divergence", content_of(texts), side))
        for side in bed.sides[1:]
        for kind, texts in bed.texts.items()
    ]
    asked = [(side, kind, digest) for side, kind, digest in asked if digest not in bed.cells]
    if not asked:
        return
    states = {}
    with Engines(lambda setting: start(bed, setting), swaps=True) as engines:
        reader = engines.of(bed.sides[0].setting)
        for kind in dict.fromkeys(kind for _, kind, _ in asked):
            states[kind] = [each.cpu() for each in reader.states(*_positions(bed.texts[kind]))]
        for side, kind, digest in asked:
            reader, texts = engines.of(side.setting), bed.texts[kind]
            each = [
                {
                    "text": text.name,
                    "sha256": text.digest,
                    "divergence": reader.divergence(full, mine),
                    "agreement": reader.agreement(full, mine),
                }
                for text, full, mine in zip(
                    texts, states[kind], reader.states(*_positions(texts)), strict=True
                )
            ]
            line = {"part": "divergence", "task": kind, "context_tokens": len(texts[0].tokens)}
            for name in ("divergence", "agreement"):
                line[name] = sum(one[name] for one in each) / len(each)
            bed.keep(digest, side, {**line, "texts": each})
            print(
                f"{side.setting.title} {side.label}: {kind}: {line['divergence']:.4f} nats, "
                f"{line['agreement']:.1%} top-1",
                file=sys.stderr,
                flush=True,
            )


def _positions(texts: Sequence[Passage]) -> tuple[list[list[int]], list[list[int]]]:
    return (
        [list(text.tokens) for text in texts],
        [list(range(text.begin, len(text.tokens))) for text in texts],
    )


def start_reading(bed: Bed, setting: Setting) -> Any:
    """An engine that reads texts."""
    from tangram.engines.reading import ReadingEngine

    lengths = [len(text.tokens) for texts in bed.texts.values() for text in texts]
    compression = None
    if setting.options is not None:
        given = setting.options.to_mapping()
        compression = {name: value for name, value in given.items() if value is not None}
    options: dict[str, Any] = {"dtype": bed.dtype}
    at_once = max(max(lengths), TOKENS_AT_ONCE if not is_cpu_build() else 0)
    if is_cpu_build():
        token_bytes = bed.sides[0].setting.token_bytes
        options["kv_cache_memory_bytes"] = int(token_bytes * at_once) * 4
    return ReadingEngine(
        bed.model,
        lengths,
        compression=compression,
        tokens_at_once=at_once,
        **{**options, **dict(bed.args.engine)},
    )


def cells_of(bed: Bed) -> Iterator[Cell]:
    """The cells that were asked for."""
    yield from bed.of(bed.sides, "needles", {s.digest: s.digest for s in bed.scripts})
    yield from bed.of(
        bed.sides, "divergence", {kind: content_of(texts) for kind, texts in bed.texts.items()}
    )


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise argparse.ArgumentTypeError(f"{text}: expected NAME=VALUE")
    return name, value


def _option(text: str) -> tuple[str, Any]:
    name, value = _pair(text)
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def parser() -> argparse.ArgumentParser:
    """The command's parser."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--model", required=True, help="folder, name, or recall for the bundled one")
    add("--out", type=Path, required=True, metavar="FILE")
    add_needles(made, seeds=5, questions=960)
    add("--text-kinds", nargs="*", choices=KINDS, default=list(KINDS))
    add("--texts", nargs="*", type=_pair, default=[], metavar="KIND=SOURCE",
        help=f"where they come from, as of --filler (default: {KINDS})")  # fmt: skip
    add("--texts-a-kind", type=count, default=8)
    add("--text-tokens", type=tokens, default=4096)
    add("--ratios", nargs="+", type=float, default=[0.5, 0.25, 0.1])
    add("--scorers", nargs="+", default=[UNCALIBRATED_SCORER])
    add("--levels", nargs="+", help="budget rules (default: the profile's best)")
    add("--profile", nargs="*", type=_pair, metavar="NAME=FILE",
        help="a file, a folder, a pattern with {scorer}, or none")  # fmt: skip
    add("--chunk-sizes", nargs="+", type=tokens, default=[256])
    add("--window-size", type=int)
    add("--page-group-size", type=int)
    add("--dtype", choices=list(ITEMSIZE_BYTES), help="(default: vLLM's; on a CPU float32)")
    add("--engine", nargs="*", type=_option, default=[], metavar="NAME=VALUE",
        help="any keyword of vllm.LLM")  # fmt: skip
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Play, and print the report."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    unknown = [kind for kind, _ in args.texts if kind not in KINDS]
    if unknown:
        raise ConfigurationError(f"--texts: {unknown[0]} is no kind; choose among {list(KINDS)}")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    bed = Bed(args, ["python", "-m", "benchmarks.accuracy.testbed", *argv])
    play_needles(bed, start_greedy)
    read_texts(bed, start_reading)
    print(testbed_report.report(list(cells_of(bed))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
