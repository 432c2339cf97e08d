"""What a hook of vLLM is made of, and the kinds of checks that hooks have.

vLLM's attributes are looked up by name inside the checks, so that one which is gone is a finding.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, util
from pathlib import Path
from types import CodeType
from typing import Any

Difference = Callable[[], str | None]


@dataclass(frozen=True)
class HookResult:
    """What the check of one hook found; `difference` is None when all is as expected."""

    name: str
    where: str
    reason: str
    difference: str | None

    @property
    def ok(self) -> bool:
        """Whether the hook is as the plugin expects it."""
        return self.difference is None


@dataclass(frozen=True)
class Hook:
    """One thing of vLLM that the plugin relies on.

    Attributes:
        name: what it is, in a few words.
        where: `module:attribute` in vLLM, or a module.
        reason: what the plugin needs it for.
        upstream: the change of vLLM that would remove the need, or that is to be watched.
        until: when the hook can go.
        difference: returns what differs from the expected, or None; whatever it raises counts as
            a difference too.
        names: members of `where` that the check looks for.
        parameters: of the function at `where`.
        callee: a name that the function's code refers to.
        before: where supported releases had it before; looked at if there is nothing at `where`.
    """

    name: str
    where: str
    reason: str
    upstream: str
    until: str
    difference: Difference
    names: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    callee: str = ""
    before: str = ""

    @property
    def covered(self) -> frozenset[str]:
        """Every place that the check looks for and passes, as `module:attribute`."""
        places: set[str] = set()
        for where in filter(None, (self.where, self.before)):
            module, _, attributes = where.partition(":")
            parts = attributes.split(".") if attributes else []
            owner = f"{where}." if parts else f"{module}:"
            passed = (".".join(parts[: end + 1]) for end in range(len(parts)))
            places |= {where, *(f"{module}:{p}" for p in passed), *(owner + n for n in self.names)}
        return frozenset(places)

    def check(self) -> HookResult:
        """Look at vLLM in this process; a hook that is gone is a result, not an error."""
        try:
            difference = self.difference()
        except Exception as error:
            difference = f"{type(error).__name__}: {error}"
        return HookResult(self.name, self.where, self.reason, difference)


def find(where: str) -> Any:
    """What lies at `module:attribute`, or the module."""
    module, _, attributes = where.partition(":")
    return functools.reduce(getattr, filter(None, attributes.split(".")), import_module(module))


def find_moved(where: str, before: str) -> Any:
    """What lies at a place of newer releases, or else where older ones have it."""
    try:
        return find(where)
    except (ImportError, AttributeError):
        if not before:
            raise
    return find(before)


def members(owner: Any, among: frozenset[str] | None = None) -> set[str]:
    """Names that can be read of a class's instances, or of another object.

    Args:
        owner: of a class also its fields count, and what its methods set.
        among: methods that name none of these are passed over, because reading all takes a while.
    """
    known = set(dir(owner))
    for base in inspect.getmro(owner) if isinstance(owner, type) else ():
        known.update(inspect.get_annotations(base))
        for attribute in vars(base).values():
            function = inspect.unwrap(getattr(attribute, "__func__", attribute))
            for code in _codes(getattr(function, "__code__", None)):
                if among is None or not among.isdisjoint(code.co_names):
                    instructions = dis.get_instructions(code)
                    known.update(i.argval for i in instructions if i.opname == "STORE_ATTR")
    return known


def _codes(code: CodeType | None) -> Iterator[CodeType]:
    if code is not None:
        yield code
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from _codes(constant)


def has(name: str, where: str, reason: str, names: str, *, upstream: str, until: str) -> Hook:
    """A class, module or other object that has these members."""
    wanted = tuple(names.split())

    def difference() -> str | None:
        owner = find(where)
        missing = [n for n in wanted if not hasattr(owner, n)]
        known = members(owner, frozenset(missing)) if missing else ()
        missing = [n for n in missing if n not in known]
        return f"lacks {', '.join(missing)}" if missing else None

    return Hook(name, where, reason, upstream, until, difference, wanted)


def takes(
    name: str,
    where: str,
    reason: str,
    parameters: str,
    *,
    upstream: str,
    until: str,
    before: str = "",
) -> Hook:
    """A callable that has these parameters, whatever else it has."""
    wanted = tuple(parameters.split())

    def difference() -> str | None:
        return _lacking(list(inspect.signature(find_moved(where, before)).parameters), wanted)

    return Hook(name, where, reason, upstream, until, difference, parameters=wanted, before=before)


def takes_by_source(
    name: str, where: str, file: str, reason: str, parameters: str, *, upstream: str, until: str
) -> Hook:
    """A function of a package that not every build can import, read from its file.

    Args:
        name: as of a hook.
        where: as of a hook, `package:function`; the package has it from the file.
        file: of the package, which defines it.
        reason: as of a hook.
        parameters: that it has, whatever else it has.
        upstream: as of a hook.
        until: as of a hook.
    """
    package, _, function = where.partition(":")
    wanted = tuple(parameters.split())

    def difference() -> str | None:
        spec = util.find_spec(package)
        if spec is None or spec.origin is None:
            return f"there is no {package}"
        imports = ast.walk(ast.parse(Path(spec.origin).read_text()))
        names = [a.name for node in imports if isinstance(node, ast.ImportFrom) for a in node.names]
        if function not in names:
            return f"lacks {function}"
        defined = ast.parse(Path(spec.origin).with_name(file).read_text()).body
        for node in defined:
            if isinstance(node, ast.FunctionDef) and node.name == function:
                found = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                return _lacking([argument.arg for argument in found], wanted)
        return f"{file} lacks {function}"

    return Hook(name, where, reason, upstream, until, difference, parameters=wanted)


def _lacking(found: list[str], wanted: tuple[str, ...]) -> str | None:
    missing = [p for p in wanted if p not in found]
    return f"takes ({', '.join(found)}), lacks {', '.join(missing)}" if missing else None


def uses(name: str, where: str, reason: str, callee: str, *, upstream: str, until: str) -> Hook:
    """A function whose code refers to a name: that it calls the piece that the plugin replaces."""

    def difference() -> str | None:
        codes = _codes(inspect.unwrap(find(where)).__code__)
        found = any(callee in code.co_names for code in codes)
        return None if found else f"no longer uses {callee}"

    return Hook(name, where, reason, upstream, until, difference, callee=callee)


def behaves(
    name: str,
    where: str,
    reason: str,
    check: Difference,
    *,
    upstream: str,
    until: str,
    names: str = "",
) -> Hook:
    """Something whose signature says too little: a piece of it is run.

    Args:
        name: as of a hook.
        where: as of a hook.
        reason: as of a hook.
        check: returns what differs, or None.
        upstream: as of a hook.
        until: as of a hook.
        names: members of `where` that the check runs; not every release need have them.
    """

    def difference() -> str | None:
        find(where)
        return check()

    return Hook(name, where, reason, upstream, until, difference, tuple(names.split()))
