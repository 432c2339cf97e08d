"""Every place of vLLM that the plugin relies on, checked together.

A release of vLLM that changes one must be found out here, by name, and not by a wrong answer:
`tangram doctor` lists them, `require_hooks` raises, and docs/hooks.md is written by
`python -m tangram.vllm_plugin.frontend.hooks docs/hooks.md`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tangram.vllm_plugin.compat.hook import Hook, HookResult
from tangram.vllm_plugin.compat.places import PLACES
from tangram.vllm_plugin.compat.version import REMEDY, SUPPORTED_VLLM


def _of_engine_core() -> Sequence[Hook]:
    from tangram.vllm_plugin.core.checks import HOOKS

    return HOOKS


def _of_worker() -> Sequence[Hook]:
    from tangram.vllm_plugin.worker.checks import HOOKS

    return HOOKS


# Made of vLLM's classes: where these are gone, ours cannot be imported.
_OURS = {
    "The plugin's classes in the engine core": _of_engine_core,
    "The plugin's classes in the worker": _of_worker,
}


def hooks() -> dict[str, Sequence[Hook]]:
    """All hooks by the title of their subject; raises what importing the plugin's classes does."""
    return {**PLACES, **{title: checks() for title, checks in _OURS.items()}}


def check_hooks() -> list[HookResult]:
    """Check every hook in this process; a hook that is gone is a result, not an error."""
    results = [hook.check() for places in PLACES.values() for hook in places]
    for title, checks in _OURS.items():
        try:
            results += [hook.check() for hook in checks()]
        except Exception as error:
            difference = f"{type(error).__name__}: {error}"
            results.append(HookResult(title, "vllm", "vLLM's classes are under them", difference))
    return results


def require_hooks() -> None:
    """Raise RuntimeError that names every hook that differs, and the version that is supported."""
    differing = [result for result in check_hooks() if not result.ok]
    if differing:
        listed = "; ".join(f"{r.name} ({r.where}): {r.difference}" for r in differing)
        raise RuntimeError(
            f"this vLLM is not what KV cache compression relies on: {listed}. {REMEDY}"
        )


def page(listed: Mapping[str, Sequence[Hook]]) -> str:
    """The hooks as a page of the documentation."""
    lines = [
        "# Hooks",
        "",
        f"Every place of vLLM {SUPPORTED_VLLM} that the plugin relies on. Most of them are no "
        "promised interface;",
        "[how a new release is looked at](vllm-releases.md) says what is done about it.",
        "`tangram doctor` checks all of them, and so does the start of an engine with compression: "
        "a place that",
        "has changed is named, and nothing is served. A place that the code uses and that is not "
        "listed fails a",
        "test. This page is written by",
        "",
        "    python -m tangram.vllm_plugin.frontend.hooks docs/hooks.md",
        "",
        "**Upstream** is the change of vLLM that would remove the need, or that is to be watched; "
        "**until** says",
        "when the hook can go.",
    ]
    for title, places in listed.items():
        lines += ["", f"## {title}", ""]
        lines += [
            "| hook | where | needed for | upstream | until |",
            "| --- | --- | --- | --- | --- |",
        ]
        for hook in places:
            where = f"`{hook.where}`"
            if hook.names:
                where += ": " + ", ".join(f"`{name}`" for name in hook.names)
            cells = (hook.name, where, hook.reason, hook.upstream, hook.until)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(hooks()))
