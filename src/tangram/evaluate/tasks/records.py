"""Reading a user's file of records, JSON lines or one JSON array, with line numbers in errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tangram.errors import ConfigurationError
from tangram.json_values import NotJSONError, json_values


@dataclass(frozen=True)
class Record:
    """One JSON object of a file.

    Attributes:
        fields: the object.
        where: file and line, for errors.
        form: what the file is expected to be, for errors.
    """

    fields: dict[str, Any]
    where: str
    form: str

    def get(self, name: str, *types: type) -> Any:
        """A field of one of these types.

        Raises:
            ConfigurationError: it is missing or of another type; names file, line and field.
        """
        value = self.fields.get(name)
        if name not in self.fields or not isinstance(value, types) or isinstance(value, bool):
            found = type(value).__name__ if name in self.fields else "none"
            wanted = " or ".join(kind.__name__ for kind in types)
            raise ConfigurationError(
                f"{self.where}: expected a record of {self.form} with a field {name!r} of type "
                f"{wanted}, found {found}; give a file in that format to --tasks"
            )
        return value

    def answer(self, given: Any, what: str = "an expected 'answer'") -> str:
        """An expected answer, or one of several, as a text.

        Raises:
            ConfigurationError: it is no text or number, or blank, which any reply contains.
        """
        if isinstance(given, bool) or not isinstance(given, str | int | float):
            fault = f"{json.dumps(given, default=str):.60}, neither a text nor a number"
        elif not str(given).strip():
            fault = "blank, so that any reply would be right"
        else:
            return str(given)
        raise ConfigurationError(f"{self.where}: {what} is {fault}")

    def inner(self, value: Any, what: str) -> Record:
        """A part of this record as a record of its own.

        Raises:
            ConfigurationError: it is no JSON object.
        """
        if not isinstance(value, dict):
            raise ConfigurationError(
                f"{self.where}: expected {what} of {self.form} to be a JSON object, found "
                f"{type(value).__name__}"
            )
        return Record(value, f"{self.where}, {what}", self.form)


def read_records(path: Path, form: str) -> Iterator[Record]:
    """The records of a file, one by one.

    Args:
        path: JSON lines, or one JSON array of objects.
        form: what the file is expected to be, for errors.

    Raises:
        ConfigurationError: the file cannot be read, or a line of it is no JSON object; names the
            file and the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"--tasks: {path} cannot be read as text ({error}): give a JSON or JSONL file of {form}"
        ) from error
    try:
        for line, value in json_values(text):
            where = f"{path}, line {line}"
            if not isinstance(value, dict):
                raise ConfigurationError(
                    f"{where}: expected a record of {form}, a JSON object, found "
                    f"{type(value).__name__}"
                )
            yield Record(value, where, form)
    except NotJSONError as error:
        raise ConfigurationError(
            f"{path}, line {error.line}: not JSON ({error}): give JSON lines or one JSON array to "
            "--tasks"
        ) from error
