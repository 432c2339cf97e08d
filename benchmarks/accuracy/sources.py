"""Real text by name: files, the standard library, Python's own manual, installed packages' files.

A source is a path, `stdlib` (modules of Python's standard library), `python-manual` (the language
reference that `help()` shows), or `package:NAME` (text files of an installed Python or Debian
package).
"""

from __future__ import annotations

import gzip
import hashlib
import random
import re
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tangram.errors import ConfigurationError

SUFFIXES = (".py", ".md", ".rst", ".txt", ".pod", ".c", ".h", ".html")
LEAST_CHARACTERS = 400
"""Of a document; shorter files say nothing."""
KINDS = {"code": "stdlib", "manuals": "python-manual", "repeated": "python-manual"}
"""Kinds of texts whose divergence is told, and where they come from by default."""
REPEATED = "repeated"

_NOT_MODULES = ("site-packages", "dist-packages", "test", "tests", "lib2to3", "pydoc_data")
_SENTENCE_END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z\"'(])|\n\s*\n")
_LONGEST_UNIT = 300
"""Characters of a unit of filler; longer ones, as of code without sentences, are cut."""


@dataclass(frozen=True)
class Document:
    """A named piece of text."""

    name: str
    text: str


@dataclass(frozen=True)
class Passage:
    """Token ids of a text, and where its later half begins, whose next tokens are compared."""

    name: str
    tokens: tuple[int, ...]
    begin: int

    @property
    def digest(self) -> str:
        """SHA-256 of the token ids."""
        return hashlib.sha256(repr(self.tokens).encode()).hexdigest()


def documents(source: str, option: str) -> list[Document]:
    """The documents of a source, by name, without the shortest.

    Args:
        source: a path or a name, see above.
        option: named in errors.

    Raises:
        ConfigurationError: there is no such source, or it has no text.
    """
    found = [
        document
        for document in sorted(_documents(source, option), key=lambda document: document.name)
        if len(document.text) >= LEAST_CHARACTERS
    ]
    if not found:
        raise ConfigurationError(
            f"{option} {source}: there is no text in it (files that end in "
            f"{', '.join(SUFFIXES)}, also with .gz, of {LEAST_CHARACTERS} characters or more)"
        )
    return found


def _documents(source: str, option: str) -> Iterator[Document]:
    if source == "python-manual":
        from pydoc_data.topics import topics

        yield from (Document(f"help({name!r})", text) for name, text in topics.items())
        return
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [
            file for file in root.rglob("*.py")
            if not set(_NOT_MODULES) & set(file.relative_to(root).parts)
        ]  # fmt: skip
    elif source.startswith("package:"):
        root, files = Path("/"), _package_files(source.removeprefix("package:"))
    else:
        root = Path(source)
        files = [file for file in root.rglob("*") if file.is_file()] if root.is_dir() else [root]
        if not root.exists():
            raise ConfigurationError(
                f"{option} {source}: no such file; give a path, stdlib, python-manual or "
                "package:NAME"
            )
        root = root if root.is_dir() else root.parent
    for file in files:
        if (text := _text_of(file)) is not None:
            yield Document(file.relative_to(root).as_posix(), text)


def _package_files(name: str) -> list[Path]:
    try:
        return [Path(str(file.locate())).resolve() for file in metadata.files(name) or []]
    except metadata.PackageNotFoundError:
        pass
    try:
        listed = subprocess.run(["dpkg", "-L", name], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigurationError(
            f"package:{name} is installed neither for this Python nor as a Debian package"
        ) from error
    return [file for line in listed.stdout.splitlines() if (file := Path(line)).is_file()]


def _text_of(file: Path) -> str | None:
    """The text of a file, without marks of HTML; None for what is none."""
    if not file.name.removesuffix(".gz").endswith(SUFFIXES):
        return None
    try:
        raw = file.read_bytes()
        text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return re.sub(r"<[^>]*>", "", text) if ".html" in file.suffixes else text


def passages(
    kind: str, source: str, encode: Callable[[str], Sequence[int]], count: int, tokens: int
) -> list[Passage]:
    """Texts of a kind, each of documents of its own; the same arguments give the same ones.

    Args:
        kind: of `KINDS`; a repeated text is a passage of half the length, twice.
        source: where its documents come from.
        encode: token ids of a text.
        count: texts.
        tokens: of each, even.

    Raises:
        ConfigurationError: the source has too little text.
    """
    wanted = tokens // 2 if kind == REPEATED else tokens
    found = documents(source, f"--texts {kind}=")
    random.Random(f"texts/{kind}").shuffle(found)
    made, named, ids = [], [], []
    for document in found:
        named.append(document.name)
        ids += encode(document.text)
        if len(ids) >= wanted:
            ids = ids[:wanted] * (tokens // wanted)
            made.append(Passage(", ".join(named), tuple(ids), tokens // 2))
            named, ids = [], []
            if len(made) == count:
                return made
    raise ConfigurationError(
        f"--texts {kind}={source}: its {len(found)} documents make {len(made)} texts of {wanted} "
        f"tokens, {count} are wanted: name a larger source, or give fewer --texts-a-kind or "
        "--text-tokens"
    )


class RealUnits:
    """Sentences of real documents, from a document that is drawn, one document after the other."""

    def __init__(self, found: Sequence[Document], rng: Any) -> None:
        first = rng.randrange(len(found))
        self._left = iter([*found[first:], *found[:first]])
        self._made: list[str] = []

    def first(self, count: int) -> list[str]:
        """The first units, fewer where there are no more."""
        while len(self._made) < count and (document := next(self._left, None)):
            parts = (" ".join(part.split()) for part in _SENTENCE_END.split(document.text))
            self._made += [part[:_LONGEST_UNIT] for part in parts if part]
        return self._made[:count]
