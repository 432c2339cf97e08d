"""Budgets that a search found by running the engine, as the profile holds them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from tangram.budgets.grouping import group_by_demand, head_pages
from tangram.budgets.problem import BudgetProblem, floor_pages
from tangram.errors import ProfileError
from tangram.geometry.heads import HeadGroups
from tangram.printable import shown
from tangram.profile import Profile
from tangram.profile.checks import MOST_TOKENS, whole_number

MEASURED = "measured"
"""Name of the level, and key of the profile's `extra` under which the entries lie."""

_REMEDY = "measure them again, or choose another --compression-level"
_SIZES = ("page_group_size", "chunk_size_tokens", "page_size_rows", "n_sink_tokens")


@dataclass(frozen=True, kw_only=True)
class MeasuredEntry:
    """What a search found for one ratio and one set of sizes.

    Attributes:
        ratio: share of the rows that is kept.
        page_group_size: H_p.
        chunk_size_tokens: C.
        page_size_rows: P.
        n_sink_tokens: S.
        window_size_tokens: W, for information: budgets of another window are taken as they are.
        head_groups: the budgets.
        log: how they were found (JSON values).
    """

    ratio: float
    page_group_size: int
    chunk_size_tokens: int
    page_size_rows: int
    n_sink_tokens: int
    window_size_tokens: int
    head_groups: HeadGroups
    log: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[int, ...]:
        """What entries must share to be interpolated: (H_p, C, P, S)."""
        return tuple(getattr(self, name) for name in _SIZES)

    @property
    def shares(self) -> np.ndarray:
        """[layers, kv_heads] float64, share of a chunk that each head keeps."""
        return head_pages(self.head_groups) * (self.page_size_rows / self.chunk_size_tokens)

    def to_json(self) -> dict[str, Any]:
        """A JSON object from which `from_json` makes an equal entry."""
        heads, pages = self.head_groups.to_lists()
        plain = {**asdict(self), "log": dict(self.log), "heads": heads, "pages": pages}
        del plain["head_groups"]
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> MeasuredEntry:
        """The entry that `to_json` described.

        Raises:
            ProfileError, BudgetError, KeyError, TypeError: it is none: a field is missing, of the
                wrong type or out of its range, or the budgets are of other sizes than it says.
        """
        others = {name: value for name, value in plain.items() if name not in ("heads", "pages")}
        groups = HeadGroups.from_lists(
            [[list(map(_index, group)) for group in layer] for layer in plain["heads"]],
            [list(map(_index, layer)) for layer in plain["pages"]],
        )
        entry = cls(head_groups=groups, **others)
        entry._check()
        return entry

    def _check(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, float | int):
            raise ProfileError(f"ratio must be a number, got {shown(self.ratio)}")
        if not 0 < self.ratio <= 1:
            raise ProfileError(f"ratio must lie in (0, 1], got {shown(self.ratio)}")
        chunk = whole_number("chunk_size_tokens", self.chunk_size_tokens, most=MOST_TOKENS)
        rows = whole_number("page_size_rows", self.page_size_rows, most=chunk)
        whole_number("n_sink_tokens", self.n_sink_tokens, least=0, most=chunk)
        whole_number("window_size_tokens", self.window_size_tokens, least=0, most=chunk)
        if chunk % rows:
            raise ProfileError(f"a chunk of {chunk} tokens is no multiple of {rows} rows of a page")
        size = whole_number("page_group_size", self.page_group_size)
        if size != self.head_groups.group_size:
            raise ProfileError(
                f"page_group_size is {size}, and its groups have {self.head_groups.group_size} "
                "heads"
            )
        pages = [count for layer in self.head_groups.pages for count in layer]
        least, most = floor_pages(self.n_sink_tokens, rows), chunk // rows
        if min(pages) < least or max(pages) > most:
            raise ProfileError(
                f"its groups keep {min(pages)} to {max(pages)} pages of a chunk, expected "
                f"{least} to {most}"
            )
        if not isinstance(self.log, Mapping):
            raise ProfileError(f"log must be an object, got {shown(self.log)}")

    def check_total(self) -> None:
        """Return only if the groups keep as many pages as the ratio allows.

        Raises:
            ProfileError: more or fewer.
        """
        pages = [count for layer in self.head_groups.pages for count in layer]
        each = self.chunk_size_tokens // self.page_size_rows
        if sum(pages) != (expected := round(self.ratio * (each * len(pages)))):
            raise ProfileError(
                f"the profile's measured budgets for ratio {self.ratio:g} have {sum(pages)} "
                f"pages, expected {expected}: {_REMEDY}"
            )


def _index(value: object) -> int:
    return whole_number("a head, or a number of pages,", value, least=0, most=MOST_TOKENS)


