"""The scorers that a calibration tried, as a table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tangram.calibrate.budget_search.choice import sealing_rank
from tangram.profile.scorer_choice import PREDICTED_ERROR, ScorerChoice


def print_choice(choice: ScorerChoice, console: Console) -> None:
    """Print what each scorer came to, with its place in the order of sealing cost."""
    table = Table(title=f"Scorers, by {choice.decided_by}")
    table.add_column("scorer")
    ratios = list(choice.tried[choice.winner])
    for ratio in ratios:
        table.add_column(f"ratio {ratio:g}", justify="right")
    table.add_column("cost of sealing", justify="right")
    cheapest = sorted(choice.tried, key=sealing_rank)
    for name, found in choice.tried.items():
        cells = [f"{found[ratio]:.4g}" if ratio in found else "" for ratio in ratios]
        place = f"{cheapest.index(name) + 1} of {len(cheapest)}"
        taken = name == choice.winner
        table.add_row(Text(name), *cells, place, style="bold" if taken else None)
    console.print(table)
    why = "budgets are not measured, so the predicted error decided" * (
        choice.decided_by == PREDICTED_ERROR
    )
    said = f"scorer {choice.winner} is taken" + (f": {why}" if why else "")
    console.print(said, highlight=False, markup=False, soft_wrap=True)
