"""What `tangram doctor` found: rows of a table, and what comes of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tangram.printable import cut, one_line, printable

_MOST_CHARACTERS = 500
"""Of a cell: what others say has no end."""


@dataclass(frozen=True)
class Finding:
    """One row: what was looked at, what was found, and whether it stands in the way.

    `warning` marks what does not, and is worth knowing all the same.
    """

    name: str
    found: str
    ok: bool = True
    note: str = ""
    warning: bool = False

    @property
    def color(self) -> str:
        """How the row is shown."""
        return "red" if not self.ok else "yellow" if self.warning else "green"


def print_findings(title: str, findings: Iterable[Finding], console: Console) -> None:
    """A table of them, in which nothing that was found is obeyed."""
    table = Table(title=Text(printable(title)), title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("", overflow="fold", style="dim")
    for finding in findings:
        # As texts, because what was found may hold brackets, which markup would swallow.
        name, found, note = (
            cut(one_line(text), _MOST_CHARACTERS)
            for text in (finding.name, finding.found, finding.note)
        )
        table.add_row(Text(name), Text(found, finding.color), Text(note))
    console.print(table)


def conclude(findings: Sequence[Finding], console: Console) -> int:
    """Say what comes of them; the exit code."""
    wrong = [finding.name for finding in findings if not finding.ok]
    if wrong:
        listed = cut(", ".join(wrong), _MOST_CHARACTERS)
        console.print(f"compression cannot be served: {listed}", style="red", markup=False)
        return 1
    if warned := [finding.name for finding in findings if finding.warning]:
        listed = cut(", ".join(warned), _MOST_CHARACTERS)
        told = f"nothing stands in the way; to be looked at: {listed}"
        console.print(told, style="yellow", markup=False)
        return 0
    console.print("all is as it should be", style="green")
    return 0
