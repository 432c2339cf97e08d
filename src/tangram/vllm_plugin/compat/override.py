"""Replacing a method of vLLM, where no registry or entry point offers a place."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from tangram.vllm_plugin.compat.version import SUPPORTED_VLLM


def override(owner: type, name: str, make: Callable[[Any], Any], parameters: set[str]) -> None:
    """Replace a method of vLLM once per process, after checking that it takes what we expect.

    Raises:
        RuntimeError: vLLM changed under the plugin.
    """
    original = inspect.getattr_static(owner, name, None)
    function = getattr(original, "__func__", original)
    if getattr(function, "overridden_by_tangram", False):
        return
    found = set(inspect.signature(function).parameters) if callable(function) else set()
    if not parameters <= found:
        raise RuntimeError(
            f"{owner.__module__}.{owner.__name__}.{name} of this vLLM takes {sorted(found)}, "
            f"expected {sorted(parameters)}: install vLLM {SUPPORTED_VLLM}"
        )
    wrapped = functools.wraps(function)(make(function))
    wrapped.overridden_by_tangram = True  # type: ignore[attr-defined]
    kind = type(original) if isinstance(original, staticmethod | classmethod) else lambda f: f
    setattr(owner, name, kind(wrapped))
