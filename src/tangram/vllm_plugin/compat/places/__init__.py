"""Every place of vLLM that is no class of ours, by subject, each with a check that it is there.

Most of these are no promised interface. A release of vLLM that changes one must be found out here,
by name, and not by a wrong answer. Checks import, look at signatures and members, and where these
say too little, run a piece. None of them needs a model or starts an engine.
"""

from tangram.vllm_plugin.compat import members
from tangram.vllm_plugin.compat.hook import Hook
from tangram.vllm_plugin.compat.places import (
    attention,
    cache_groups,
    configuration,
    engines,
    graphs,
    metrics,
    scheduling,
    worker,
)

PLACES: dict[str, tuple[Hook, ...]] = {
    "Flags and configuration": configuration.HOOKS,
    "Attention": attention.HOOKS,
    "Cache groups": cache_groups.HOOKS,
    "Scheduler": scheduling.HOOKS,
    "Metrics": metrics.HOOKS,
    "Worker": worker.HOOKS,
    "CUDA graphs": graphs.HOOKS,
    "Engines driven from outside": engines.HOOKS,
    "Classes that are subclassed": members.HOOKS,
}
"""Hooks by the title under which docs/hooks.md lists them."""
