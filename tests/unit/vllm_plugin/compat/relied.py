"""What of vLLM the plugin's sources name, read off their syntax trees.

A syntax tree has no types. So an attribute counts as vLLM's unless its name is one of our own or of
an object from elsewhere; and even then if a class of vLLM that a hook names has such a member.
`REVIEWED` lists the names of which that is known to be wrong.
"""

from __future__ import annotations

import argparse
import ast
import dis
import hashlib
import inspect
import logging
import pathlib
import subprocess
import types
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy
import prometheus_client
import pydantic
import torch

from tangram.vllm_plugin.compat.hook import Hook, find, members

OTHERS: tuple[Any, ...] = (
    str, dict, list, set, tuple, deque, int, float, type, memoryview, BaseException, property,
    types.CodeType, types.FunctionType, inspect.Signature, inspect.BoundArguments, pathlib.Path,
    argparse.ArgumentParser, subprocess.Popen, logging.Logger, dis.Instruction,
    zipfile.ZipFile, hashlib.sha256(),
    torch.Tensor, torch.Generator, torch.nn.Module, torch.cuda.Event, torch.cuda.Stream,
    torch.library.Library,
    numpy.ndarray,
    pydantic.TypeAdapter, pydantic.ValidationError, prometheus_client.Gauge,
    prometheus_client.Counter, prometheus_client.REGISTRY,
)  # fmt: skip
"""Objects that are read beside vLLM's."""

REVIEWED = {
    "_backend": "of our caches, never of a mixin of vLLM's LLM",
    "_fields": "of our named tuples",
    "_replace": "of our named tuples",
    "add": "of sets",
    "block_table": "of our metadata",
    "clone": "of tensors",
    "cpu": "of tensors",
    "default": "of the fields of a dataclass",
    "device": "of tensors and of our kernels",
    "free": "of our counts",
    "getattr(EngineArgs, field.name, None)": "every field of vLLM's, whichever there are",
    "getattr(args, name, None)": "names are literals, and in the hook `arguments of calibration`",
    "getattr(counts.drift, field)": "a field of ours",
    "getattr(served, name)": "names are literals beside it, and in the hooks of specs",
    "getattr(spec, field.name)": "every field of vLLM's, whichever there are",
    "hasattr(owner, n)": "the check of a hook",
    "inspect.getattr_static(owner, name, None)": "of an override, whose callers name it",
    "tangram_gate": "ours, put into a module of vLLM's",
    "setattr(owner, name, kind(wrapped))": "of an override, whose callers name it",
    "kv_cache_scheme": "of a quantisation's configuration, where it has it",
    "multi_processor_count": "of torch's device properties",
    "name": "of fields and of our scorers",
    "overridden_by_tangram": "our mark on a function",
    "runner": "of our sealed cache",
}
"""Names that are no hook's, and whose they are."""


class Use(NamedTuple):
    """A name that sources take to be vLLM's, a place as `module:attribute` where it is known."""

    file: str
    line: int
    name: str


class Sources:
    """Files that touch vLLM: their text by their names."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.trees = {file: ast.parse(text) for file, text in texts.items()}
        self.classes = {
            node.name: (file, node)
            for file, tree in self.trees.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
        }

    @cached_property
    def imported(self) -> dict[str, dict[str, str]]:
        """By file, whose a name is: `module:attribute` or `module`."""
        names: dict[str, dict[str, str]] = {file: {} for file in self.trees}
        for file, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom):
                    for alias in node.names:
                        place = f"{node.module}:{alias.name}"
                        if isinstance(_found(place) if _is_vllm(place) else None, types.ModuleType):
                            place = place.replace(":", ".")
                        names[file][alias.asname or alias.name] = place
                elif isinstance(node, ast.Import):
                    for alias in node.names:
                        place = alias.name if alias.asname else alias.name.split(".")[0]
                        names[file][alias.asname or place] = place
        return names

    def place(self, file: str, node: ast.expr) -> str:
        """Where an expression's value was imported from, if it is no more than that."""
        if isinstance(node, ast.Subscript):
            return self.place(file, node.value)
        if isinstance(node, ast.Attribute):
            before = self.place(file, node.value)
            return before and f"{before}{'.' if ':' in before else ':'}{node.attr}"
        return self.imported[file].get(node.id, "") if isinstance(node, ast.Name) else ""

    def imports(self) -> Iterator[Use]:
        """Every name that is imported from vLLM, and every one read of what is."""
        for file, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and _is_vllm(node.module or ""):
                    for alias in node.names:
                        yield Use(file, node.lineno, f"{node.module}:{alias.name}")
                elif isinstance(node, ast.Import):
                    for alias in node.names:
                        if _is_vllm(alias.name) and "." in alias.name:
                            yield Use(file, node.lineno, alias.name)
                elif isinstance(node, ast.Attribute) and not _is_dunder(node.attr):
                    if _is_vllm(place := self.place(file, node)):
                        yield Use(file, node.lineno, place)

    def subclassed(self) -> dict[str, set[str]]:
        """By class of ours, the classes of vLLM under it; ours without any are left out."""
        found = {name: self._vllm_bases(name) for name in self.classes}
        return {name: bases for name, bases in found.items() if bases}

    def _vllm_bases(self, name: str) -> set[str]:
        file, node = self.classes[name]
        found: set[str] = set()
        for base in node.bases:
            if _is_vllm(place := self.place(file, base)):
                found.add(place)
            elif (ours := self._ours(file, base)) is not None:
                found |= self._vllm_bases(ours)
        return found

    def _ours(self, file: str, base: ast.expr) -> str | None:
        """The class of ours that a base is, if any."""
        place = self.place(file, base)
        name = place.rpartition(":")[2] or ast.unparse(base)
        return name if name in self.classes and not _is_vllm(place) else None

    def _defined(self, name: str) -> Iterator[tuple[str, int, str]]:
        """What a class of ours and those of ours under it define and set: file, line, name."""
        file, node = self.classes[name]
        for line, defined in _class_names(node):
            yield file, line, defined
        for base in node.bases:
            if (ours := self._ours(file, base)) is not None:
                yield from self._defined(ours)

    def overrides(self) -> Iterator[Use]:
        """What our classes define under a name that a class of vLLM under them has."""
        for name, bases in self.subclassed().items():
            for file, line, defined in self._defined(name):
                for base in bases:
                    if defined in vllm_members(find(base)):
                        yield Use(file, line, f"{base}.{defined}")
        for file, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "override":
                    owner, name = node.args[:2]
                    assert isinstance(name, ast.Constant)
                    place = self.place(file, owner)
                    if _is_vllm(place):
                        yield Use(file, node.lineno, f"{place}.{name.value}")
                    else:
                        yield Use(file, node.lineno, str(name.value))

    def attributes(self) -> Iterator[Use]:
        """Every attribute that is read or set of what was not imported, but dunders."""
        for file, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and not _is_dunder(node.attr):
                    place = self.place(file, node)
                    if not place or place.startswith("tangram."):
                        yield Use(file, node.lineno, node.attr)
                elif isinstance(node, ast.Call):
                    called = ast.unparse(node.func)
                    if called in {"getattr", "hasattr", "setattr", "inspect.getattr_static"}:
                        yield from _named_attribute(file, node)


