"""`tangram calibrate`: from texts to a profile of a model, resumable."""

from __future__ import annotations

import argparse
import os
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tangram.arguments import Parser, count, positive, ratios, tokens
from tangram.calibrate.preparation import (
    DEFAULT_MAX_TOKENS,
    DEFAULT_MEASURE_RATIOS,
    DEFAULT_MEASURE_TIME_S,
    Calibration,
    prepare,
)
from tangram.calibrate.recording.record import record_profiles
from tangram.calibrate.scorer_choice import by_divergence, by_predicted_error
from tangram.calibrate.texts.sample_sets import BUNDLED, HUB
from tangram.children import follow_parent
from tangram.cli.scorer_table import print_choice
from tangram.errors import ConfigurationError
from tangram.plan.models import RECALL, RECALL_GROUP_SIZE, is_bundled
from tangram.plan.options import CompressionOptions, flag, flag_value
from tangram.profile import Profile
from tangram.profile.cache import locked
from tangram.profile.scorer_choice import ScorerChoice
from tangram.scorers import AUTO_SCORER, AUTO_SCORERS

DEFAULT_SAMPLES = 50
LINE_EVERY = 5
"""Samples between two lines about them, where no terminal shows a bar."""
_SIZES = ("compression_chunk_size", "compression_window_size", "compression_n_sink_tokens")


def run(argv: Sequence[str]) -> int:
    """Calibrate, and say what came of it."""
    is_automatic = follow_parent()
    args = parser().parse_args(argv)
    if is_bundled(args.model) and not args.data.startswith(HUB):
        # The bundled model is a folder: nothing is to be asked of the network for it.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    console = Console(stderr=True)
    begun = time.monotonic()
    plan = prepare(args, partial(_print, console))
    # Not the profile's own lock: a server holds that one while it has this command make it.
    with _claimed(plan, is_automatic, console):
        plan.unmeasured.unlink(missing_ok=True)
        try:
            with _bar(console, len(plan.samples)) as (done, tell):
                profile = calibrate(plan, done, tell, partial(_print, console))
        except BaseException:
            if plan.unmeasured.exists():
                kept = f"{plan.unmeasured} has the statistics, and what was measured so far"
                _print(console, kept)
            raise
        profile.save(plan.out)
        plan.partial.unlink(missing_ok=True)
        plan.unmeasured.unlink(missing_ok=True)
    if choice := ScorerChoice.of(profile.extra):
        print_choice(choice, console)
    _summary(plan, time.monotonic() - begun, args.model, console)
    return 0


def _claimed(plan: Calibration, is_automatic: bool, console: Console) -> AbstractContextManager:
    """The lock of what a run gathers.

    Nobody gave an automatic run its file: it waits for another, as its server would.
    """
    if is_automatic:
        line = f"waiting for another run that calibrates {plan.out}"
        return locked(plan.partial, partial(_print, console, line))
    return locked(plan.partial, partial(_refuse_second, plan.out), "--out")


def _refuse_second(out: Path) -> None:
    raise ConfigurationError(
        f"--out {out}: another run is calibrating to this file, and both would save what they "
        "gathered in one place: wait for it to end, or name another file"
    )


def calibrate(
    plan: Calibration,
    done: Callable[[int], None],
    tell: Callable[[str], None],
    say: Callable[[str], None] = lambda line: None,
) -> Profile:
    """Statistics of the samples, then budgets measured on those held back, of the best scorer.

    While budgets are measured, what there is so far is kept in `plan.unmeasured`.

    Args:
        plan: what to do.
        done: called with the number of samples that were read.
        tell: called with a line about what goes on.
        say: called with a line about a scorer that is left out.
    """
    left_out: dict[str, str] = {}

    def leave_out(name: str, reason: str) -> None:
        left_out[name] = reason
        say(f"scorer {name} is left out: {reason}")

    profiles = record_profiles(
        plan.model,
        [sample.token_ids for sample in plan.samples],
        plan.options.scorers,
        later=[sample.later for sample in plan.samples],
        chunk_size_tokens=plan.options.compression_chunk_size,
        window_size_tokens=plan.options.compression_window_size,
        n_sink_tokens=plan.options.compression_n_sink_tokens,
        description=plan.description,
        seed=plan.seed,
        partial=plan.partial,
        weights=plan.weights,
        progress=done,
        left_out=leave_out,
        **plan.engine,
    )
    extra = {
        "sample_kinds": [sample.kind for sample in plan.samples],
        "sample_later_queries": [len(sample.later) for sample in plan.samples],
        "held_back_kinds": [sample.kind for sample in plan.held],
        "held_back_tokens": [len(sample.token_ids) for sample in plan.held],
        "weights": plan.weights,
        "model_name": plan.name,
    }
    profiles = [replace(each, extra={**each.extra, **extra}) for each in profiles]
    chosen = profiles[0]
    if plan.options.is_auto:
        chosen = by_predicted_error(profiles, plan.compared, plan.options, left_out)
    if not plan.ratios:
        return chosen
    chosen.save(plan.unmeasured)
    return _measure(plan, profiles, tell, leave_out, left_out)


