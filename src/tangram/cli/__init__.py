"""The `tangram` command: one file per subcommand, imported when it is asked for.

Exit codes: 0 done, 1 something failed or differs, 2 a mistake in what was asked for, 130 stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from tangram.arguments import Parser
from tangram.errors import TangramError
from tangram.version import VERSION

COMMANDS = {
    "serve": "vLLM's OpenAI server with KV cache compression on",
    "calibrate": "record what every head of a model needs, and write it as a profile",
    "report": "a calibration profile as one HTML page of pictures",
    "demo": "play conversations against stock vLLM and against compression, and compare",
    "plan": "what a model's KV cache takes, compressed and not, from its config alone",
    "evaluate": "accuracy of multi-turn tasks, compressed against full KV, as a table and a plot",
    "doctor": "check versions, device and every hook of vLLM that compression relies on",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code.

    Args:
        argv: arguments without the program's name; those of the process when absent.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] in COMMANDS:
            command = import_module(f"{__name__}.{arguments[0]}")
            return int(command.run(arguments[1:]))
        parser = _parser()
        parser.parse_args(arguments)
        parser.print_help()
        return 2
    except TangramError as error:
        _complain(str(error))
        return 2
    except KeyboardInterrupt:
        _complain("stopped")
        return 130
    except SystemExit as stop:  # argparse: --help, --version, a usage error
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    parser = Parser(
        prog="tangram",
        description="Non-uniform KV cache compression that frees memory, inside stock vLLM.",
        epilog=f"commands:\n{listed}\n\n'tangram COMMAND --help' tells more about one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", nargs="?")
    parser.add_argument("--version", action="version", version=f"tangram {VERSION}")
    return parser


def _complain(message: str) -> None:
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True)
    console.print(f"tangram: {' '.join(message.split())}", style="red", markup=False)
