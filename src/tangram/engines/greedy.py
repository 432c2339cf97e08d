"""An engine that answers prompts greedily through its prefix cache, and is gone when closed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from vllm import SamplingParams
from vllm.platforms import current_platform

from tangram.engines.engine_arguments import named_refusals
from tangram.engines.llm import LLM
from tangram.engines.process import SWITCH, free_memory, in_this_process
from tangram.engines.swapping import swap_budgets
from tangram.geometry import HeadGroups


class GreedyEngine:
    """vLLM for one setting after another in one process.

    On the CPU the engine runs in this process, which starts quickest. On a GPU it runs in a process
    of its own, as vLLM does by default: that process's end is what surely gives the memory back.
    vLLM's own environment variable, where it is set, decides otherwise.

    Args:
        model: folder or name of the model.
        compression: options of compression, as `CompressionOptions.to_mapping` gives them; None
            for stock vLLM.
        **options: keyword arguments of `vllm.LLM`.
    """

    def __init__(self, model: str, compression: Mapping[str, Any] | None, **options: Any) -> None:
        with named_refusals(), _in_process_on_cpu():
            self._llm = LLM(
                model,
                enable_prefix_caching=True,
                **({"enable_compression": False} if compression is None else dict(compression)),
                **options,
            )

    @property
    def device(self) -> str:
        """What it runs on."""
        return current_platform.get_device_name() or current_platform.device_type

    def answer(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[tuple[str, int]]:
        """Greedy answers to prompts of token ids, given at once; each ends at the model's eos.

        Returns:
            For each prompt the text, and how many of its tokens came from the prefix cache.
        """
        parameters = SamplingParams(temperature=0, max_tokens=max_tokens)
        inputs: list[Any] = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self._llm.generate(inputs, parameters, use_tqdm=False)
        return [(output.outputs[0].text, output.num_cached_tokens or 0) for output in outputs]

    def swap_budgets(self, head_groups: HeadGroups) -> None:
        """Answer with other budgets from now on; see `swap.swap_budgets`."""
        swap_budgets(self._llm, head_groups)

    def close(self) -> None:
        """Give the engine's memory back."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        free_memory()


def _in_process_on_cpu() -> AbstractContextManager[None]:
    if SWITCH in os.environ or not current_platform.is_cpu():
        return nullcontext()
    return in_this_process()
