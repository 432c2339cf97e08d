"""How a release of vLLM differs, in what is relied on, from one that was reviewed.

    python -m tangram.vllm_plugin.compat.release WHEEL [--against RELEASE_OR_WHEEL] [--renew]

The wheel's Python files are read and never imported, so any release can be looked at from any
environment. What differs is to be reviewed before the release is called supported; `--renew` then
keeps what it has as reviewed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence

from tangram.errors import TangramError
from tangram.vllm_plugin.compat.hook import Hook
from tangram.vllm_plugin.compat.members import SUBCLASSED
from tangram.vllm_plugin.compat.places import PLACES
from tangram.vllm_plugin.compat.reviewed import Place, Release, file_of, reviewed
from tangram.vllm_plugin.compat.sources import (
    Function,
    Sources,
    body_hash,
    names_used,
    own_members,
    parameters,
    signature,
)

KINDS = {
    "gone": "Places that are gone",
    "moved": "Places that moved",
    "takes": "Signatures that differ",
    "calls": "Calls that are no longer made",
    "new": "New members of classes that are subclassed",
    "lost": "Members that these classes lost",
    "body": "Bodies that changed",
}
"""Kinds of differences, and the titles that they are reported under."""


def look_at(sources: Sources, hooks: Iterable[Hook], subclassed: Iterable[str]) -> Release:
    """What a vLLM's files have of the places of hooks and of the classes that are subclassed."""
    places = sorted(set().union(*(hook.covered for hook in hooks)))
    classes = filter(None, map(sources.find, subclassed))
    bases = {base.at: base for cls in classes for base in sources.bases(cls)}
    members = {at: frozenset(own_members(base.node)) for at, base in bases.items()}
    return Release(sources.version, {p: _place(sources, p) for p in places}, members)


def _place(sources: Sources, where: str) -> Place | None:
    found = sources.find(where)
    if found is None:
        return None
    if not isinstance(found.node, Function):
        return Place(found.at)
    return Place(found.at, signature(found.node), body_hash(found.node))


def differences(
    known: Release, found: Release, sources: Sources, hooks: Iterable[Hook]
) -> dict[str, list[str]]:
    """What a release differs in from another, by `KINDS`, a line each.

    Args:
        known: the other release.
        found: this one.
        sources: its files, in which what is gone is looked for.
        hooks: whose places these are.
    """
    told: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for where, was in known.places.items():
        place = found.places.get(where)
        if was is None or _owner_is_gone(where, found):
            continue
        if place is None:
            _tell_gone(told, where, was, sources)
            continue
        if place.at != was.at:
            told["moved"].append(f"{where} is that of {place.at}, was that of {was.at}")
        if place.takes != was.takes:
            told["takes"].append(f"{where}: {_other_parameters(was.takes, place.takes)}")
        if place.body != was.body:
            told["body"].append(where)
    told["new"] += _further_members(known, found)
    told["lost"] += _further_members(found, known)
    for hook in hooks:
        _tell_unmet(told, hook, sources)
    return told


def _further_members(before: Release, after: Release) -> list[str]:
    """Members that only `after` has; a class that only it has is one line."""
    told = []
    for cls, names in sorted(after.members.items()):
        if cls in before.members:
            told += [f"{cls}.{name}" for name in sorted(names - before.members[cls])]
        else:
            told.append(f"{cls}, the whole class")
    return told


def _other_parameters(was: Sequence[str], now: Sequence[str]) -> str:
    new = [parameter for parameter in now if parameter not in was]
    gone = [parameter for parameter in was if parameter not in now]
    parts = [f"takes {', '.join(new)}"] if new else []
    parts += [f"took {', '.join(gone)}"] if gone else []
    return ", ".join(parts) or "takes the same in another order"


def _owner_is_gone(where: str, found: Release) -> bool:
    """Whether a class or module on the way to a place is gone, which is told by itself."""
    owner, _, _ = where.rpartition("." if "." in where.partition(":")[2] else ":")
    return bool(owner) and found.places.get(owner, owner) is None


def _tell_gone(told: dict[str, list[str]], where: str, was: Place, sources: Sources) -> None:
    name = where.partition(":")[2]
    elsewhere = sources.defining(name) if name and "." not in name else []
    if not elsewhere:
        told["gone"].append(where)
        return
    line = f"{where} is defined in {', '.join(elsewhere)}"
    place = _place(sources, f"{elsewhere[0]}:{name}")
    if place and place.takes != was.takes:
        line += f" and {_other_parameters(was.takes, place.takes)}"
    told["moved"].append(line)


def _tell_unmet(told: dict[str, list[str]], hook: Hook, sources: Sources) -> None:
    """What the function of a hook has to take or to call, and does not."""
    found = sources.find(hook.where) or (sources.find(hook.before) if hook.before else None)
    if found is None or not isinstance(found.node, Function):
        return
    if missing := [p for p in hook.parameters if p not in parameters(found.node)]:
        lacking = f"{hook.where} does not take {', '.join(missing)}"
        told["takes"].append(f"{lacking}, which is relied on ({hook.name})")
    if hook.callee and hook.callee not in names_used(found.node):
        told["calls"].append(f"{hook.where} does not use {hook.callee} ({hook.name})")


def report(known: Release, found: Release, told: dict[str, list[str]]) -> str:
    """The differences as text."""
    head = f"vLLM {found.version} against {known.version}, in what is relied on:"
    if not any(told.values()):
        return f"{head} no difference"
    blocks = [
        "\n".join([f"{KINDS[kind]} ({len(lines)})", *(f"  {line}" for line in lines)])
        for kind, lines in told.items()
        if lines
    ]
    return "\n\n".join([head, *blocks])


def nearest(version: str) -> Release:
    """The reviewed release of a version, or else the newest before it, or else the oldest."""
    number = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    known = reviewed()
    older = [r for r in known if tuple(map(int, r.split("."))) <= number]
    return known[older[-1]] if older else next(iter(known.values()))


def _other(named: str, hooks: Iterable[Hook]) -> Release:
    """A reviewed release, or what a wheel has."""
    return reviewed().get(named) or look_at(Sources(named), hooks, SUBCLASSED)


def main(argv: Sequence[str]) -> int:
    """Print how a release differs; 0 if it does not, 1 if it does, 2 for a mistake in `argv`."""
    parser = argparse.ArgumentParser(
        prog="python -m tangram.vllm_plugin.compat.release",
        description="How a release of vLLM differs, in what is relied on, from a reviewed one.",
    )
    parser.add_argument("wheel", help="a wheel of vLLM, or the folder that it was unpacked to")
    parser.add_argument(
        "--against",
        metavar="RELEASE",
        help=f"a reviewed release ({', '.join(reviewed())}) or another wheel; by default the "
        "nearest reviewed one",
    )
    parser.add_argument("--renew", action="store_true", help="keep it as reviewed, print nothing")
    given = vars(parser.parse_args(argv))
    hooks = [hook for places in PLACES.values() for hook in places]
    try:
        sources = Sources(given["wheel"])
        found = look_at(sources, hooks, SUBCLASSED)
        if given["renew"]:
            file_of(found.version).write_text(found.text)
            return 0
        known = _other(given["against"], hooks) if given["against"] else nearest(found.version)
    except TangramError as error:
        print(error, file=sys.stderr)
        return 2
    told = differences(known, found, sources, hooks)
    print(report(known, found, told))
    return int(any(told.values()))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
