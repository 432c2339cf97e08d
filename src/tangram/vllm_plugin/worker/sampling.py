"""Seeded requests on the CPU engine, whose prompt takes several steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tangram.plan.compression_plan import has_plan
from tangram.vllm_plugin.compat.override import override


def install() -> None:
    """Override the sampling of a step in this process."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    override(CPUModelRunner, "sample_tokens", _sample_tokens, {"self", "grammar_output"})


def _sample_tokens(original: Callable) -> Callable:
    """vLLM winds a request's generator back after a sample that it discards; a CPU's cannot.

    So it is not used for such a sample, which leaves it as it was too.
    """

    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not has_plan(self.vllm_config.additional_config):
            return original(self, *args, **kwargs)
        generators = self.input_batch.generators
        discarded = np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])
        unused = {i: generators.pop(i) for i in discarded.tolist() if i in generators}
        try:
            return original(self, *args, **kwargs)
        finally:
            generators.update(unused)

    return sample_tokens
