"""Scorers: which tokens of a chunk are worth keeping. The registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module, metadata
from typing import Any

from tangram.errors import ScorerError
from tangram.scorers.base import (
    Chunks,
    Scorer,
    attention_over_chunk,
    checked_scores,
    group_query_heads,
    list_parameters,
    scorer_title,
)
from tangram.scorers.select import score_ranks, top_rows

__all__ = [
    "AUTO_SCORER",
    "AUTO_SCORERS",
    "ENTRY_POINT_GROUP",
    "SEALING_ORDER",
    "UNCALIBRATED_SCORER",
    "Chunks",
    "Scorer",
    "attention_over_chunk",
    "checked_scores",
    "get_scorer",
    "group_query_heads",
    "is_auto",
    "list_parameters",
    "registered_name",
    "score_ranks",
    "scorer_names",
    "scorer_title",
    "top_rows",
    "with_weights",
]

AUTO_SCORER = "auto"
"""Stands for the scorer of the profile, which calibration chose among `AUTO_SCORERS`."""
AUTO_SCORERS = ("learned", "expected_attention", "key_diff")
"""What calibration tries where it is to choose, the most promising first."""
UNCALIBRATED_SCORER = "key_diff"
"""What `auto` stands for where there is no profile: it needs no statistics."""
SEALING_ORDER = (
    "streaming_llm", "fastkvzip", "kvzap", "key_norm", "key_diff", "learned", "tova", "snap_kv",
    "expected_attention",
)  # fmt: skip
"""The built-in scorers, the cheapest to seal first.

Source: docs/performance.md, Sealing. Those that are not in its table stand where their work puts
them: gates' scores are read; `learned` reads keys as KeyDiff does and values too.
"""
ENTRY_POINT_GROUP = "tangram.scorers"

# Name, which is that of the file in this folder too, and class.
_BUILT_IN = {
    "streaming_llm": "StreamingLLM",
    "key_norm": "KeyNorm",
    "key_diff": "KeyDiff",
    "expected_attention": "ExpectedAttention",
    "learned": "Learned",
    "snap_kv": "SnapKV",
    "tova": "Tova",
    "fastkvzip": "FastKVzip",
    "kvzap": "KVzap",
}


def scorer_names(third_party: bool = True) -> tuple[str, ...]:
    """Names of all scorers: the built-in ones, then those of installed packages by name.

    Args:
        third_party: whether to look for installed packages.

    Raises:
        ScorerError: two packages, or a package and this one, give the same name.
    """
    return (*_BUILT_IN, *sorted(_third_party())) if third_party else tuple(_BUILT_IN)


def is_auto(name: object) -> bool:
    """Whether the name, in any spelling, is no scorer's but leaves the choice to calibration."""
    return _spelling(str(name)) == AUTO_SCORER


def registered_name(name: str) -> str:
    """The name as the registry spells it, or `AUTO_SCORER`.

    Raises:
        ScorerError: an unknown name.
    """
    return AUTO_SCORER if is_auto(name) else _scorer_class(with_weights(name, {})[0]).name


def get_scorer(name: str, /, **parameters: Any) -> Scorer:
    """The scorer of that name.

    Args:
        name: as in `scorer_names()`; case, hyphens and underscores do not count. After a colon
            may stand the parameter `weights`, a file.
        **parameters: fields of the scorer that are not to have their defaults.

    Raises:
        ScorerError: an unknown name or parameter, a bad value, or a package whose scorer cannot
            be used.
    """
    name, parameters = with_weights(name, parameters)
    cls = _scorer_class(name)
    known = [f.name for f in fields(cls) if f.init]
    unknown = [parameter for parameter in parameters if parameter not in known]
    takes = ", ".join(known) or "none"
    if unknown:
        raise ScorerError(
            f"--compression-scorer-parameters: {cls.name} has no parameter {', '.join(unknown)}: "
            f"it takes {takes}"
        )
    try:
        return cls(**parameters)
    except (TypeError, ValueError) as error:  # a package's scorer may raise what it likes
        raise ScorerError(
            f"--compression-scorer-parameters: {error} ({cls.name} takes {takes})"
        ) from error


def with_weights(name: str, parameters: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """`name:FILE` in its two parts: the name alone, and the parameters with the file as `weights`.

    Raises:
        ScorerError: the parameters name another file.
    """
    alone, colon, weights = str(name).partition(":")
    if not colon:
        return name, dict(parameters)
    if parameters.get("weights", weights) != weights:
        raise ScorerError(
            f"--compression-scorer is {name} and --compression-scorer-parameters has the weights "
            f"{parameters['weights']!r}: give one of the two"
        )
    return alone, {**parameters, "weights": weights}


def _spelling(name: str) -> str:
    """What counts of a name: `KeyDiff`, `key-diff`, `keydiff` and `key_diff` are one."""
    return name.strip().lower().replace("-", "").replace("_", "")


def _scorer_class(name: str) -> type[Scorer]:
    asked = _spelling(str(name))
    for built_in, class_name in _BUILT_IN.items():
        if _spelling(built_in) == asked:
            cls: type[Scorer] = getattr(import_module(f"{__name__}.{built_in}"), class_name)
            return cls
    for entry_point in _third_party().values():
        if _spelling(entry_point.name) == asked:
            return _load(entry_point)
    raise ScorerError(
        f"unknown --compression-scorer {name!r}: choose one of {', '.join(scorer_names())}"
    )


def _third_party() -> dict[str, metadata.EntryPoint]:
    """Entry points of installed packages by name, not loaded yet."""
    taken = {_spelling(name): "tangram itself" for name in (*_BUILT_IN, AUTO_SCORER)}
    found: dict[str, metadata.EntryPoint] = {}
    for entry_point in metadata.entry_points(group=ENTRY_POINT_GROUP):
        if entry_point in found.values():  # a package that is found on two paths
            continue
        owner = taken.get(_spelling(entry_point.name))
        if owner is not None:
            raise ScorerError(
                f"the scorer name {entry_point.name!r} of {_owner(entry_point)} is taken by "
                f"{owner}: rename the entry point of group {ENTRY_POINT_GROUP}, or uninstall "
                "one of the two"
            )
        taken[_spelling(entry_point.name)] = _owner(entry_point)
        found[entry_point.name] = entry_point
    return found


def _owner(entry_point: metadata.EntryPoint) -> str:
    package = f"package {entry_point.dist.name}, " if entry_point.dist else ""
    return f"{package}{entry_point.value}"


def _load(entry_point: metadata.EntryPoint) -> type[Scorer]:
    what = f"the scorer {entry_point.name!r} of {_owner(entry_point)}"
    try:
        cls = entry_point.load()
    except Exception as error:
        raise ScorerError(
            f"{what} cannot be loaded ({type(error).__name__}: {error}): mend or uninstall the "
            "package, or choose another --compression-scorer"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Scorer)):
        raise ScorerError(f"{what} is {cls!r}, expected a subclass of tangram.scorers.Scorer")
    if getattr(cls, "name", None) != entry_point.name:
        raise ScorerError(
            f"{what} calls itself {getattr(cls, 'name', None)!r}, expected the name of its "
            "entry point: profiles are stored under it"
        )
    return cls
