"""What was reviewed of every supported release of vLLM: its relied-on places and their members.

One file a release, which `python -m tangram.vllm_plugin.compat.release WHEEL --renew` writes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tangram.vllm_plugin.compat.version import SUPPORTED_RELEASES

FOLDER = Path(__file__).with_name("releases")


@dataclass(frozen=True)
class Place:
    """What lies at a place of vLLM.

    Attributes:
        at: where it is defined, as `module:attribute`; elsewhere if it is imported or inherited.
        takes: a function's parameters, with their defaults.
        body: a hash of a function's code.
    """

    at: str
    takes: tuple[str, ...] = ()
    body: str = ""


@dataclass(frozen=True)
class Release:
    """What a release has of all that is relied on.

    Attributes:
        version: the release.
        places: by `module:attribute`; None where its files have nothing.
        members: own members of every class of vLLM under a class of ours, by where it is defined.
    """

    version: str
    places: dict[str, Place | None]
    members: dict[str, frozenset[str]]

    @property
    def text(self) -> str:
        """As its file has it."""
        places = {where: place and _brief(where, place) for where, place in self.places.items()}
        members = {cls: " ".join(sorted(names)) for cls, names in self.members.items()}
        content = {"version": self.version, "places": places, "members": members}
        return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _brief(where: str, place: Place) -> dict[str, str]:
    known = {"at": place.at if place.at != where else "", "body": place.body}
    known["takes"] = "; ".join(place.takes)
    return {name: value for name, value in known.items() if value}


def _place(where: str, at: str = "", takes: str = "", body: str = "") -> Place:
    return Place(at or where, tuple(takes.split("; ")) if takes else (), body)


def file_of(version: str) -> Path:
    """Where the review of a release is kept."""
    return FOLDER / f"{'.'.join(version.split('.')[:2])}.json"


@cache
def reviewed() -> dict[str, Release]:
    """The supported releases as they were reviewed, oldest first."""
    return {release: _load(file_of(release)) for release in SUPPORTED_RELEASES}


def _load(file: Path) -> Release:
    content = json.loads(file.read_text())
    return Release(
        version=content["version"],
        places={
            where: None if place is None else _place(where, **place)
            for where, place in content["places"].items()
        },
        members={cls: frozenset(names.split()) for cls, names in content["members"].items()},
    )