def _measure(
    plan: Calibration,
    profiles: Sequence[Profile],
    tell: Callable[[str], None],
    leave_out: Callable[[str, str], None],
    left_out: Mapping[str, str],
) -> Profile:
    from tangram.calibrate.budget_search.measure import Measured, measure_profiles

    def best(each: Sequence[Measured]) -> Profile:
        return by_divergence(each, left_out) if plan.options.is_auto else each[0].profile

    measured = measure_profiles(
        profiles,
        plan.model,
        [sample.token_ids for sample in plan.held],
        later=[sample.measured_positions(profiles[0].chunk_size_tokens) for sample in plan.held],
        ratios=plan.ratios,
        page_group_size=plan.options.page_group_size,
        weights=(plan.options.compression_scorer_parameters or {}).get("weights"),
        time_limit_s=plan.measure_time_s,
        progress=tell,
        found=lambda each: best(each).save(plan.unmeasured),
        left_out=leave_out,
        **plan.engine,
    )
    return best(measured)


@contextmanager
def _bar(
    console: Console, total: int
) -> Iterator[tuple[Callable[[int], None], Callable[[str], None]]]:
    """A bar on a terminal, and plain lines elsewhere: for samples read, and for what goes on."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    lines = not console.is_terminal
    with Progress(*columns, console=console, disable=lines) as progress:
        task = progress.add_task("samples", total=total)
        shown = -1

        def done(samples: int) -> None:
            nonlocal shown
            progress.update(task, completed=samples)
            if lines and samples != shown and (samples % LINE_EVERY == 0 or samples == total):
                _print(console, f"{samples} of {total} samples read")
                shown = samples

        def tell(line: str) -> None:
            progress.update(task, description=f"measuring: {line}")
            if lines:
                _print(console, f"measuring: {line}")

        yield done, tell


def _summary(plan: Calibration, seconds: float, model: str, console: Console) -> None:
    lengths = [len(sample.token_ids) for sample in plan.samples]
    kinds = Counter(sample.kind for sample in plan.samples)
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    measured = "no budgets measured"
    if plan.ratios:
        measured = f"{len(plan.held)} more held back to measure budgets"
    _print(
        console,
        f"{plan.out} ({plan.out.stat().st_size >> 10} KiB): {len(lengths)} samples of "
        f"{min(lengths):,} to {max(lengths):,} tokens ({listed}); {measured}; {seconds:.0f} s",
        f"serve with it: {shlex.join(_serve_command(plan, model))}",
    )


def _serve_command(plan: Calibration, model: str) -> list[str]:
    """What serves with the profile as it was calibrated."""
    command = ["tangram", "serve", *([] if is_bundled(model) else [model])]
    command += ["--compression-profile", str(plan.out)]
    asked, defaults = plan.options, CompressionOptions()
    if is_bundled(model):
        defaults = replace(defaults, page_group_size=RECALL_GROUP_SIZE)
    scorer = ("compression_scorer", "compression_scorer_parameters")
    for name in (*scorer, *_SIZES, "page_group_size"):
        if getattr(asked, name) != getattr(defaults, name):
            command += [flag(name), flag_value(getattr(asked, name))]
    return command


def _print(console: Console, *lines: str) -> None:
    console.print(*lines, sep="\n", highlight=False, markup=False, soft_wrap=True)


def parser() -> argparse.ArgumentParser:
    """The subcommand's parser."""
    defaults = CompressionOptions()
    made = Parser(
        prog="tangram calibrate",
        description="Record what every head of a model needs, and write it as a profile.",
    )
    add = made.add_argument
    add("model", metavar="MODEL", help=f"folder, name on the Hugging Face Hub, or {RECALL}")
    add("--out", type=Path, required=True, metavar="PROFILE", help="file to write")
    add(
        "--data",
        default=BUNDLED,
        metavar="FILE|hf:NAME[:SPLIT]|bundled",
        help="texts: .jsonl, .txt, a dataset, or the built-in ones (default)",
    )
    add(
        "--samples",
        type=count,
        default=DEFAULT_SAMPLES,
        metavar="N",
        help=f"(default: {DEFAULT_SAMPLES})",
    )
    add("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    add(
        "--max-tokens",
        type=tokens,
        metavar="T",
        help=f"of a sample (default: {DEFAULT_MAX_TOKENS})",
    )
    add(
        "--compression-scorer",
        "--scorer",
        default=AUTO_SCORER,
        metavar="NAME",
        help=f"whose rows the profile is about, or {AUTO_SCORER}: the best of "
        f"{', '.join(AUTO_SCORERS)} for this model (default: {AUTO_SCORER})",
    )
    add(
        "--compression-scorer-parameters",
        metavar="JSON",
        help="the scorer's parameters, as in serving (default: its own)",
    )
    for name in _SIZES:
        default = getattr(defaults, name)
        add(
            flag(name),
            type=int,
            default=default,
            metavar="N",
            help=f"as in serving (default: {default})",
        )
    add(
        "--page-group-size",
        type=int,
        metavar="H",
        help="as in serving; budgets are measured for it",
    )
    add(
        "--measure",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether budgets are measured, or statistics of all samples are all (default: they "
        "are on a GPU, and on a CPU where another option of measuring is given)",
    )
    add(
        "--measure-ratios",
        type=ratios,
        metavar="R,R,...",
        help=f"(default: {','.join(map(str, DEFAULT_MEASURE_RATIOS))}, as far as the chunk allows)",
    )
    add(
        "--measure-time-limit",
        type=positive,
        metavar="S",
        help="seconds of measuring, all ratios and scorers together (default: "
        f"{DEFAULT_MEASURE_TIME_S:g} for each scorer)",
    )
    add("--dtype", help="as in serving")
    add("--gpu-memory-utilization", type=float, metavar="X", help="as in serving")
    add("--engine-args", default="{}", metavar="JSON", help="further arguments of vllm.LLM")
    return made
