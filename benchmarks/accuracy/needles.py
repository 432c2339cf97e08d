"""Needle conversations in words of several kinds, for any model, and what a figure says of it."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.accuracy.sources import RealUnits, documents
from benchmarks.accuracy.wordings import CHAINS, FACTS
from tangram.arguments import count, tokens
from tangram.evaluate.chat import ChatFormat
from tangram.evaluate.play import Script, make_script
from tangram.evaluate.tasks import Sizes, Task
from tangram.evaluate.tasks.haystack import Filler, Sentences
from tangram.evaluate.tasks.niah_multikey import NiahMultikey
from tangram.evaluate.tasks.niah_multivalue import NiahMultivalue
from tangram.evaluate.tasks.variable_tracking import VariableTracking
from tangram.installed import commit, machine, versions
from tangram.plan.models import read_config

TASKS = ("multikey", "multivalue", "variable_tracking")
BUILT_IN = "builtin"


def add_needles(parser: argparse.ArgumentParser, *, seeds: int, questions: int) -> None:
    """Options of the conversations.

    Args:
        parser: gets them.
        seeds: default of `--seeds`.
        questions: default of `--questions`.
    """
    add = parser.add_argument
    add("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    add("--context-tokens", nargs="+", type=tokens, default=[4096, 16384], metavar="N")
    add("--seeds", type=count, default=seeds, help=f"pooled (default: {seeds})")
    add("--first-seed", type=int, default=1)
    add("--questions", type=count, default=questions,
        help=f"of a task and length, over all seeds, at least (default: {questions})")  # fmt: skip
    add("--questions-per-conversation", type=count, default=8, help="(default: 8)")
    add("--filler", default=BUILT_IN, metavar="SOURCE",
        help="what is told stands among: builtin, or real text (a path, stdlib, python-manual, "
        "package:NAME; default: builtin)")  # fmt: skip


def make_tasks(names: list[str], filler: str) -> dict[str, Task]:
    """Tasks by name, in all wordings."""
    units: Filler = Sentences
    if filler != BUILT_IN:
        units = partial(RealUnits, documents(filler, "--filler"))
    made: dict[str, Task] = {
        "multikey": NiahMultikey(wordings=FACTS, filler=units),
        "multivalue": NiahMultivalue(wordings=FACTS, filler=units),
        "variable_tracking": VariableTracking(wordings=CHAINS, filler=units),
    }
    return {name: made[name] for name in dict.fromkeys(names)}


def make_scripts(args: argparse.Namespace, chat: ChatFormat) -> list[Script]:
    """For every task and length a script a seed, with as many conversations as it takes."""
    asked = args.questions_per_conversation
    conversations = math.ceil(args.questions / (args.seeds * asked))
    return [
        make_script(name, task, Sizes(length, conversations, asked, seed), chat)
        for length in dict.fromkeys(args.context_tokens)
        for name, task in make_tasks(args.tasks, args.filler).items()
        for seed in range(args.first_seed, args.first_seed + args.seeds)
    ]


def scores_of(script: Script, replies: list[dict[str, Any]]) -> list[list[float]]:
    """[conversations][questions] of a cell's replies."""
    scores: list[list[float]] = [[] for _ in script.dialogues]
    for reply in replies:
        scores[reply["conversation"]].append(reply["score"])
    return scores


def kinds_of(script: Script) -> list[str]:
    """The kind of thing that each conversation asks for."""
    return [dialogue.questions[0].kind for dialogue in script.dialogues]


def describe_model(model: str, config: Mapping[str, Any]) -> dict[str, str]:
    """The model's name and SHA-256 of its weights, or of its config where it is no folder."""
    digest = hashlib.sha256()
    files = sorted(Path(model).glob("*.safetensors"))
    for file in files:
        with file.open("rb") as opened:
            while part := opened.read(1 << 24):
                digest.update(part)
    if not files:
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    return {
        "model": Path(model).name if files else model,
        "sha256_of": "weights" if files else "config",
        "sha256": digest.hexdigest(),
    }


def about(model: str, command: list[str]) -> dict[str, Any]:
    """What every line says of the run."""
    return {
        **describe_model(model, read_config(model)),
        "command": command,
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
    }
