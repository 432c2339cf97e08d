"""What the engine core counts of a compressed cache, and how it reaches the frontend.

The managers of the cache groups count while they hand blocks out and take them back. A few times a
second the counts travel with the statistics that the scheduler sends to the frontend anyway, in
the field of KV connectors, which compression refuses. In the frontend `metrics` takes them out
before any of vLLM's own loggers looks there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tangram.geometry import BlockCount
from tangram.plan.compression_plan import plan_of
from tangram.vllm_plugin.compat.override import override
from tangram.vllm_plugin.drift.board import DriftReader, DriftReading, board_path, engine_name

STATS_KEY = "tangram"
INTERVAL_S = 0.25
"""Least time between two of an engine's counts, but that it became idle is told at once."""
KEPT_INTERVAL_S = 5.0
"""The same between two looks at every block of the pool, which takes a few milliseconds."""


@dataclass(frozen=True)
class CacheCounts:
    """The compressed cache at one moment; `new_*` since the last one that was sent.

    Attributes:
        sealed: sealed blocks that running requests hold, a shared one counted once.
        first: those of them that hold a sequence's chunk 0.
        recent: blocks of raw tokens that running requests hold.
        query_ring: blocks of query rings.
        free: blocks that nobody holds; the prefix cache may know what is in them.
        tail_tokens: tokens of running requests past their last boundaries.
        new_chunks: chunks sealed.
        kept_tokens: tokens whose KV was kept for a request or for the prefix cache, those of a
            shared block once, when every block was looked at last.
        kept_blocks: blocks that were kept then, for either.
        drift: what the worker has found, its `sampled_chunks` those since the last; None if not
            asked for, or not found yet.
    """

    sealed: int
    first: int
    recent: int
    query_ring: int
    free: int
    tail_tokens: int
    new_chunks: int
    kept_tokens: int = 0
    kept_blocks: int = 0
    drift: DriftReading | None = None

    @property
    def blocks(self) -> BlockCount:
        """Blocks that are held, by kind."""
        return BlockCount(self.sealed, self.recent, self.query_ring)


@dataclass
class SealedCounts:
    """Counts of one manager of sealed blocks.

    Attributes:
        chunks_sealed: blocks handed out to be sealed, ever.
        sent_chunks: those that the frontend knows of.
        sent_at: when it was told last, in seconds of the monotonic clock.
        kept: tokens and blocks that were kept when every block was looked at last.
        kept_at: when that was.
        engine: name of the engine, under which its worker tells of drift.
    """

    chunks_sealed: int = 0
    sent_chunks: int = 0
    sent_at: float = 0.0
    kept: tuple[int, int] = 0, 0
    kept_at: float = 0.0
    engine: str = field(default_factory=engine_name)
    _drift: DriftReader | None = None
    _holders: dict[int, int] = field(default_factory=dict)
    _holders_of_first: dict[int, int] = field(default_factory=dict)

    @property
    def held(self) -> int:
        """Blocks that some request holds."""
        return len(self._holders)

    @property
    def held_first(self) -> int:
        """Blocks of chunk 0 that some request holds."""
        return len(self._holders_of_first)

    def read_drift(self, vllm_config: Any) -> DriftReading | None:
        """The worker's drift, if the configuration asks for it."""
        if self._drift is None:
            plan = plan_of(vllm_config.additional_config)
            is_sampled = plan is not None and plan.drift_sample > 0
            self._drift = DriftReader(board_path(self.engine, vllm_config) if is_sampled else None)
        return self._drift.read()

    def take(self, blocks: Iterable[Any], is_first: bool) -> None:
        """A request holds more blocks; `is_first` tells that it had none before."""
        for block in blocks:
            key = block.block_id
            self._holders[key] = self._holders.get(key, 0) + 1
            if is_first:
                first = self._holders_of_first
                first[key] = first.get(key, 0) + 1
                is_first = False

    def give_back(self, blocks: Iterable[Any]) -> None:
        """A request gives all its blocks back; they are in the order of its chunks."""
        for index, block in enumerate(blocks):
            _drop(self._holders, block.block_id)
            if index == 0:
                _drop(self._holders_of_first, block.block_id)


