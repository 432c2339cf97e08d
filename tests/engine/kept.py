"""What an engine really kept, read from its sealed pages and told by the rows' own values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tangram.vllm_plugin.worker.storage import SealedCache

Blocks = dict[tuple[int, ...], list[int]]
"""Sealed blocks of requests, by the tokens of their prompts."""


def sealed_cache(llm: Any) -> SealedCache:
    """The sealed pages of an engine in this process."""
    from tangram.vllm_plugin.worker.storage import SEALED_NAME

    return llm.llm_engine.vllm_config.compilation_config.static_forward_context[SEALED_NAME]


@contextmanager
def sealed_blocks(llm: Any) -> Iterator[Blocks]:
    """Blocks of all requests that run meanwhile; what they hold stays until others need room."""
    core = llm.llm_engine.engine_core.engine_core
    managers = core.scheduler.kv_cache_manager.coordinator.single_type_managers
    (manager,) = (m for m in managers if type(m).__name__ == "SealedManager")
    run, blocks = core.model_executor.execute_model, {}

    def execute(output: Any, *args: Any, **kwargs: Any) -> Any:
        for request_id in output.num_scheduled_tokens:
            prompt = tuple(core.scheduler.requests[request_id].prompt_token_ids)
            blocks[prompt] = [block.block_id for block in manager.req_to_blocks[request_id]]
        return run(output, *args, **kwargs)

    core.model_executor.execute_model = execute
    yield blocks
    core.model_executor.execute_model = run


class KeptTokens:
    """Which tokens the rows of a request's sealed blocks are; an `oracle.Chosen`.

    A row is the token whose key and value lie nearest. Rotated keys of different positions are far
    apart, and the engine's differ from the oracle's by rounding only, so there is no doubt; where
    there were, it would be an error of the engine.

    Args:
        sealed: the engine's pages.
        blocks: the request's sealed blocks, in the order of its chunks.
    """

    def __init__(self, sealed: SealedCache, blocks: Sequence[int]) -> None:
        self._geometry, self._pages, self._blocks = sealed.geometry, sealed.pages, list(blocks)

    def __call__(
        self, layer: int, head: int, chunk: int, keys: Tensor, values: Tensor
    ) -> list[int] | None:
        """Indices of the chunk's tokens in the order of the rows, which has to be ascending."""
        if chunk >= len(self._blocks):
            return None
        found = torch.cat([keys, values], dim=-1)
        distance = torch.cdist(self._rows(layer, head, chunk), found)
        nearest = distance.topk(2, largest=False)
        assert (nearest.values[:, 0] < 0.3 * nearest.values[:, 1]).all(), (layer, head, chunk)
        tokens = nearest.indices[:, 0]
        assert (tokens.diff() > 0).all(), (layer, head, chunk, tokens)
        return tokens.tolist()

    def _rows(self, layer: int, head: int, chunk: int) -> Tensor:
        """[rows, 2 * head_size] float32, the head's rows of a chunk."""
        g = self._geometry
        (group,) = (i for i, heads in enumerate(g.head_groups.heads[layer]) if head in heads)
        member = g.head_groups.heads[layer][group].index(head)
        first, count = g.page_offsets[layer][group], g.head_groups.pages[layer][group]
        pages = self._pages[self._blocks[chunk], first : first + count, member]
        return pages.flatten(0, 1)[g.first_row(layer, group, chunk) :].float().cpu()
