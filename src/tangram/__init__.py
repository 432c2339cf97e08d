"""Non-uniform KV cache compression that frees memory, inside stock vLLM.

Importing this package imports neither vLLM nor torch; `tangram.LLM` does, when it is asked for.
"""

from importlib import metadata as _metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tangram.engines.llm import LLM

__all__ = ["LLM", "__version__"]

try:
    __version__ = _metadata.version("tangram-kv")
except _metadata.PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+source"


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from tangram.engines.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
