"""What to know before serving with a profile, in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tangram.profile import Profile
from tangram.version import VERSION

FEW_SAMPLES = 10
LOW_RANK_MEAN, LOW_RANK = 0.8, 0.7
"""Spearman correlations below which the ranking of heads is said to depend on the input."""
MUCH_SHORT = 0.1
"""Part of what a sample would keep that lies beyond static budgets, above which that is said."""


def cautions(profile: Profile, data: Mapping[str, Any], *, scorer_known: bool) -> list[str]:
    """Sentences about what may be wrong; empty when nothing is.

    Args:
        profile: what the page is about.
        data: the rest of the page's contents.
        scorer_known: whether the profile's scorer is installed here.
    """
    found = [*_samples(profile, data), *_stability(data), *_overflow(data)]
    if profile.model.config_sha256 is None:
        found.append(
            "The profile does not know the model's config: it is compared with a served model by "
            "its sizes alone, so make sure yourself that it is the same network."
        )
    if not scorer_known:
        found.append(
            f"The scorer {profile.scorer_name} is not installed here: memory is counted without "
            "the query ring that it may need."
        )
    if data["page_group_size"] == data["heads"]["kv_heads"] > 1:
        found.append(
            f"A page group holds all {data['page_group_size']} KV heads of a layer, so they share "
            "one budget: a smaller --page-group-size lets heads differ."
        )
    for level, reason in data["missing_levels"].items():
        if level != "measured":
            found.append(f"Budgets of level {level} cannot be had: {reason}.")
        elif "measured" in profile.extra:
            found.append(f"The measured budgets cannot be used: {reason}.")
    if profile.tangram_version != VERSION:
        found.append(
            f"Tangram {profile.tangram_version} wrote the profile, and {VERSION} this page: "
            "calibrate again if a scorer has changed in between."
        )
    return found


def _samples(profile: Profile, data: Mapping[str, Any]) -> list[str]:
    counts = [scope["samples"] for scope in data["scopes"].values()]
    counts += [len(array) for name, array in profile.arrays.items() if name.endswith("_curve")]
    if not counts:
        return ["The profile has no statistics of heads: its only budgets are uniform ones."]
    if min(counts) >= FEW_SAMPLES:
        return []
    return [
        f"Only {min(counts)} sample(s) were calibrated on: spread and rank stability look better "
        f"than they are. Calibrate on {FEW_SAMPLES} or more, better 50."
    ]


def _stability(data: Mapping[str, Any]) -> list[str]:
    ratio, found = data["start"]["ratio"], []
    for name, scope in data["scopes"].items():
        rank = scope["ranks"][ratio]
        if rank["lowest"] is None:
            continue
        if rank["mean"] < LOW_RANK_MEAN or rank["lowest"] < LOW_RANK:
            found.append(
                f"Which heads need much depends on the text here: by {name} thresholds, samples "
                f"rank the heads like their mean with a correlation of {rank['mean']:.2f} on "
                f"average and {rank['lowest']:.2f} at worst. Budgets that are fixed beforehand "
                "suit some texts badly; calibrate on texts like those that will be served."
            )
    return found


def remarks(data: Mapping[str, Any]) -> list[str]:
    """Sentences that say how to read a figure which looks like a caution and is none.

    Args:
        data: the rest of the page's contents.
    """
    found = list(map(_noise, (each for each in data["measured"] if each["within_noise"])))
    level, ratio = data["start"]["level"], data["start"]["ratio"]
    scope = next(iter(data["scopes"]), None)
    if scope is None or level in data["scopes"]:
        return found
    part = _beyond(data, scope, level)
    return [
        *found,
        f"At ratio {data['ratios'][ratio]:g}, {part:.0%} of what a sample's own {scope} threshold "
        f"would keep lies beyond the {level} budgets, which do not follow thresholds: this tells "
        "how the two differ, not what is lost.",
    ]


def _noise(entry: Mapping[str, Any]) -> str:
    count = entry["check_samples"]
    on = f"the {count} samples" if count else "the samples"
    return (
        f"At ratio {entry['ratio']:g}, {on} that had the last word cannot tell what was taken from "
        f"{', '.join(entry['within_noise'])}: they differ by less than two standard errors. More "
        "samples would."
    )


def _overflow(data: Mapping[str, Any]) -> list[str]:
    ratio, found = data["start"]["ratio"], []
    for name, scope in data["scopes"].items():
        if name not in scope["overflow"]:
            continue
        part = _beyond(data, name, name)
        if part > MUCH_SHORT:
            found.append(
                f"Many heads overflow: at ratio {data['ratios'][ratio]:g}, {part:.0%} of what a "
                f"sample's own {name} threshold would keep lies beyond the fixed budgets of that "
                "level."
            )
    return found


def _beyond(data: Mapping[str, Any], scope: str, level: str) -> float:
    """Mean over samples of the part beyond the budgets, at the ratio that the page opens with."""
    short = data["scopes"][scope]["overflow"][level][data["start"]["ratio"]]["short"]
    return sum(short) / len(short) / data["steps"]