def _drop(holders: dict[int, int], key: int) -> None:
    left = holders.pop(key) - 1
    if left:
        holders[key] = left


def send_counts_with_statistics() -> None:
    """Let the scheduler of this process send the counts; called where there are managers."""
    from vllm.v1.core.sched.scheduler import Scheduler

    override(Scheduler, "make_stats", _make_stats, {"self", "kv_connector_stats"})


def _make_stats(original: Callable) -> Callable:
    """vLLM's statistics have no field for a cache's own; without our managers nothing changes."""

    def make_stats(self: Any, *args: Any, **kwargs: Any) -> Any:
        stats = original(self, *args, **kwargs)
        sealed = _sealed_counts(self)
        if stats is None or sealed is None:
            return stats
        now = time.monotonic()
        if not self.running or now - sealed.sent_at >= INTERVAL_S:
            counts = count_blocks(self)
            if not self.running or now - sealed.kept_at >= KEPT_INTERVAL_S:
                sealed.kept, sealed.kept_at = count_kept(self, counts), now
            tokens, blocks = sealed.kept
            drift = sealed.read_drift(self.vllm_config)
            counts = replace(counts, kept_tokens=tokens, kept_blocks=blocks, drift=drift)
            stats.kv_connector_stats = {STATS_KEY: asdict(counts)}
            sealed.sent_at, sealed.sent_chunks = now, sealed.chunks_sealed
        return stats

    return make_stats


def _sealed_counts(scheduler: Any) -> SealedCounts | None:
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    return next((m.counts for m in managers if hasattr(m, "counts")), None)


def count_blocks(scheduler: Any) -> CacheCounts:
    """What a scheduler's running requests hold now, and the chunks not yet told."""
    manager = scheduler.kv_cache_manager
    by_spec = {type(m.kv_cache_spec).__name__: m for m in manager.coordinator.single_type_managers}
    counts: SealedCounts = by_spec["SealedSpec"].counts
    C = by_spec["SealedSpec"].block_size
    ring = by_spec.get("QueryRingSpec")
    rings = ring.kv_cache_spec.shape.ring_blocks * len(ring.req_to_blocks) if ring else 0
    free = manager.block_pool.get_num_free_blocks()
    return CacheCounts(
        sealed=counts.held,
        first=counts.held_first,
        # The null block is neither free nor anybody's.
        recent=manager.block_pool.num_gpu_blocks - 1 - free - counts.held - rings,
        query_ring=rings,
        free=free,
        tail_tokens=sum(request.num_computed_tokens % C for request in scheduler.running),
        new_chunks=counts.chunks_sealed - counts.sent_chunks,
    )


def count_kept(scheduler: Any, counts: CacheCounts) -> tuple[int, int]:
    """Tokens and blocks that a request holds or the prefix cache would find.

    Args:
        scheduler: whose pool is looked through, block by block.
        counts: of this moment.
    """
    from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

    manager = scheduler.kv_cache_manager
    (sealed,) = (m for m in manager.coordinator.single_type_managers if hasattr(m, "counts"))
    cached = [
        key
        for block in manager.block_pool.blocks
        if block.ref_cnt == 0 and (key := block.block_hash) is not None
    ]
    # A key ends in its group; to take each one apart would take twice as long.
    nothing: Any = b""
    group = make_block_hash_with_group_id(nothing, sealed.kv_cache_group_id)
    chunks = counts.sealed + sum([key.endswith(group) for key in cached])
    tokens = chunks * sealed.block_size + counts.tail_tokens
    return tokens, counts.blocks.total + len(cached)


def take_counts(stats: Any) -> CacheCounts | None:
    """The counts in statistics that came from an engine core; they are not there afterwards."""
    plain = None if stats is None else stats.kv_connector_stats
    if not plain or STATS_KEY not in plain:
        return None
    stats.kv_connector_stats = None
    fields = dict(plain[STATS_KEY])
    drift = fields.pop("drift", None)
    return CacheCounts(**fields, drift=None if drift is None else DriftReading(*drift))
