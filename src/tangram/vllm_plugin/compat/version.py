"""Which vLLM is supported, and which one is here."""

from __future__ import annotations

from importlib import import_module

SUPPORTED_VLLM = "0.32"
REMEDY = f"Install vLLM {SUPPORTED_VLLM} (tangram-kv[gpu] or tangram-kv[cpu])"


def version_difference() -> str | None:
    """What another release is and which one was expected; None for the supported one."""
    found = str(import_module("vllm").__version__)
    fits = found == SUPPORTED_VLLM or found.startswith(SUPPORTED_VLLM + ".")
    return None if fits else f"is {found}, expected {SUPPORTED_VLLM}"


def describe_platform() -> str:
    """The platform that vLLM serves on, as it names it: `cpu`, `cuda (NVIDIA H200)`."""
    platform = import_module("vllm.platforms").current_platform
    kind = str(platform.device_type)
    if not kind:
        return "none that vLLM knows"
    try:
        name = str(platform.get_device_name())
    except Exception as error:  # a driver that does not answer
        return f"{kind} ({type(error).__name__}: {error})"
    return kind if name == kind else f"{kind} ({name})"
