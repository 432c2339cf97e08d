"""Which waiting request is admitted next: one whose history is cached, before it is evicted.

Admitted in the order of arrival, requests whose history is gone keep those behind them waiting, and
evict what is cached of them. So each waits as if it had come later by some times its own uncached
tokens: nobody is passed by a request that came later than that.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import FCFSRequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

PATIENCE = 64
"""Tokens that the engine computes while a request may still be passed, for each one of its own that
is not cached."""

MOST_AT_ONCE = 64
"""New requests whose histories are looked up at a time."""


@dataclass
class _Wait:
    """How a request waits.

    Attributes:
        came_tokens: what the engine had computed when it came.
        uncached_tokens: of its history, when it first stood in line with others; None before.
    """

    came_tokens: int
    uncached_tokens: int | None = None


class HistoryQueue(FCFSRequestQueue):
    """Waiting requests, those in front whose history is cached.

    The clock is what the engine has computed, in tokens: it needs no rate, and goes on in every
    step. A request has its place for good when the next step looks at it: what is evicted or cached
    after that moves nobody, so a history is looked up once, and a step without new requests costs
    nothing.

    Args:
        uncached_tokens: how many tokens of a request would have to be computed now.
    """

    def __init__(self, uncached_tokens: Callable[[Request], int]) -> None:
        super().__init__()
        self.clock_tokens = 0
        self._uncached_tokens = uncached_tokens
        self._waits: WeakKeyDictionary[Request, _Wait] = WeakKeyDictionary()
        self._new: WeakSet[Request] = WeakSet()

    def add_request(self, request: Request) -> None:  # noqa: D102
        self._waits[request] = _Wait(self.clock_tokens)
        self._new.add(request)
        super().add_request(request)

    def peek_request(self) -> Request:  # noqa: D102
        if self._new and len(self) > 1:
            self._place_new()
        return super().peek_request()

    def _place_new(self) -> None:
        """Put those that came last, and stand behind all others, where they belong.

        Some of a flood, first come: a step does not wait until all are looked up.
        """
        came: list[Request] = []
        while self and self[-1] in self._new:
            came.append(self.pop())
        came.reverse()
        for request in came[:MOST_AT_ONCE]:
            place = self._place(request)
            self.insert(bisect_right(self, place, key=self._place), request)
        self.extend(came[MOST_AT_ONCE:])
        self._new = WeakSet(came[MOST_AT_ONCE:])

    def _place(self, request: Request) -> int:
        """The lowest is admitted first."""
        wait = self._waits.get(request)
        if wait is None or request.status == RequestStatus.PREEMPTED:
            return -1  # vLLM put it in front of all others.
        if wait.uncached_tokens is None:
            wait.uncached_tokens = self._uncached_tokens(request)
        return wait.came_tokens + PATIENCE * wait.uncached_tokens


class _AdmitsByHistory:
    """A scheduler of vLLM with another queue of those that wait."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.waiting = self._by_history = HistoryQueue(self._uncached_tokens)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        planned = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self._by_history.clock_tokens += planned.total_num_scheduled_tokens
        return planned

    def _uncached_tokens(self, request: Request) -> int:
        """Neither statistics nor the order of eviction notice the look."""
        manager: Any = self.kv_cache_manager  # type: ignore[attr-defined]
        tokens = request.num_tokens
        if not manager.prefix_cache_lookup_enabled(request):
            return tokens
        _, hit, _ = manager.coordinator.find_longest_cache_hit(request.block_hashes, tokens - 1)
        return tokens - hit


class HistoryScheduler(_AdmitsByHistory, Scheduler):
    """In the place of vLLM's that plans a step when the last one has ended."""


class AsyncHistoryScheduler(_AdmitsByHistory, AsyncScheduler):
    """In the place of vLLM's that plans a step while the last one runs."""


ADMITS_BY_HISTORY = f"{HistoryScheduler.__module__}.{HistoryScheduler.__qualname__}"
"""What the configuration says that has one of them: a name travels to the engine core."""


def history_scheduler(is_async: bool) -> type[Scheduler]:
    """The one that stands for what vLLM would choose."""
    return AsyncHistoryScheduler if is_async else HistoryScheduler
