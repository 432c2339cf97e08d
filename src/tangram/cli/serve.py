"""`tangram serve`: vLLM's OpenAI server with compression on."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from tangram.cli.installed import is_cpu_build, vllm_command
from tangram.cli.models import (
    RECALL,
    RECALL_GROUP_SIZE,
    bundled_model,
    bundled_profile_options,
)

_ENABLE = "--enable-compression"
_CACHE_MEMORY = "--kv-cache-memory-bytes"
_RECALL_CACHE_BYTES = 512 << 20

_DESCRIPTION = f"""Serve a model with vLLM's OpenAI server and KV cache compression on.

Everything is handed on to 'vllm serve' as it is, with {_ENABLE} added.
MODEL comes first. Without one the bundled recall model is served, as '{RECALL}', with
settings that suit it; any of them can be given to have another.
"""
_EPILOG = "vLLM's own options: tangram serve --help=all"


def run(argv: Sequence[str]) -> int:
    """Become vLLM's server, so that signals and the exit code are its own."""
    if argv and argv[0] in ("-h", "--help"):
        _parser().print_help()
        return 0
    command = vllm_command("serve", *serve_arguments(argv))
    sys.stdout.flush()
    os.execve(command[0], command, {**os.environ, **_environment(argv)})
    raise AssertionError("unreachable")


def serve_arguments(argv: Sequence[str]) -> list[str]:
    """Arguments of `vllm serve`: what was given, compression, and what the bundled model needs."""
    given = list(argv)
    enable = [] if _ENABLE in _flags(given) else [_ENABLE]
    if _names_a_model(given):
        return [*given, *enable]
    return [str(bundled_model()), *given, *enable, *_recall_defaults(given, os.environ)]


def _recall_defaults(given: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Settings for the bundled model, without those that are given."""
    flags = _flags(given)
    defaults: dict[str, str | None] = {
        "--served-model-name": RECALL,
        "--enforce-eager": None,
        "--page-group-size": str(RECALL_GROUP_SIZE),
    }
    if is_cpu_build():
        defaults["--dtype"] = "float32"
    if "VLLM_CPU_KVCACHE_SPACE" not in environment and "--gpu-memory-utilization" not in flags:
        defaults[_CACHE_MEMORY] = str(_RECALL_CACHE_BYTES)
    chosen = {"--compression-profile", "--compression-scorer", "--compression-level"}
    if not chosen & flags:
        for name, option in bundled_profile_options().items():
            defaults["--" + name.replace("_", "-")] = option
    arguments: list[str] = []
    for flag, value in defaults.items():
        if not {flag, flag.replace("--", "--no-", 1)} & flags:
            arguments += [flag] if value is None else [flag, value]
    return arguments


def _environment(argv: Sequence[str]) -> dict[str, str]:
    """The bundled model is a folder: nothing is to be asked of the network for it."""
    if _names_a_model(argv) or "HF_HUB_OFFLINE" in os.environ:
        return {}
    return {"HF_HUB_OFFLINE": "1"}


def _names_a_model(given: Sequence[str]) -> bool:
    # A later word may be the value of an option, so only the first can be taken for a model.
    if given and not given[0].startswith("-"):
        return True
    # vLLM's own help, and the other places that it takes a model from.
    return bool(_flags(given) & {"--model", "--config", "--help", "-h"})


def _flags(given: Sequence[str]) -> set[str]:
    """The options among the arguments, spelled as in the documentation."""
    return {
        argument.partition("=")[0].replace("_", "-")
        for argument in given
        if argument.startswith("-")
    }


def _parser() -> argparse.ArgumentParser:
    from tangram.vllm_plugin.options import add_flags

    parser = argparse.ArgumentParser(
        prog="tangram serve",
        usage="tangram serve [MODEL] [options of vllm serve]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="as for vllm serve")
    add_flags(parser)
    return parser