def measured_entries(profile: Profile) -> list[MeasuredEntry]:
    """What the profile holds, in the order it was measured.

    Raises:
        ProfileError: entries that are none, that do not fit the model or their own ratio and
            sizes, or two for the same ones.
    """
    plain = profile.extra.get(MEASURED, [])
    if not isinstance(plain, list):
        raise ProfileError(
            f"the profile's measured budgets are damaged ({shown(plain)} is no list): {_REMEDY}"
        )
    try:
        entries = [MeasuredEntry.from_json(dict(each)) for each in plain]
    except KeyError as error:
        raise ProfileError(
            f"the profile's measured budgets are damaged (no {error}): {_REMEDY}"
        ) from error
    except (TypeError, ValueError, IndexError) as error:
        raise ProfileError(
            f"the profile's measured budgets are damaged ({error}): {_REMEDY}"
        ) from error
    for entry in entries:
        groups, model = entry.head_groups, profile.model
        if (groups.num_layers, groups.num_kv_heads) != (model.num_layers, model.num_kv_heads):
            raise ProfileError(
                f"the profile's measured budgets are of {groups.num_layers} layers and "
                f"{groups.num_kv_heads} KV heads, the model has {model.num_layers} and "
                f"{model.num_kv_heads}: {_REMEDY}"
            )
        entry.check_total()
    answered = Counter((entry.ratio, entry.sizes) for entry in entries)
    if entries and max(answered.values()) > 1:
        (ratio, _), _ = answered.most_common(1)[0]
        raise ProfileError(
            f"the profile's measured budgets for ratio {ratio:g} are there twice: {_REMEDY}"
        )
    return entries


def with_entry(profile: Profile, entry: MeasuredEntry) -> Profile:
    """The profile with an entry more, in place of the one of the same ratio and sizes."""
    others = [
        old
        for old in measured_entries(profile)
        if (old.ratio, old.sizes) != (entry.ratio, entry.sizes)
    ]
    entries = [each.to_json() for each in (*others, entry)]
    return replace(profile, extra={**profile.extra, MEASURED: entries})


def default_level(profile: Profile | None) -> str:
    """The level that is taken when none is named: the best that the profile allows."""
    if profile is None:
        return "uniform"
    return MEASURED if profile.extra.get(MEASURED, []) != [] else "error"


def measured_budgets(problem: BudgetProblem) -> HeadGroups:
    """What was measured for this question, or what its nearest neighbours suggest.

    Raises:
        ProfileError: nothing was measured for this profile, or its entries are damaged.
    """
    entries = measured_entries(problem.needed_profile())
    if not entries:
        raise ProfileError(
            "level 'measured' needs budgets that a search found, and this profile has none: "
            "calibrate with measuring, or choose another --compression-level"
        )
    asked = tuple(getattr(problem, name) for name in _SIZES)
    for entry in entries:
        if (entry.ratio, entry.sizes) == (problem.ratio, asked):
            return entry.head_groups
    alike = _nearest_sizes(entries, asked)
    nearest = min(alike, key=lambda entry: abs(math.log(entry.ratio / problem.ratio)))
    return group_by_demand(problem, _shares_at(problem.ratio, alike), _group_order(nearest))


def interpolation(profile: Profile, ratio: float, sizes: tuple[int, ...]) -> str:
    """What level `measured` interpolates for a question that was not measured itself, in words.

    Args:
        profile: with measured budgets.
        ratio: share of the rows that is kept.
        sizes: (H_p, C, P, S).

    Returns:
        "interpolated: measured at ratios ..."; "" where it was measured, and where all is kept.
    """
    entries = measured_entries(profile)
    if not entries or ratio == 1 or (ratio, sizes) in {(e.ratio, e.sizes) for e in entries}:
        return ""
    alike = _nearest_sizes(entries, sizes)
    ratios = ", ".join(f"{entry.ratio:g}" for entry in alike)
    found = f"interpolated: measured at ratio{'s' * (len(alike) > 1)} {ratios}"
    if alike[0].sizes != sizes:
        first = alike[0]
        found += (
            f" in chunks of {first.chunk_size_tokens} with {first.page_group_size} heads a page "
            f"and {first.n_sink_tokens} sinks"
        )
    return found


def _nearest_sizes(entries: list[MeasuredEntry], asked: tuple[int, ...]) -> list[MeasuredEntry]:
    """Those of the sizes that are nearest, by rising ratio."""
    family = min((entry.sizes for entry in entries), key=lambda sizes: _distance(sizes, asked))
    return sorted((e for e in entries if e.sizes == family), key=lambda entry: entry.ratio)


def _distance(sizes: tuple[int, ...], asked: tuple[int, ...]) -> tuple[float, ...]:
    """How far measured sizes are from those asked for; H_p counts first, then C."""
    return tuple(
        abs(math.log((have + 1) / (want + 1))) for have, want in zip(sizes, asked, strict=True)
    )


def _shares_at(ratio: float, entries: list[MeasuredEntry]) -> np.ndarray:
    """[layers, kv_heads]: shares at a ratio between those of the entries, all of the same sizes.

    Linear in the ratio, so that the sum is right; at ratio 0 they are 0 and at ratio 1 all are 1.
    """
    grid = [0.0, *(entry.ratio for entry in entries)]
    known = [np.zeros_like(entries[0].shares), *(entry.shares for entry in entries)]
    if grid[-1] < 1:
        grid.append(1.0)
        known.append(np.ones_like(known[0]))
    right = max(1, int(np.searchsorted(grid, ratio)))
    weight = (ratio - grid[right - 1]) / (grid[right] - grid[right - 1])
    return (1 - weight) * known[right - 1] + weight * known[right]


def _group_order(entry: MeasuredEntry) -> np.ndarray:
    """[layers, kv_heads], falls from group to group: keeps heads of equal shares together."""
    order = HeadGroups(
        heads=entry.head_groups.heads,
        pages=tuple(
            tuple(len(pages) - group for group in range(len(pages)))
            for pages in entry.head_groups.pages
        ),
    )
    return head_pages(order)
