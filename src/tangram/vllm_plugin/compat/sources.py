"""The Python files of a vLLM that is not imported: what lies where, read off syntax trees."""

from __future__ import annotations

import ast
import hashlib
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from tangram.errors import ConfigurationError

Function = ast.FunctionDef | ast.AsyncFunctionDef
PACKAGE = "vllm"


@dataclass(frozen=True, eq=False)
class Found:
    """Where a name is defined, and what defines it: a function, a class, an assignment, a file."""

    module: str
    names: tuple[str, ...]
    node: ast.AST

    @property
    def at(self) -> str:
        """As `module:attribute`, or the module."""
        return f"{self.module}:{'.'.join(self.names)}" if self.names else self.module


class Sources:
    """The Python files of one vLLM.

    Args:
        path: a wheel, or a folder that a wheel was unpacked or installed to, or `vllm` in it.

    Raises:
        ConfigurationError: the path holds no vLLM.
    """

    def __init__(self, path: str | Path) -> None:
        self._texts = dict(_read(Path(path)))
        if f"{PACKAGE}.__init__" not in self._texts:
            raise ConfigurationError(
                f"{path}: expected a wheel of vLLM or the folder that holds its package, found no "
                f"{PACKAGE}/__init__.py; `pip download vllm==VERSION --no-deps` fetches a wheel"
            )
        self.find = cache(self._find)
        self._tree = cache(lambda module: ast.parse(self._text(module) or ""))
        self._names = cache(lambda module: dict(_bindings(self._tree(module).body)))

    @cached_property
    def version(self) -> str:
        """Its version, as its files have it."""
        found = self.find(f"{PACKAGE}._version:__version__")
        value = getattr(found.node, "value", None) if found else None
        return str(value.value) if isinstance(value, ast.Constant) else "unknown"

    def _find(self, where: str) -> Found | None:
        """What lies at `module:attribute`, or the module; None if nothing does."""
        module, _, attributes = where.partition(":")
        found = self._module(module)
        for name in filter(None, attributes.split(".")):
            found = found and self._member(found, name)
        return found

    def defining(self, name: str) -> list[str]:
        """Modules that define a function or a class of this name at their top."""
        texts = {m: text for m, text in self._texts.items() if name in text}
        modules = (module.removesuffix(".__init__") for module in sorted(texts))
        return [m for m in modules if isinstance(self._names(m).get(name), Function | ast.ClassDef)]

    def bases(self, found: Found) -> Iterator[Found]:
        """A class and those under it, but others' classes; each once, nearest first."""
        waiting, seen = [found], set()
        while waiting:
            cls = waiting.pop(0)
            if not isinstance(cls.node, ast.ClassDef) or cls.at in seen:
                continue
            seen.add(cls.at)
            yield cls
            named = (self._expression(cls.module, base) for base in cls.node.bases)
            waiting[:0] = [base for base in named if base]

    def _module(self, name: str) -> Found | None:
        text = self._text(name)
        return None if text is None else Found(name, (), self._tree(name))

    def _text(self, module: str) -> str | None:
        return self._texts.get(module, self._texts.get(f"{module}.__init__"))

    def _member(self, found: Found, name: str) -> Found | None:
        if isinstance(found.node, ast.Module):
            return self._of_module(found.module, name)
        if isinstance(found.node, ast.ClassDef):
            for cls in self.bases(found):
                members = dict(_bindings(cls.node.body))  # type: ignore[attr-defined]
                node = members.get(name) or _set_of_self(cls.node, name)
                if node is not None:
                    return Found(cls.module, (*cls.names, name), node)
            return None
        owner = self._class_of(found)
        return owner and self._member(owner, name)

    def _class_of(self, found: Found) -> Found | None:
        """The class of what is assigned, as far as that can be read."""
        if isinstance(found.node, ast.AnnAssign):
            return self._expression(found.module, found.node.annotation)
        if isinstance(found.node, ast.Assign) and found.names[:-1]:
            # In a class's body, as in an enum's, whose members are of it.
            return self.find(f"{found.module}:{'.'.join(found.names[:-1])}")
        return None

    def _of_module(self, module: str, name: str) -> Found | None:
        node = self._names(module).get(name)
        if isinstance(node, ast.ImportFrom):
            (alias,) = (a for a in node.names if (a.asname or a.name) == name)
            source = self._absolute(module, node)
            imported = self.find(f"{source}:{alias.name}") if source != module else None
            return imported or self._module(f"{source}.{alias.name}")
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name | ast.Attribute):
            return self._expression(module, node.value) or Found(module, (name,), node)
        return Found(module, (name,), node) if node else self._module(f"{module}.{name}")

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        is_package = f"{module}.__init__" in self._texts
        parts = parts[: len(parts) - node.level + is_package]
        return ".".join([*parts, *filter(None, [node.module])])

    def _expression(self, module: str, node: ast.expr) -> Found | None:
        """What a name, or one with dots or brackets behind it, stands for in a module."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.parse(node.value, mode="eval").body
        if isinstance(node, ast.Subscript):
            return self._expression(module, node.value)
        if isinstance(node, ast.Attribute):
            owner = self._expression(module, node.value)
            return owner and self._member(owner, node.attr)
        return self._of_module(module, node.id) if isinstance(node, ast.Name) else None


def own_members(cls: ast.AST) -> set[str]:
    """Methods, attributes and fields that a class's body defines, but no dunders."""
    names = {name for name, _ in _bindings(getattr(cls, "body", []))}
    return {name for name in names if not name.startswith("__")}


