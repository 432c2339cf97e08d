"""Types of the KV cache's elements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tangram.profile import text_config

ITEMSIZE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def served_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that vLLM serves a config with: its own, or half precision for float32."""
    for part in (config, text_config(config)):
        found = part.get("dtype") or part.get("torch_dtype")
        if isinstance(found, str):
            name = found.removeprefix("torch.")
            return name if ITEMSIZE_BYTES.get(name) == 2 else "bfloat16"
    return "bfloat16"
