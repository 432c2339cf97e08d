"""Swapping budgets in a resting engine, but for the engine."""

import logging
from types import SimpleNamespace

import pytest
from vllm.config import CUDAGraphMode
from vllm.v1.core.block_pool import BlockPool, logger

from tangram.engines import swapping
from tangram.errors import ConfigurationError


class Engine:
    """Has nothing but a pool of blocks, which says what it does."""

    def __init__(self, monkeypatch, busy=False):
        layout = SimpleNamespace(digest="d", replace_budgets=lambda groups: layout)
        monkeypatch.setattr(swapping, "plan_of", lambda config: SimpleNamespace(geometry=layout))
        graphs = SimpleNamespace(cudagraph_mode=CUDAGraphMode.NONE)
        config = SimpleNamespace(additional_config={}, compilation_config=graphs)
        self.llm_engine = SimpleNamespace(vllm_config=config, has_unfinished_requests=lambda: False)
        self.pool = BlockPool(num_gpu_blocks=4, enable_caching=True, hash_block_size=16)
        if busy:
            self.pool.get_new_blocks(1)

    def reset_prefix_cache(self):
        return self.pool.reset_prefix_cache()

    def collective_rpc(self, name, args=()):
        return [{"layout": "d"}]


@pytest.fixture
def said(monkeypatch):
    """Messages of the pool's logger, and the level that it had at each."""
    found = []

    class Keeper(logging.Handler):
        def emit(self, record):
            found.append(record.getMessage())

    keeper = Keeper()
    monkeypatch.setattr(logger, "handlers", [keeper])
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.manager._clear_cache()
    yield found
    logger.manager._clear_cache()


def test_emptied_caches_are_not_reported_while_budgets_are_swapped(monkeypatch, said):
    engine = Engine(monkeypatch)
    swapping.swap_budgets(engine, SimpleNamespace(to_lists=lambda: ()))
    assert said == []
    engine.reset_prefix_cache()  # someone else's, before and after
    assert said == ["Successfully reset prefix cache"] and logger.level == logging.INFO


def test_a_cache_that_cannot_be_emptied_is_still_reported(monkeypatch, said):
    with pytest.raises(ConfigurationError, match="while requests run"):
        swapping.swap_budgets(Engine(monkeypatch, busy=True), None)
    assert any("Failed to reset prefix cache" in line for line in said)
    assert logger.level == logging.INFO
