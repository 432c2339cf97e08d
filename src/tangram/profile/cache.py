"""Where profiles that were calibrated automatically are kept, and how they are told apart."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tangram.errors import ProfileError
from tangram.profile.identity import ModelIdentity
from tangram.profile.store import SCHEMA_VERSION

CACHE_VARIABLE = "TANGRAM_CACHE_DIR"
"""Environment variable that names the cache folder."""

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_SAMPLES_A_FILE = 16
_SAMPLE_BYTES = 4096
_TENSOR_BYTES = 512
_TENSORS_A_FILE = 4096
"""Of a safetensors file, so many tensors are sampled at most, evenly spread."""


def cache_folder() -> Path:
    """The folder of cached profiles, which need not exist.

    `profiles` in TANGRAM_CACHE_DIR, else in `tangram` of XDG_CACHE_HOME or of ~/.cache.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser() / "profiles"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tangram" / "profiles"


def cached_profile_path(
    model: ModelIdentity,
    weights: str,
    *,
    scorer_name: str,
    scorer_parameters: Mapping[str, Any],
    chunk_size_tokens: int,
    window_size_tokens: int,
    n_sink_tokens: int,
    page_group_size: int,
    recipe: Sequence[str] = (),
) -> Path:
    """The file of one model's profile under one scorer and one geometry.

    Args:
        model: the network.
        weights: digest of its weights; the network alone does not tell two fine-tunes apart.
        scorer_name: as in the registry.
        scorer_parameters: all of them.
        chunk_size_tokens: C.
        window_size_tokens: W.
        n_sink_tokens: S.
        page_group_size: H_p.
        recipe: what was asked of the calibration beside its defaults.
    """
    key = {
        "schema_version": SCHEMA_VERSION,
        "model": model.to_dict(),
        "weights": weights,
        "scorer": [scorer_name, dict(scorer_parameters)],
        "geometry": [chunk_size_tokens, window_size_tokens, n_sink_tokens, page_group_size],
        "recipe": list(recipe),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    readable = (
        f"{model.architecture}-{model.num_layers}x{model.num_kv_heads}x{model.head_size}-"
        f"{scorer_name}-C{chunk_size_tokens}-W{window_size_tokens}-S{n_sink_tokens}-"
        f"H{page_group_size}-{digest[:16]}.profile"
    )
    return cache_folder() / re.sub(r"[^\w.-]", "_", readable)


def snapshot_folder(model: str, revision: str | None = None) -> Path:
    """The folder of a model's files: itself, or its snapshot in the Hugging Face cache.

    A snapshot's folder is there once any file of it was loaded, and is named by its commit.

    Raises:
        ProfileError: no such folder, and no such model on the Hugging Face Hub.
    """
    if Path(model).is_dir():
        return Path(model).absolute()
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        found = try_to_load_from_cache(model, "config.json", revision=revision)
        if not isinstance(found, str):
            found = hf_hub_download(model, "config.json", revision=revision)
        return Path(found).parent
    except Exception as error:  # offline, gated, unknown, a bad name: the library has many
        reason = str(error).strip().split("\n")[0]
        raise ProfileError(
            f"{model} is neither a folder nor a model of the Hugging Face Hub whose snapshot "
            f"{f'at revision {revision} ' if revision else ''}can be found "
            f"({type(error).__name__}: {reason})"
        ) from error


def weights_digest(folder: Path) -> str:
    """What tells a folder's weights from those of another: a digest that reads little of them.

    A snapshot of the Hugging Face cache is named by its commit, which is taken. Of other folders:
    names and sizes of the weight files, bytes at evenly spread places of each, and of safetensors
    files the headers, and bytes from the middle of every tensor: a merged adapter may have changed
    a few of them only.

    Raises:
        ProfileError: the folder holds no weights, or they cannot be read.
    """
    if _is_snapshot(folder):
        return folder.name
    digest = hashlib.sha256()
    try:
        files = sorted(f for f in folder.iterdir() if f.suffix in _WEIGHT_SUFFIXES and f.is_file())
        for file in files:
            digest.update(f"\0{file.name}\0{file.stat().st_size}\0".encode())
            for part in _parts(file):
                digest.update(part)
    except OSError as error:
        raise ProfileError(f"the weights in {folder} cannot be read: {error}") from error
    if not files:
        raise ProfileError(f"there are no weights ({', '.join(_WEIGHT_SUFFIXES)}) in {folder}")
    return digest.hexdigest()


def _is_snapshot(folder: Path) -> bool:
    """Whether it is `models--ORG--NAME/snapshots/COMMIT`, as the Hugging Face cache has them."""
    return (
        re.fullmatch("[0-9a-f]{40}", folder.name) is not None
        and folder.parent.name == "snapshots"
        and folder.parent.parent.name.startswith("models--")
    )


def _parts(file: Path) -> Iterator[bytes]:
    """The header and samples of the tensors of a safetensors file, and samples of any file."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        if file.suffix == ".safetensors":
            length = int.from_bytes(opened.read(8), "little")
            header = opened.read(min(length, size))
            yield header
            for middle in _middles(header):
                opened.seek(8 + length + middle)
                yield opened.read(_TENSOR_BYTES)
        for number in range(_SAMPLES_A_FILE):
            opened.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES_A_FILE - 1))
            yield opened.read(_SAMPLE_BYTES)


def _middles(header: bytes) -> list[int]:
    """Where to sample the tensors of a safetensors file, in bytes from the end of its header."""
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        spans = sorted(tuple(map(int, entry["data_offsets"])) for entry in entries.values())
        middles = [max(begin, (begin + end - _TENSOR_BYTES) // 2) for begin, end in spans]
    except (ValueError, TypeError, KeyError, AttributeError):  # damaged: loading it will say so
        return []
    return middles[:: -(-len(middles) // _TENSORS_A_FILE) or 1]


@contextmanager
def locked(
    path: Path, on_wait: Callable[[], None] = lambda: None, named_by: str = CACHE_VARIABLE
) -> Iterator[None]:
    """Hold a lock beside `path`, in a folder that is made; others wait, or are waited for.

    It ends with the process at the latest, however that ends, and its file goes with it. A file
    system without locks is taken as it is: what is done twice is replaced at once.

    Args:
        path: what only one process is to make.
        on_wait: called before waiting for another, which does not come to it where this raises.
        named_by: option or variable that names the folder, for errors.

    Raises:
        ProfileError: the folder cannot be made or written to; names what moves it.
    """
    lock = path.with_name(path.name + ".lock")
    while True:
        with _opened(lock, named_by) as file:
            _acquire(file, on_wait)
            if not _is_at(lock, file):
                continue  # it went with whom it was waited for, and another may lock a new one
            try:
                yield
            finally:
                with suppress(OSError):
                    lock.unlink()
            return


def open_beside(path: Path) -> IO[str]:
    """A file beside a profile, opened to be written anew, in a folder that is made.

    Its name can be foretold, so it is never opened through a link, nor waited for as a pipe.

    Raises:
        OSError: it cannot be made or written to, is a link, or is no plain file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    file = os.fdopen(os.open(path, flags, 0o666), "w")
    try:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{path} is no plain file")
        file.truncate()
    except OSError:
        file.close()
        raise
    return file


def _opened(lock: Path, named_by: str) -> IO[str]:
    try:
        return open_beside(lock)
    except OSError as error:
        if lock.is_symlink():
            raise ProfileError(f"{lock} is a link, which is not followed: remove it") from error
        raise ProfileError(
            f"{lock.parent} cannot be written to ({error}): name another folder with {named_by}"
        ) from error


def _acquire(file: IO[str], on_wait: Callable[[], None]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        on_wait()
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        pass


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
