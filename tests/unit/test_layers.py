"""Who may import whom, and that nobody imports in a circle."""

import ast
import os
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src"

# package -> the files that alone may import it, as patterns below src/
ALLOWED = {
    "vllm": ("tangram/vllm_plugin/**/*.py", "tangram/engines/*.py"),
    "triton": ("tangram/kernels/*/*kernel.py", "tangram/kernels/launch.py"),
}


def imported_packages(source: str) -> set[str]:
    """Top-level names of everything that the source imports, at any depth of it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rsplit(".", 1)[-1]
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                names.add(node.args[0].value)
    return {name.split(".")[0] for name in names}


def modules() -> dict[str, Path]:
    """Every module of the package by its name, a room's own file by the room's."""
    names = {path.relative_to(SRC).with_suffix(""): path for path in SRC.rglob("*.py")}
    return {
        ".".join(name.parent.parts if name.name == "__init__" else name.parts): path
        for name, path in names.items()
    }


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Which of the modules each one imports, at any depth, but not for a type checker alone."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        tree = ast.parse(source)
        ignored = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for statement in node.body
            for inner in ast.walk(statement)
        }
        found: set[str] = set()
        for node in ast.walk(tree):
            if node in ignored:
                continue
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                inner = {f"{node.module}.{alias.name}" for alias in node.names} & set(sources)
                whole = len(inner) < len(node.names)
                found |= inner | ({node.module or ""} if whole else set())
        graph[module] = (found & set(sources)) - {module}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, the first again at the end; none: empty."""
    finished: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in finished:
            return []
        for other in sorted(graph[module]):
            if found := search(other, [*path, module]):
                return found
        finished.add(module)
        return []

    return next((found for module in sorted(graph) if (found := search(module, []))), [])


def test_no_file_imports_itself_through_others():
    graph = import_graph({name: path.read_text() for name, path in modules().items()})
    assert sum(map(len, graph.values())) > len(graph) > 100
    assert circle(graph) == []


def test_a_circle_is_found_wherever_the_imports_stand():
    sources = {
        "p": "",
        "p.a": "from p.b import thing",
        "p.b": "def f():\n    from p import c",
        "p.c": "if TYPE_CHECKING:\n    from p import b\nelse:\n    import p.a",
    }
    assert circle(import_graph(sources)) == ["p.a", "p.b", "p.c", "p.a"]
    sources["p.c"] = "if TYPE_CHECKING:\n    from p import b"
    assert circle(import_graph(sources)) == []


def test_benchmarks_and_models_do_without_the_commands():
    """What they need of a command lies in a room below it."""
    files = [path for folder in ("benchmarks", "models") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 30
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported = {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                imported = {alias.name for alias in node.names}
            else:
                continue
            assert not any(f"{name}.".startswith("tangram.cli.") for name in imported), path


def may_import(file: PurePosixPath, package: str) -> bool:
    allowed = {str(path) for pattern in ALLOWED[package] for path in SRC.glob(pattern)}
    return str(SRC / file) in allowed


def test_the_layers_hold():
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_only_its_own_files_import_it(package):
    files = sorted(SRC.rglob("*.py"))
    assert files
    offenders = [
        str(file.relative_to(SRC))
        for file in files
        if package in imported_packages(file.read_text())
        and not may_import(PurePosixPath(file.relative_to(SRC)), package)
    ]
    assert offenders == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import vllm.config as c", {"vllm"}),
        ("def f():\n    from vllm import LLM", {"vllm"}),
        ("import importlib\nimportlib.import_module('vllm.v1')", {"importlib", "vllm"}),
        ("from . import vllm", set()),
        ("import vllm_other", {"vllm_other"}),
    ],
)
def test_an_import_is_seen_wherever_it_stands(source, found):
    assert imported_packages(source) == found
