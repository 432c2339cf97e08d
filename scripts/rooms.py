"""Draw the package's rooms, one floor a layer: `python scripts/rooms.py`.

The floors are the layers of the import contracts in pyproject.toml, the texts the first sentences
of the rooms' own docstrings. docs/architecture.md holds what this prints; a test compares them.
"""

from __future__ import annotations

import ast
import textwrap
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 96
NAME = 15


def floors(container: str) -> list[list[str]]:
    """Rooms of every floor of a package, the uppermost first."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (layers,) = (
        contract["layers"]
        for contract in config["tool"]["importlinter"]["contracts"]
        if contract["containers"] == [container]
    )
    return [[room.strip(" ()") for room in layer.split("|")] for layer in layers]


def summary(module: str) -> str:
    """The first sentence of a room's docstring."""
    path = ROOT.joinpath("src", *module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = ast.get_docstring(ast.parse(source.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split())


def drawing() -> str:
    """The picture: who stands higher may import who stands lower."""
    lines = []
    for rooms in floors("tangram"):
        lines.append("+" + "-" * (WIDTH - 2) + "+")
        for room in rooms:
            lines += _room(f"tangram.{room}", room, indent=0)
            if room == "vllm_plugin":
                for inner in floors("tangram.vllm_plugin"):
                    for name in inner:
                        lines += _room(f"tangram.vllm_plugin.{name}", name, indent=2)
    return "\n".join([*lines, "+" + "-" * (WIDTH - 2) + "+"])


def _room(module: str, name: str, indent: int) -> list[str]:
    text = textwrap.wrap(summary(module), WIDTH - NAME - 6)
    names = [" " * indent + name] + [""] * (len(text) - 1)
    return [
        f"| {head:<{NAME}} {part:<{WIDTH - NAME - 5}} |"
        for head, part in zip(names, text, strict=True)
    ]


if __name__ == "__main__":
    print(drawing())
