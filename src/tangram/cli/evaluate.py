"""`tangram evaluate`: how well compressed conversations are answered, against full KV."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tangram.arguments import check_output
from tangram.cli.evaluate_options import parameters_by_scorer, parser
from tangram.cli.evaluate_report import print_tables, report_console
from tangram.engines.engine_arguments import check_engine_arguments
from tangram.errors import ConfigurationError
from tangram.evaluate.cells import (
    Engines,
    Grid,
    Setting,
    make_engine,
    make_settings,
    play_scripts,
)
from tangram.evaluate.chat import ChatFormat
from tangram.evaluate.play import Script, make_script
from tangram.evaluate.plot import draw, require_plots
from tangram.evaluate.results import Cell, append_cell, read_cells, settings_digest
from tangram.evaluate.tasks import Sizes, get_task
from tangram.installed import commit, is_cpu_build, machine, versions
from tangram.plan.dtypes import ITEMSIZE_BYTES, served_dtype
from tangram.plan.models import bundled_model, is_bundled, read_config, tokenizer_arguments
from tangram.profile import ModelIdentity, text_config

_OWN_OPTIONS = ("model", "max_model_len", "dtype", "enable_prefix_caching", "additional_config")
_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class Evaluation:
    """Everything that is known before an engine is started.

    Attributes:
        model: as vLLM loads it.
        scripts: what is played.
        settings: on which, full KV first.
        max_model_len: of every engine.
        engine_options: further keyword arguments of `vllm.LLM`.
        about: what all cells have in common of their figures.
        identity: what all cells have in common of their digests.
    """

    model: str
    scripts: tuple[Script, ...]
    settings: tuple[Setting, ...]
    max_model_len: int
    engine_options: dict[str, Any]
    about: dict[str, Any]
    identity: dict[str, Any]

    def digest(self, script: Script, setting: Setting) -> str:
        """Which cell it is: the same model, prompts, layout and options give the same one.

        Of a profile there count the budgets, by the layout, and what the scorer reads of it.
        """
        one = {name: value for name, value in setting.to_json().items() if name != "profile"}
        if setting.statistics_digest is not None:
            one["statistics"] = setting.statistics_digest
        return settings_digest({**self.identity, "script": script.digest, "setting": one})


def run(argv: Sequence[str]) -> int:
    """Evaluate, or only draw; 0 when every cell is there."""
    args = parser().parse_args(argv)
    check_output("--plot", args.plot, args.plot_only, args.out)
    if args.plot_only:
        if args.plot is None:
            raise ConfigurationError("--plot-only FILE needs --plot FILE, where to draw")
        draw(read_cells(args.plot_only, "--plot-only"), args.plot)
        return 0
    check_output("--out", args.out)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if args.plot:
        require_plots(args.plot)
    evaluation = prepare(args, argv)
    known = read_cells(args.out, "--out") if args.out and args.out.exists() else []
    cells = evaluate(evaluation, known, args.out, Console(stderr=True))
    print_tables(cells, report_console())
    if args.plot:
        draw(cells, args.plot)
    return 0


def prepare(args: argparse.Namespace, argv: Sequence[str]) -> Evaluation:
    """Scripts, settings and options, checked as far as they can be without an engine.

    Raises:
        ConfigurationError: what was asked for does not fit; the message names the option.
    """
    if args.model is None:
        raise ConfigurationError("a MODEL is needed: a folder, a name, or recall for the bundled")
    model = args.model
    if is_bundled(model):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        model = str(bundled_model())
    engine = _engine_options(args.engine)
    config = read_config(model, engine.get("revision"))
    overrides = engine.get("hf_overrides")
    if isinstance(overrides, Mapping):  # a function, which vLLM takes too, is only run there
        config = {**config, **overrides}
    dtype = args.dtype or ("float32" if is_cpu_build() else served_dtype(config))
    settings = make_settings(_grid(args), args.model, config, ITEMSIZE_BYTES[dtype], engine)
    chat = _chat_format(args, model, engine)
    limit = args.max_model_len or text_config(config).get("max_position_embeddings")
    scripts = _scripts(args, limit, chat)
    max_model_len = _max_model_len(args, limit, scripts)
    identity = {
        "model": args.model,
        "network": ModelIdentity.from_config(config).to_dict(),
        "dtype": dtype,
        "engine": engine,
    }
    about = {
        "model": args.model,
        "dtype": dtype,
        "engine": engine,
        "command": ["tangram", "evaluate", *argv],
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
    }
    options: dict[str, Any] = {"dtype": dtype, "enforce_eager": True, "use_tqdm_on_load": False}
    if is_cpu_build() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        # Room for every conversation of a task at its end, uncompressed, and half as much again.
        tokens = max(script.total_tokens for script in scripts) + max_model_len
        options["kv_cache_memory_bytes"] = int(settings[0].token_bytes * tokens) * 3 // 2
    options |= engine
    return Evaluation(
        model, tuple(scripts), tuple(settings), max_model_len, options, about, identity
    )


def evaluate(
    evaluation: Evaluation, known: Sequence[Cell], out: Path | None, console: Console
) -> list[Cell]:
    """All cells: those that are known, and the others played.

    Neighbouring settings that differ in their budgets alone share an engine.

    Args:
        evaluation: what is evaluated.
        known: cells of earlier runs; those with the same digest are not played again.
        out: where to write cells as soon as they are there.
        console: for the progress.
    """
    done = {cell["digest"]: cell for cell in known}
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    progress = Progress(*columns, console=console, disable=not console.is_terminal)
    swaps = evaluation.engine_options["enforce_eager"]
    with progress, Engines(partial(_start, evaluation), swaps) as engines:
        for setting in evaluation.settings:
            missing = [
                script
                for script in evaluation.scripts
                if evaluation.digest(script, setting) not in done
            ]
            if missing:
                for cell in _play_setting(
                    evaluation, engines, setting, missing, done, progress, out
                ):
                    done[cell["digest"]] = cell
    return [
        done[evaluation.digest(script, setting)]
        for script in evaluation.scripts
        for setting in evaluation.settings
    ]


def _start(evaluation: Evaluation, setting: Setting) -> Any:
    """The engine of a setting."""
    return make_engine(
        evaluation.model, setting, evaluation.max_model_len, evaluation.engine_options
    )


def _play_setting(
    evaluation: Evaluation,
    engines: Engines,
    setting: Setting,
    scripts: Sequence[Script],
    done: dict[str, Cell],
    progress: Progress,
    out: Path | None,
) -> list[Cell]:
    """The cells of one setting."""
    questions = sum(script.num_questions for script in scripts)
    row = progress.add_task(f"{setting.title}: starting", total=questions)
    _print_line(progress, f"{setting.title}: starting, {questions} questions")
    cells: list[Cell] = []
    engine = engines.of(setting)
    full = evaluation.settings[0]

    def keep(script: Script, figures: Cell) -> None:
        denominator = done.get(evaluation.digest(script, full), figures)
        cells.append(
            {
                "digest": evaluation.digest(script, setting),
                **{name: value for name, value in figures.items() if name != "replies"},
                **setting.to_json(),
                "full_accuracy": denominator["accuracy"],
                "device": engine.device,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                **evaluation.about,
                "replies": figures["replies"],
            }
        )
        if out:
            append_cell(out, cells[-1])
        _print_line(
            progress,
            f"{setting.title}: {script.spec}, {script.context_tokens:,} tokens: "
            f"{figures['right']:.4g} of {figures['questions']} right, {figures['seconds']:.0f} s",
        )

    def show(script: Script, answered: int) -> None:
        before = sum(cell["questions"] for cell in cells)
        progress.update(
            row, completed=before + answered, description=f"{setting.title}: {script.spec}"
        )

    play_scripts(engine, scripts, keep, show)
    progress.update(row, description=setting.title)
    return cells


def _print_line(progress: Progress, line: str) -> None:
    """Print a line where no terminal shows the progress."""
    if progress.disable:
        progress.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _grid(args: argparse.Namespace) -> Grid:
    return Grid(
        ratios=args.ratios,
        scorers=args.scorers,
        levels=args.levels or [None],
        chunk_sizes=args.chunk_sizes or [None],
        window_sizes=args.window_sizes or [None],
        sink_tokens=args.sink_tokens or [None],
        page_group_sizes=args.page_group_sizes or [None],
        profile=args.profile,
        scorer_parameters=parameters_by_scorer(args.compression_scorer_parameters, args.scorers),
    )


def _scripts(args: argparse.Namespace, limit: int | None, chat: ChatFormat) -> list[Script]:
    scripts = []
    for spec in dict.fromkeys(args.tasks):
        task = get_task(spec)
        if not task.reads_file and limit and max(args.context_tokens) > limit:
            raise ConfigurationError(
                f"--context-tokens is {max(args.context_tokens)}, and the model takes {limit}: "
                "give less, or --max-model-len if the model is served longer"
            )
        lengths = [None] if task.reads_file else dict.fromkeys(args.context_tokens)
        for tokens in lengths:
            sizes = Sizes(tokens, args.conversations, args.questions, args.seed)
            scripts.append(make_script(spec, task, sizes, chat))
    return scripts


def _max_model_len(args: argparse.Namespace, limit: int | None, scripts: Sequence[Script]) -> int:
    """What was asked for, or what the longest conversation needs.

    Raises:
        ConfigurationError: a conversation is longer than the model takes.
    """
    longest = max(scripts, key=lambda script: script.longest_tokens)
    if limit and longest.longest_tokens > limit:
        raise ConfigurationError(
            f"the longest conversation of task {longest.spec} takes {longest.longest_tokens} "
            f"tokens with its answer, and the model {limit}: give less --context-tokens, a file "
            "of shorter conversations, or --max-model-len if the model is served longer"
        )
    return args.max_model_len or longest.longest_tokens


def _chat_format(args: argparse.Namespace, model: str, engine: dict[str, Any]) -> ChatFormat:
    template = None
    if args.chat_template:
        try:
            template = args.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"--chat-template {args.chat_template} cannot be read: {error}"
            ) from error
    name, options = tokenizer_arguments(engine, model)
    return ChatFormat.load(
        name,
        template=template,
        template_options=args.chat_template_options,
        **options,
    )


def _engine_options(given: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Keyword arguments for the engine.

    Raises:
        ConfigurationError: one that the evaluation decides itself.
    """
    for name, _ in given:
        if name in _OWN_OPTIONS or name.startswith("compression"):
            raise ConfigurationError(
                f"--engine {name}: the evaluation sets it; leave it out, or use the option of its "
                "own (--max-model-len, --dtype, --ratios and the others)"
            )
    check_engine_arguments("--engine", dict(given))
    return dict(given)