def _named_attribute(file: str, call: ast.Call) -> Iterator[Use]:
    name = call.args[1]
    if not isinstance(name, ast.Constant):
        yield Use(file, call.lineno, ast.unparse(call))
    elif not _is_dunder(name.value):
        yield Use(file, call.lineno, name.value)


def _is_dunder(name: str) -> bool:
    return name.startswith("__")


def _is_vllm(place: str) -> bool:
    return place.replace(":", ".").split(".")[0] == "vllm"


@cache
def _found(place: str) -> Any:
    try:
        return find(place)
    except (AttributeError, ImportError):  # what only instances have, or only some builds
        return None


def _class(place: str) -> type | None:
    found = _found(place)
    return found if isinstance(found, type) else None


def _body_names(node: ast.Module | ast.ClassDef) -> Iterator[tuple[int, str]]:
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            yield statement.lineno, statement.name
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target in targets:
                for inner in ast.walk(target):
                    if isinstance(inner, ast.Name):
                        yield statement.lineno, inner.id


def _class_names(node: ast.ClassDef) -> Iterator[tuple[int, str]]:
    yield from _body_names(node)
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
            if ast.unparse(inner.value) == "self":
                yield inner.lineno, inner.attr


def own_names(texts: Iterable[str]) -> set[str]:
    """Names that sources define as attributes: of modules, of classes and of their instances."""
    names: set[str] = set()
    for tree in map(ast.parse, texts):
        names |= {name for _, name in _body_names(tree)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                names |= {name for _, name in _class_names(node)}
    return names


@cache
def vllm_members(cls: type) -> set[str]:
    """Members that a class has from vLLM, and not from a class of others under it."""
    others = {n for base in cls.__mro__ if not _is_vllm(base.__module__) for n in dir(base)}
    dunders = {n for base in cls.__mro__ if _is_vllm(base.__module__) for n in vars(base)}
    return {n for n in members(cls) - others if not _is_dunder(n)} | ({"__init__"} & dunders)


def _fields(node: type[ast.AST]) -> Iterator[str]:
    """Fields of a kind of syntax tree and of the kinds under it."""
    yield from node._fields
    for kind in node.__subclasses__():
        yield from _fields(kind)


class Coverage:
    """The places that hooks check."""

    def __init__(self, hooks: Iterable[Hook], ours: set[str]) -> None:
        self.places = set().union(*(hook.covered for hook in hooks))
        self.names = {name for p in self.places for name in p.partition(":")[2].split(".")}
        elsewhere = {name for other in OTHERS for name in dir(other)} | {
            *(field for node in ast.AST.__subclasses__() for field in _fields(node)),
        }
        self._harmless = (ours | elsewhere) - self._of_vllm_classes() | set(REVIEWED)

    def _of_vllm_classes(self) -> set[str]:
        return {name for cls in map(_class, self.places) if cls for name in vllm_members(cls)}

    def has_place(self, place: str) -> bool:
        """Whether a hook checks the place, or the same member where the class has it from."""
        if place in self.places or ":" not in place:
            return place in self.places | self.names
        owner, _, name = place.rpartition(".")
        cls = _class(owner) if ":" in owner else None
        same = (place[: -len(name) - 1] for place in self.places if place.endswith(f".{name}"))
        return cls is not None and not {_class(other) for other in same}.isdisjoint(cls.__mro__)

    def has_name(self, name: str) -> bool:
        """Whether a hook checks a member of that name, or it is none of vLLM's."""
        return name in self.names or name in self._harmless


def not_covered(sources: Sources, coverage: Coverage) -> list[str]:
    """What is relied on and no hook's, as `file:line: name`."""
    found = {use for uses in (sources.imports(), sources.overrides()) for use in uses
             if not coverage.has_place(use.name)}  # fmt: skip
    found |= {use for use in sources.attributes() if not coverage.has_name(use.name)}
    return [f"{use.file}:{use.line}: {use.name}" for use in sorted(found)]
