"""What every allocation rule is asked: sizes, the ratio, and the profile."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tangram.errors import BudgetError, ProfileMismatchError
from tangram.profile import Profile


def floor_pages(n_sink_tokens: int, page_size_rows: int) -> int:
    """Pages below which no group may fall: they hold the sinks, and one row at least."""
    return -(-max(n_sink_tokens, 1) // page_size_rows)


@dataclass(frozen=True, kw_only=True)
class BudgetProblem:
    """One question to an allocation rule; see `tangram.budgets.allocate` for the fields.

    Raises:
        BudgetError: sizes or a ratio for which no budgets exist; names the option.
        ProfileMismatchError: the profile has other layers or heads.
    """

    level: str
    num_layers: int
    num_kv_heads: int
    ratio: float
    chunk_size_tokens: int
    page_size_rows: int
    page_group_size: int
    n_sink_tokens: int
    profile: Profile | None = None
    alpha: float = 2.0

    def __post_init__(self) -> None:
        if min(self.num_layers, self.num_kv_heads, self.page_size_rows) < 1:
            raise BudgetError(
                f"budgets need at least one layer, KV head and row of a page, got "
                f"{self.num_layers}, {self.num_kv_heads} and {self.page_size_rows}"
            )
        if self.page_group_size < 1 or self.num_kv_heads % self.page_group_size:
            raise BudgetError(
                f"--page-group-size {self.page_group_size} does not divide the "
                f"{self.num_kv_heads} KV heads of a layer: choose a divisor"
            )
        if self.chunk_size_tokens < 1 or self.chunk_size_tokens % self.page_size_rows:
            raise BudgetError(
                f"--compression-chunk-size {self.chunk_size_tokens} is not a positive multiple of "
                f"the {self.page_size_rows} rows of a page"
            )
        if not 0 <= self.n_sink_tokens <= self.chunk_size_tokens:
            raise BudgetError(
                f"--compression-n-sink-tokens {self.n_sink_tokens} must lie between 0 and the "
                f"chunk's {self.chunk_size_tokens} tokens"
            )
        if not 0 < self.ratio <= 1:
            raise BudgetError(f"--compression-ratio {self.ratio} must lie in (0, 1]")
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise BudgetError(f"alpha {self.alpha} must be a number, at least 0")
        if self.total_pages < self.floor_pages * self.num_groups:
            # Rounded up: the printed number itself is to work.
            smallest = math.ceil(self.floor_pages / self.max_pages * 1e6) / 1e6
            raise BudgetError(
                f"--compression-ratio {self.ratio} is too low: every head keeps at least "
                f"{self.floor_pages} page(s) of {self.page_size_rows} rows of each chunk of "
                f"{self.chunk_size_tokens} tokens; the smallest ratio that works is {smallest:g}, "
                "or choose a larger --compression-chunk-size"
            )
        if self.profile is not None:
            model = self.profile.model
            if (model.num_layers, model.num_kv_heads) != (self.num_layers, self.num_kv_heads):
                raise ProfileMismatchError(
                    f"the profile has {model.num_layers} layers of {model.num_kv_heads} KV heads, "
                    f"the server has {self.num_layers} of {self.num_kv_heads}: give the "
                    "--compression-profile of this model, or none"
                )

    @property
    def max_pages(self) -> int:
        """Pages that hold a whole chunk of one group."""
        return self.chunk_size_tokens // self.page_size_rows

    @property
    def floor_pages(self) -> int:
        """Pages below which no group may fall."""
        return floor_pages(self.n_sink_tokens, self.page_size_rows)

    @property
    def groups_per_layer(self) -> int:
        """Head groups of a layer."""
        return self.num_kv_heads // self.page_group_size

    @property
    def num_groups(self) -> int:
        """Head groups of the model."""
        return self.num_layers * self.groups_per_layer

    @property
    def total_pages(self) -> int:
        """Pages of all groups together: exactly this many are spent."""
        return round(self.ratio * (self.max_pages * self.num_groups))

    def layer_totals(self) -> np.ndarray:
        """[layers] int64, pages of each layer where every layer gets the same.

        What does not divide goes, one page each, to the layers that come first in `spread_order`.
        """
        each, rest = divmod(self.total_pages, self.num_layers)
        totals = np.full(self.num_layers, each, dtype=np.int64)
        totals[spread_order(self.num_layers)[:rest]] += 1
        return totals

    def needed_profile(self) -> Profile:
        """The profile.

        Raises:
            BudgetError: there is none.
        """
        if self.profile is None:
            raise BudgetError(
                f"--compression-level {self.level} needs statistics: give a --compression-profile, "
                "or choose --compression-level uniform"
            )
        return self.profile


def spread_order(count: int) -> np.ndarray:
    """[count] int64, an order of 0 .. count-1 whose every beginning is spread evenly.

    Multiples of the golden ratio's fraction, sorted: a longer beginning contains the shorter
    ones, so a larger total never takes a page away from anyone.
    """
    golden = (math.sqrt(5) - 1) / 2
    return np.argsort((np.arange(count) * golden) % 1.0, kind="stable")
