"""Who may import whom."""

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
