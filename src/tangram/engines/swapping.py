"""Other budgets of the same total in a running engine, for those who try many.

At one ratio all budgets have the same pages in all, so a block's bytes, vLLM's specs and the
managers stay as they are. What changes is where a group's pages lie in a block, and how many: that
is asked of `SealedCache.geometry` in every step, and of the kernels' tables, which are made anew.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.config import CUDAGraphMode

from tangram.errors import ConfigurationError
from tangram.geometry import HeadGroups
from tangram.plan.compression_plan import plan_of


def swap_budgets(llm: Any, head_groups: HeadGroups) -> None:
    """Give a resting engine other budgets; it answers from then on as a fresh one with them would.

    The prefix cache is emptied. The engine's configuration keeps the plan that it began with.

    Args:
        llm: a `tangram.LLM` with `enforce_eager=True`.
        head_groups: as many layers, heads, heads of a group and pages as the engine's.

    Raises:
        BudgetError: budgets of another size; the engine is as before.
        ConfigurationError: an engine without compression, with captured graphs, or with requests.
    """
    config = llm.llm_engine.vllm_config
    plan = plan_of(config.additional_config)
    if plan is None:
        raise ConfigurationError("the engine has no budgets to swap: start it with compression on")
    if config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
        raise ConfigurationError(
            "budgets cannot be swapped under captured CUDA graphs, which keep the tables of the "
            "old ones: start the engine with enforce_eager=True"
        )
    expected = plan.geometry.replace_budgets(head_groups).digest
    # It reports every emptied cache, between progress bars.
    with _silenced(logging.getLogger("vllm.v1.core.block_pool")):
        resting = not llm.llm_engine.has_unfinished_requests() and llm.reset_prefix_cache()
    if not resting:
        raise ConfigurationError("budgets cannot be swapped while requests run: finish them first")
    llm.collective_rpc("tangram_replace_budgets", args=head_groups.to_lists())
    layouts = {status["layout"] for status in llm.collective_rpc("tangram_status")}
    assert layouts == {expected}, (layouts, expected)


@contextmanager
def _silenced(logger: logging.Logger) -> Iterator[None]:
    """Nothing of the logger below a warning, meanwhile."""
    level = logger.level
    logger.setLevel(max(logger.getEffectiveLevel(), logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)
