"""The file under a profile: named arrays and one JSON header, in one safetensors file."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tangram.errors import ProfileError

SCHEMA_VERSION = 1

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

    Raises:
        OSError: the folder cannot be written to.
    """
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays of a file that `write` made.

    Raises:
        ProfileError: missing, truncated, damaged, of a newer schema, or another kind of file;
            names the path.
    """
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: np.array(file.get_tensor(name)) for name in file.keys()}
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise ProfileError(
            f"{path}: no readable profile there ({error}): give the path of a file that "
            "calibration wrote"
        ) from error
    if METADATA_KEY not in metadata:
        raise ProfileError(
            f"{path}: a safetensors file, but not a profile: its metadata has no {METADATA_KEY}"
        )
    try:
        header = json.loads(metadata[METADATA_KEY])
        schema, writer = int(header["schema_version"]), header.get("tangram_version")
        if schema <= SCHEMA_VERSION:
            found = header.pop("sha256")
            damaged = found != _digest(header, arrays)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProfileError(
            f"{path}: damaged: its header is not one ({error!r}): copy it again, or calibrate again"
        ) from error
    if schema > SCHEMA_VERSION:
        raise ProfileError(
            f"{path}: written with schema {schema} by version {writer}; this version reads "
            f"schemas up to {SCHEMA_VERSION}: update tangram-kv, or calibrate again"
        )
    if damaged:
        raise ProfileError(
            f"{path}: damaged: its contents do not fit its checksum: copy it again, or calibrate "
            "again"
        )
    return header, arrays


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
