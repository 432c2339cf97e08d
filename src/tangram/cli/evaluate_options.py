"""The options of `tangram evaluate`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tangram.arguments import Parser, count, tokens
from tangram.errors import ConfigurationError
from tangram.evaluate.tasks import task_names
from tangram.plan.dtypes import ITEMSIZE_BYTES
from tangram.plan.options import json_parameters
from tangram.scorers import AUTO_SCORER, registered_name

T = TypeVar("T")


def parser() -> argparse.ArgumentParser:
    """The subcommand's parser."""
    made = Parser(
        prog="tangram evaluate",
        description="Accuracy of compressed conversations against full KV, on the real engine.",
    )
    made.add_argument(
        "model", metavar="MODEL", nargs="?", help="folder, name, or recall for the bundled one"
    )
    what = made.add_argument_group("what is played")
    what.add_argument(
        "--tasks",
        type=_list_of(str),
        default=["recall"],
        metavar="T,T,...",
        help=f"{', '.join(task_names())}; the last three as NAME:FILE (default: recall)",
    )
    what.add_argument(
        "--context-tokens",
        type=_list_of(tokens),
        default=[4096],
        metavar="N,N,...",
        help="tokens of a whole conversation (default: 4096)",
    )
    what.add_argument("--conversations", type=count, default=8, metavar="N", help="(default: 8)")
    what.add_argument(
        "--questions", type=count, default=8, metavar="N", help="in each (default: 8)"
    )
    what.add_argument("--seed", type=int, default=1, help="of the conversations (default: 1)")
    what.add_argument("--chat-template", type=Path, metavar="FILE", help="instead of the model's")
    what.add_argument(
        "--chat-template-options",
        type=_json_object,
        metavar="JSON",
        help="""variables of the template, such as '{"enable_thinking": false}'""",
    )
    _add_grid(made.add_argument_group("which compression"))
    engine = made.add_argument_group("the engine")
    engine.add_argument("--dtype", choices=list(ITEMSIZE_BYTES), help="(default: vLLM's)")
    engine.add_argument(
        "--max-model-len", type=tokens, metavar="N", help="(default: what the tasks need)"
    )
    engine.add_argument(
        "--engine",
        type=_pair,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any keyword of vllm.LLM, such as gpu_memory_utilization=0.8; may be repeated",
    )
    results = made.add_argument_group("results")
    results.add_argument(
        "--out", type=Path, metavar="FILE", help="JSON lines; cells already there are not repeated"
    )
    results.add_argument("--plot", type=Path, metavar="FILE", help="accuracy over ratio, .svg")
    results.add_argument(
        "--plot-only", type=Path, metavar="FILE", help="draw from an earlier --out and do no more"
    )
    return made


def _add_grid(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--ratios",
        type=_list_of(float),
        default=[0.5, 0.25, 0.125],
        metavar="R,R,...",
        help="shares of the rows that are KEPT (default: 0.5,0.25,0.125)",
    )
    add(
        "--scorers",
        type=_list_of(str),
        default=[AUTO_SCORER],
        metavar="S,S,...",
        help=f"which tokens are worth keeping (default: {AUTO_SCORER}, the profile's)",
    )
    add(
        "--compression-scorer-parameters",
        metavar="JSON",
        help="the scorer's parameters, as in serving; of several scorers by name, "
        '\'{"snap_kv": {"kernel_size": 7}}\'',
    )
    add(
        "--levels",
        type=_list_of(str),
        metavar="L,L,...",
        help="budget rules (default: as in serving: measured where the profile has it, error with "
        "another profile, uniform without)",
    )
    add(
        "--profile",
        metavar="FILE|FOLDER",
        help="a file, a folder of SCORER.profile files, a pattern with {scorer}, or none for "
        "uniform budgets (default: the bundled one of recall, else one that is cached)",
    )
    for name, symbol in {
        "--chunk-sizes": "C, tokens that are sealed together",
        "--window-sizes": "W, raw tokens before a boundary",
        "--sink-tokens": "S, first tokens that every head keeps",
        "--page-group-sizes": "H_p, KV heads that share a budget",
    }.items():
        add(name, type=_list_of(int), metavar="N,N,...", help=symbol)


def parameters_by_scorer(given: str | None, scorers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Registry name of a scorer -> the parameters that were given for it.

    Args:
        given: JSON text: the parameters of the one scorer, or an object of them for each name.
        scorers: that are evaluated.

    Raises:
        ConfigurationError: parameters without a name of one of several scorers, or of another one.
    """
    if given is None:
        return {}
    found, names = json_parameters(given), set(map(registered_name, scorers))
    if not all(isinstance(value, dict) for value in found.values()):
        if len(names) > 1:
            raise ConfigurationError(
                f"--compression-scorer-parameters is {given}, and --scorers names several: give "
                'them by name, {"snap_kv": {"kernel_size": 7}}, or one scorer'
            )
        return {name: found for name in names}
    named = {registered_name(name): parameters for name, parameters in found.items()}
    if others := sorted(named.keys() - names):
        raise ConfigurationError(
            f"--compression-scorer-parameters has some of {', '.join(others)}, which --scorers "
            "does not name: add it there, or leave them out"
        )
    return named


def _list_of(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    def read(text: str) -> list[T]:
        try:
            return [kind(part.strip()) for part in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"{text}: expected a list like A,B ({error})"
            ) from error

    return read


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text}: expected NAME=VALUE")
    try:
        return name.replace("-", "_"), json.loads(value)
    except ValueError:
        return name.replace("-", "_"), {"True": True, "False": False}.get(value, value)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: expected a JSON object ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text}: expected a JSON object")
    return value
