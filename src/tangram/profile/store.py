"""The file under a profile: named arrays and one JSON header, in one safetensors file."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tangram.errors import ProfileError
from tangram.printable import cut, shown

SCHEMA_VERSION = 1

REMEDY = "calibrate again, or give another file"

_MOST_BYTES = 8 << 30  # several times what the largest models take
_MOST_NESTED = 32
_UNREADABLE = (OSError, SafetensorError, ValueError, TypeError, AttributeError, MemoryError)

# One key only: safetensors keeps no order among several, and the bytes are to be reproducible.
METADATA_KEY = "tangram_profile"


def write(path: Path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write `path` at once: readers see the old file or the new one, whole.

    Adds `schema_version` and a checksum over everything to the header.

    Raises:
        ProfileError: the folder cannot be written to; names the path.
    """
    full = {**header, "schema_version": SCHEMA_VERSION}
    full["sha256"] = _digest(full, arrays)
    payload = save(dict(arrays), metadata={METADATA_KEY: _canonical(full)})
    try:
        replace_file(path, payload)
    except OSError as error:
        raise ProfileError(f"{path}: the profile cannot be written there: {error}") from error


def replace_file(path: Path, payload: bytes) -> None:
    """Write `path` at once, and leave nothing else behind: readers see the old file or the new one.

    So does who reads after a power cut: the contents reach the disk before the name does.

    Raises:
        OSError: the folder cannot be written to.
    """
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every file system has it
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays of a file that `write` made.

    Raises:
        ProfileError: missing, truncated, damaged, of a newer schema, or another kind of file;
            names the path and the remedy.
    """
    _refuse_special(path)
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: np.array(file.get_tensor(name)) for name in file.keys()}
    except _UNREADABLE as error:
        raise ProfileError(f"{path}: no readable profile there ({error}): {REMEDY}") from error
    if METADATA_KEY not in metadata:
        raise ProfileError(
            f"{path}: a safetensors file, but not a profile: its metadata has no {METADATA_KEY}: "
            f"{REMEDY}"
        )
    try:
        header = _parsed(metadata[METADATA_KEY])
        schema = header["schema_version"]
        if type(schema) is not int or schema < 1:
            raise ValueError(f"schema_version is {shown(schema)}")
        if schema <= SCHEMA_VERSION:
            damaged = header.pop("sha256") != _digest(header, arrays)
    except (KeyError, ValueError, RecursionError) as error:
        raise ProfileError(
            f"{path}: damaged: its header is not one ({error!r}): {REMEDY}"
        ) from error
    if schema > SCHEMA_VERSION:
        raise ProfileError(
            f"{path}: written with schema {shown(schema)} by version "
            f"{cut(header.get('tangram_version'), 40)}; this version reads schemas up to "
            f"{SCHEMA_VERSION}: update tangram-kv, or {REMEDY}"
        )
    if damaged:
        raise ProfileError(
            f"{path}: damaged: its contents do not fit its checksum: copy it again, {REMEDY}"
        )
    return header, arrays


def _refuse_special(path: Path) -> None:
    """Raise ProfileError for what is no plain file: opening a pipe would wait for ever."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise ProfileError(f"{path}: no readable profile there ({error}): {REMEDY}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "no plain file"
        raise ProfileError(f"{path}: no readable profile there (it is {kind}): {REMEDY}")
    if found.st_size > _MOST_BYTES:
        raise ProfileError(
            f"{path}: no readable profile there (it has {found.st_size:,} bytes, and no profile "
            f"more than {_MOST_BYTES:,}): {REMEDY}"
        )


def _parsed(text: str) -> dict[str, Any]:
    """The header.

    Raises:
        ValueError, RecursionError: it is no JSON object, or nested beyond what others can walk.
    """
    header = json.loads(text, parse_constant=_refuse_constant)
    if not isinstance(header, dict):
        raise ValueError(f"it is {shown(header)}, expected a JSON object")
    level: list[Any] = [header]
    for _ in range(_MOST_NESTED):
        inner = [each.values() if isinstance(each, dict) else each for each in level]
        level = [value for each in inner for value in each if isinstance(value, dict | list)]
    if level:
        raise ValueError(f"it is nested more than {_MOST_NESTED} levels deep")
    return header


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no JSON")


def _canonical(header: Mapping[str, Any]) -> str:
    return json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the header and every array's name, type, shape and contents."""
    digest = hashlib.sha256(_canonical(header).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"\0{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
