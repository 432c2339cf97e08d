"""`tangram report`: a calibration profile as one HTML page of pictures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tangram.arguments import Parser, check_output, ratios
from tangram.cli.report.layouts import MAX_RATIOS, Settings
from tangram.cli.report.page import render
from tangram.cli.report.story import report_data
from tangram.errors import ConfigurationError
from tangram.printable import printable
from tangram.profile import Profile

DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}


def run(argv: Sequence[str]) -> int:
    """Write the page, and repeat its warnings."""
    args = parser().parse_args(argv)
    check_output("--out", args.out, args.profile)
    profile = Profile.load(args.profile)
    settings = Settings.of(
        profile,
        ratios=args.ratios,
        page_group_size=args.page_group_size,
        itemsize_bytes=DTYPES[args.dtype],
    )
    data = report_data(profile, settings, args.profile)
    page = render(data)
    try:
        args.out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--out {args.out} cannot be written: {error}") from error
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    for warning in data["warnings"]:
        console.print(f"note: {warning}", style="yellow", markup=False)
    console.print(
        f"{printable(args.out)} ({len(page.encode()) >> 10} KiB): open it in a browser",
        markup=False,
    )
    return 0


def parser() -> argparse.ArgumentParser:
    """The subcommand's parser."""
    made = Parser(
        prog="tangram report",
        description="A calibration profile as one HTML page of pictures; it needs no network.",
    )
    add = made.add_argument
    add("profile", type=Path, metavar="PROFILE", help="file that calibration wrote")
    add(
        "--out",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="(default: report.html)",
    )
    add(
        "--ratios",
        type=_ratios,
        metavar="R,R,...",
        help=f"ratios to choose from on the page, at most {MAX_RATIOS} (default: the usual ones, "
        "and those that budgets were measured at)",
    )
    add(
        "--page-group-size",
        type=int,
        metavar="H",
        help="as in serving (default: that of measured budgets, or the server's)",
    )
    add("--dtype", choices=list(DTYPES), default="bfloat16", help="of the cache")
    return made


def _ratios(text: str) -> tuple[float, ...]:
    values = tuple(sorted(set(ratios(text))))
    if len(values) > MAX_RATIOS:
        raise argparse.ArgumentTypeError(f"{text}: expected at most {MAX_RATIOS} ratios")
    return values
