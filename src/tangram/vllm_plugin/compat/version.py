"""Which releases of vLLM are supported, and which one is here."""

from __future__ import annotations

from importlib import import_module

SUPPORTED_RELEASES = ("0.32", "0.33")
SUPPORTED_VLLM = " or ".join(SUPPORTED_RELEASES)
REMEDY = f"Install vLLM {SUPPORTED_VLLM} (tangram-kv[gpu] or tangram-kv[cpu])"


def version_difference() -> str | None:
    """What another release is and which were expected; None for one that is supported."""
    found = str(import_module("vllm").__version__)
    fits = any(found == known or found.startswith(f"{known}.") for known in SUPPORTED_RELEASES)
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
