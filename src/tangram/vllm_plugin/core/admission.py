"""Which waiting request is admitted next: one whose history is cached, before it is evicted.

Admitted in the order of arrival, requests whose history is gone evict the histories of those behind
them. So each waits as if it had come later by some times its own uncached tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import FCFSRequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

PATIENCE = 64
"""Tokens that the engine computes while one token that is not cached may be passed."""

MAX_CONSIDERED = 64
"""Waiting requests that are put in order; those behind them wait in the order of arrival."""


@dataclass
class _Wait:
    """How a request waits.

    Attributes:
        came_tokens: what the engine had computed when it came.
        looked_tokens: the same when its history was looked up last; -1 for never.
        uncached_tokens: of its history, as found then.
    """

    came_tokens: int
    looked_tokens: int = -1
    uncached_tokens: int = 0

    @property
    def key(self) -> int:
        """The lowest is admitted first."""
        return self.came_tokens + PATIENCE * self.uncached_tokens


class HistoryQueue(FCFSRequestQueue):
    """Waiting requests, those in front whose history is cached.

    The clock is what the engine has computed, in tokens: it needs no rate, and goes on in every
    step. The order is made when a step first asks for a request, and kept for that step.

    Args:
        uncached_tokens: of a request that tokens that would have to be computed now. It is asked
            for new requests, for the first in the order until it stays the first, and for the one
            that was looked up longest ago.
    """

    def __init__(self, uncached_tokens: Callable[[Request], int]) -> None:
        super().__init__()
        self.clock_tokens = 0
        self._uncached_tokens = uncached_tokens
        self._waits: WeakKeyDictionary[Request, _Wait] = WeakKeyDictionary()
        self._is_ordered = False

    def advance(self, computed_tokens: int) -> None:
        """A step was planned that computes so many tokens."""
        self.clock_tokens += computed_tokens
        self._is_ordered = False

    def add_request(self, request: Request) -> None:  # noqa: D102
        self._waits[request] = _Wait(self.clock_tokens)
        super().add_request(request)

    def peek_request(self) -> Request:  # noqa: D102
        if not self._is_ordered:
            self._is_ordered = True
            self._order()
        return super().peek_request()

    def _order(self) -> None:
        considered = [self.popleft() for _ in range(min(len(self), MAX_CONSIDERED))]
        # Preempted requests have no place by key: vLLM put them in front.
        first = [r for r in considered if r.status == RequestStatus.PREEMPTED]
        others = [r for r in considered if r.status != RequestStatus.PREEMPTED]
        if len(others) > 1:
            others = self._by_key(others)
        self.extendleft(reversed(first + others))

    def _by_key(self, requests: list[Request]) -> list[Request]:
        waits = [self._waits.setdefault(r, _Wait(0)) for r in requests]
        renewed: set[int] = set()

        def renew(index: int) -> None:
            wait = waits[index]
            wait.uncached_tokens = self._uncached_tokens(requests[index])
            wait.looked_tokens = self.clock_tokens
            renewed.add(index)

        renew(min(range(len(waits)), key=lambda index: waits[index].looked_tokens))
        for index, wait in enumerate(waits):
            if wait.looked_tokens < 0:
                renew(index)
        heap = [(wait.key, index) for index, wait in enumerate(waits)]
        heapq.heapify(heap)
        # What was found may be evicted by now: the first is looked up until it stays the first.
        while (index := heap[0][1]) not in renewed:
            renew(index)
            heapq.heapreplace(heap, (waits[index].key, index))
        return [requests[index] for _, index in sorted(heap)]


class _AdmitsByHistory:
    """A scheduler of vLLM with another queue of those that wait."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.waiting = self._by_history = HistoryQueue(self._uncached_tokens)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        planned = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self._by_history.advance(planned.total_num_scheduled_tokens)
        return planned

    def _uncached_tokens(self, request: Request) -> int:
        """What would be computed of a request; neither statistics nor blocks notice the look."""
        manager: Any = self.kv_cache_manager  # type: ignore[attr-defined]
        if not manager.prefix_cache_lookup_enabled(request):
            return request.num_tokens
        tokens = request.num_tokens
        _, hit, _ = manager.coordinator.find_longest_cache_hit(request.block_hashes, tokens - 1)
        return tokens - hit


class HistoryScheduler(_AdmitsByHistory, Scheduler):
    """In the place of vLLM's that plans a step when the last one has ended."""


class AsyncHistoryScheduler(_AdmitsByHistory, AsyncScheduler):
    """In the place of vLLM's that plans a step while the last one runs."""


SCHEDULERS: dict[str, type[Scheduler]] = {
    f"{scheduler.__module__}.{scheduler.__qualname__}": scheduler
    for scheduler in (HistoryScheduler, AsyncHistoryScheduler)
}
"""By the names under which they travel to the engine core."""


def scheduler_name(is_async: bool) -> str:
    """The name of the one that stands for what vLLM would choose."""
    return list(SCHEDULERS)[is_async]
