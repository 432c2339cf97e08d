"""What became of each bar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from pathlib import Path

from benchmarks.bars.figures import Figure, read_figures
from benchmarks.bars.table import MORE, RUNS, Bar


class Verdict(Enum):
    """What became of a bar; the value is what the table shows."""

    HOLDS = "ok"
    ROSE = "better: renew the docs"
    FELL = "FELL"
    BROKEN = "PROMISE BROKEN"
    LEFT = "left"

    @property
    def is_red(self) -> bool:
        """Whether somebody has to look."""
        return self in (Verdict.FELL, Verdict.BROKEN)


@dataclass(frozen=True)
class Judged:
    """A bar with what it was judged by.

    Attributes:
        bar: which.
        committed: the figure in the committed lines; None where they have none.
        measured: the figure that is judged; None where there is none.
        spread: share of the committed figure by which it may be worse.
    """

    bar: Bar
    committed: float | None
    measured: float | None
    spread: float

    @property
    def verdict(self) -> Verdict:
        """FELL where it is worse than committed by more than the spread, whatever else it is."""
        if self.measured is None or (self.committed is None and self.bar.promised is None):
            return Verdict.LEFT
        if self.committed is not None and not self._reaches(self.committed, self.spread):
            return Verdict.FELL
        if self.bar.promised is not None and not self._reaches(self.bar.promised, self.spread):
            return Verdict.BROKEN
        exceeds = self.committed is not None and self._reaches(self.committed, -self.spread)
        return Verdict.ROSE if exceeds and self.measured != self.committed else Verdict.HOLDS

    def _reaches(self, base: float, spread: float) -> bool:
        """Whether it is worse than the base by `spread` at most; what is no number is not."""
        assert self.measured is not None
        if self.bar.better == MORE:
            return self.measured >= base * (1 - spread)
        return self.measured <= base * (1 + spread)


def judge(bars: Sequence[Bar], committed: Path, measured: Path) -> list[Judged]:
    """Every bar, in order, by the lines in two folders of results.

    Raises:
        ConfigurationError: a file there cannot be read.
    """
    files = {RUNS[bar.run].file for bar in bars}
    past, now = ({f: read_figures(folder, f) for f in files} for folder in (committed, measured))
    found = []
    for bar in bars:
        file = RUNS[bar.run].file
        was, is_now = (figures[file].get(bar.name) for figures in (past, now))
        spread = max(bar.spread, was.spread if was else 0.0)
        found.append(Judged(bar, _value(was), _value(is_now), spread))
    return found


def table(found: Sequence[Judged]) -> str:
    """Plain text, a line a bar: what it must be, what it is, its spread, the verdict."""
    width = max(len(each.bar.name) for each in found)
    lines = []
    for run, of_run in groupby(found, key=lambda each: each.bar.run):
        lines.append(f"{run:{width + 2}} {'must be':>10} {'measured':>8} {'spread':>6}  verdict")
        for each in of_run:
            base = each.bar.promised if each.committed is None else each.committed
            lines.append(
                f"  {each.bar.name:{width}} {each.bar.better} {_number(base):>7} "
                f"{_number(each.measured):>8} {each.spread:>6.1%}  {each.verdict.value}"
            )
        lines.append("")
    counts = {word: sum(each.verdict is word for each in found) for word in Verdict}
    lines.append(", ".join(f"{n} {word.name.lower()}" for word, n in counts.items() if n))
    return "\n".join(lines)


def _value(figure: Figure | None) -> float | None:
    return None if figure is None else figure.value


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
