"""Non-uniform KV cache compression that frees memory, inside stock vLLM.

Importing this package imports neither vLLM nor torch; `tangram.LLM` does, when it is asked for.
"""

from typing import TYPE_CHECKING, Any

from tangram.version import VERSION as __version__

if TYPE_CHECKING:
    from tangram.engines.llm import LLM

__all__ = ["LLM", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from tangram.engines.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
