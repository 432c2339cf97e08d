"""Mistakes in a server's arguments that can be told before vLLM is loaded, which takes long."""

from __future__ import annotations

import argparse
import ast
import errno
import socket
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from tangram.arguments import Parser
from tangram.errors import ConfigurationError
from tangram.plan.options import flag, flag_names
from tangram.vllm_plugin.compat.option_files import OPTION_FILES

_LIKENESS = 0.8
_PORT = 8000


def check_arguments(arguments: Sequence[str], flags: Iterable[str]) -> None:
    """Return only if no everyday mistake is found.

    Args:
        arguments: of `vllm serve`, its model first if that is given without an option.
        flags: the options among them, spelled as in the documentation.

    Raises:
        ConfigurationError: an option that is misspelled, a model's folder that is not there, or a
            port that is taken; says what was meant, or what to do.
    """
    _check_flags(sorted(flags))
    args, _ = _parser().parse_known_args(arguments)
    is_first = bool(arguments) and not arguments[0].startswith("-")
    _check_folder(arguments[0] if is_first else args.model)
    # Another file may name the port, and what is no HTTP server of one port has its own.
    elsewhere = args.config, args.grpc, args.headless, args.uds
    if not any(elsewhere) and "--data-parallel-multi-port-external-lb" not in flags:
        _check_port(args.host, args.port)


def _check_flags(flags: Sequence[str]) -> None:
    """Refuse what vLLM does not know either, and is so like one that is known to be meant."""
    ours = flag_names()
    asked = [name for name in flags if name.startswith("--") and name not in ours]
    vllm = vllm_flags() if asked else set()
    for name in asked:
        # vLLM takes beginnings of its options, and `--json.key+` for a list in one.
        if any(known.startswith(name.rstrip("+")) for known in vllm):
            continue
        if near := get_close_matches(name, ours | vllm, 1, _LIKENESS):
            raise ConfigurationError(
                f"tangram serve knows no option {name}: did you mean {near[0]}? (tangram serve "
                "--help lists the options of compression, tangram serve --help=all those of vLLM)"
            )


def vllm_flags() -> set[str]:
    """Options of `vllm serve`, as its source has them; none where that is not to be found."""
    spec = find_spec("vllm")
    names: set[str] = set()
    for folder in spec.submodule_search_locations or () if spec else ():
        for source in OPTION_FILES:
            file = Path(folder, source)
            names |= _flags_of(ast.parse(file.read_bytes())) if file.is_file() else set()
    others = (("--", "--no-"), ("--enable-", "--disable-"), ("--disable-", "--enable-"))
    return names | {name.replace(*other, 1) for name in names for other in others}


def _flags_of(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and str(node.value).startswith("--"):
            found.add(str(node.value).replace("_", "-"))
        elif isinstance(node, ast.ClassDef):
            fields = (each.target for each in node.body if isinstance(each, ast.AnnAssign))
            found |= {flag(each.id) for each in fields if isinstance(each, ast.Name)}
    return found


def _check_folder(model: str | None) -> None:
    """Refuse what can only be a path, and leads nowhere."""
    if not model or "://" in model or Path(model).exists():
        return
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        literal = " (~ is not expanded there: write the whole path)" if model[0] == "~" else ""
        raise ConfigurationError(
            f"MODEL is {model}, and there is no such folder{literal}: give the folder of a model, "
            "or its name on the Hugging Face Hub, ORGANISATION/NAME"
        )


def _check_port(host: str | None, port: int) -> None:
    """Refuse a port that another process listens on; whatever else is wrong is vLLM's to tell."""
    family = socket.AF_INET6 if host and ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host or "", port))
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise ConfigurationError(
                f"--port {port} is taken: another process listens on it: give another --port, or "
                "end that process"
            ) from error


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="tangram serve", add_help=False)
    for name in ("--model", "--host", "--config", "--uds"):
        parser.add_argument(name)
    parser.add_argument("--port", type=int, default=_PORT)
    for name in ("--grpc", "--headless"):
        parser.add_argument(name, action="store_true")
    return parser