def parameters(function: Function) -> list[str]:
    """Names of a function's parameters, those behind stars too."""
    args = function.args
    found = [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg]
    return [argument.arg for argument in found if argument]


def signature(function: Function) -> tuple[str, ...]:
    """A function's parameters with their defaults and without their types, stars and slash too."""
    args = function.args
    positional = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + args.defaults
    found = [_parameter(*pair) for pair in zip(positional, defaults, strict=True)]
    if args.posonlyargs:
        found.insert(len(args.posonlyargs), "/")
    if args.vararg or args.kwonlyargs:
        found.append(f"*{args.vararg.arg if args.vararg else ''}")
    found += [_parameter(*pair) for pair in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return (*found, *([f"**{args.kwarg.arg}"] if args.kwarg else []))


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    return argument.arg if default is None else f"{argument.arg}={ast.unparse(default)}"


def body_hash(function: Function) -> str:
    """Twelve digits of a function's decorators and body; comments, types and docstring are none.

    The same under every version of Python that parses the function.
    """
    body = function.body[ast.get_docstring(function) is not None :]
    text = repr([_plain(node) for node in (*function.decorator_list, *body)])
    return hashlib.sha256(bytes(text, "utf-8")).hexdigest()[:12]


def names_used(node: ast.AST) -> set[str]:
    """Names and attributes that code refers to."""
    inner = list(ast.walk(node))
    names = {n.id for n in inner if isinstance(n, ast.Name)}
    return names | {n.attr for n in inner if isinstance(n, ast.Attribute)}


def _plain(value: Any) -> Any:
    """A syntax tree as tuples, without what some versions of Python leave out or add."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, ast.AST):
        return repr(value)
    skipped = ("kind", "type_comment", "type_params", "returns", "annotation", "ctx")
    kept = ((name, content) for name, content in ast.iter_fields(value) if name not in skipped)
    return (type(value).__name__, [(n, _plain(c)) for n, c in kept if c not in (None, [])])


def _bindings(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    """Names that statements bind, those inside conditions too; a definition comes last.

    So of a name that is both defined and assigned, a dict has the definition.
    """
    definitions: list[tuple[str, ast.AST]] = []
    for node in _statements(body):
        if isinstance(node, Function | ast.ClassDef):
            definitions.append((node.name, node))
        elif isinstance(node, ast.ImportFrom):
            definitions += [(alias.asname or alias.name, node) for alias in node.names]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield from ((n.id, node) for n in ast.walk(target) if isinstance(n, ast.Name))
    yield from definitions


def _statements(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Statements, those inside conditions, `try` and `with` too."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _statements(ast.iter_child_nodes(node))


def _set_of_self(cls: ast.AST, name: str) -> ast.AST | None:
    """What sets an attribute of instances in a class's methods."""
    for node in ast.walk(cls):
        if isinstance(node, ast.Attribute) and node.attr == name:
            if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
                return node
    return None


def _read(path: Path) -> Iterator[tuple[str, str]]:
    """Texts of a wheel's or a folder's files by their modules; a package's ends in `.__init__`."""
    if path.is_dir():
        root = path.parent if path.name == PACKAGE else path
        for file in sorted((root / PACKAGE).rglob("*.py")):
            yield _dotted(file.relative_to(root)), file.read_text()
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            for name in wheel.namelist():
                if name.startswith(f"{PACKAGE}/") and name.endswith(".py"):
                    yield _dotted(PurePosixPath(name)), str(wheel.read(name), "utf-8")


def _dotted(file: PurePath) -> str:
    return ".".join(file.with_suffix("").parts)
