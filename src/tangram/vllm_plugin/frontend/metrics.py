"""Compression's Prometheus metrics and its line in vLLM's periodic log, in the frontend.

vLLM loads loggers that an entry point names whether or not compression is on, and turns statistics
on for them; so this one is added where a configuration asks for compression, and only there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase, StatLoggerManager

from tangram.geometry import BlockCount
from tangram.plan.compression_plan import CompressionPlan, plan_of
from tangram.scorers import list_parameters
from tangram.vllm_plugin.compat.override import override
from tangram.vllm_plugin.core.counts import CacheCounts, take_counts

logger = logging.getLogger("vllm.tangram")

PREFIX = "tangram:"
ENGINE_LABELS = ("model_name", "engine")
LAYOUT_LABELS = ("layout", "scorer", "level", "ratio", "chunk_size", "scorer_parameters")
DRIFT = {
    "deviation": "How far heads' shares are off calibration's samples, in their deviations.",
    "limit": "Deviation beyond which calibration does not cover the traffic.",
    "heads_over_budget": "Share of heads that want more than their budget.",
    "expected_over_budget": "Share of heads that wanted more than it in calibration's samples.",
}
"""Fields of a drift reading that are gauges."""
MIB = 1 << 20
REFUSALS = ("max_num_queued_reqs", "max_num_queued_tokens")
"""Reasons for which vLLM tells its loggers that it refused a request."""


def add_logger_to_frontend() -> None:
    """Let every engine of this process whose configuration has a plan count compression too."""
    override(
        StatLoggerManager,
        "__init__",
        _init,
        {"vllm_config", "custom_stat_loggers", "enable_default_loggers", "client_count"},
    )


def _init(original: Callable) -> Callable:
    """An entry point's logger would change what vLLM does without compression."""

    def __init__(
        self: Any,
        vllm_config: VllmConfig,
        engine_idxs: list[int] | None = None,
        custom_stat_loggers: list | None = None,
        enable_default_loggers: bool = True,
        **kwargs: Any,
    ) -> None:
        if plan_of(vllm_config.additional_config) is not None:
            # First of all, because it takes the counts out of where vLLM's own would stumble.
            # Of several API servers each sees a part, so vLLM does not log there, and nor do we.
            writes_log = enable_default_loggers and kwargs.get("client_count", 1) == 1
            kind = WritingCompressionLogger if writes_log else CompressionLogger
            custom_stat_loggers = [kind, *(custom_stat_loggers or ())]
        original(
            self, vllm_config, engine_idxs, custom_stat_loggers, enable_default_loggers, **kwargs
        )

    return __init__


@dataclass(frozen=True)
class Families:
    """The metrics of all engines of this process; earlier ones are dropped, as vLLM's own are."""

    blocks: Gauge
    block_bytes: Gauge
    retained_rows: Gauge
    retained_bytes: Gauge
    saved_bytes: Gauge
    cached_saved_bytes: Gauge
    layout_info: Gauge
    chunks_sealed: Counter
    refused_requests: Counter
    drift: dict[str, Gauge]
    drift_sampled_chunks: Counter | None

    @classmethod
    def register(cls, has_drift: bool) -> Families:
        """Make them anew; those of drift only where it is sampled."""
        for collector in list(REGISTRY._collector_to_names):
            if str(getattr(collector, "_name", "")).startswith(PREFIX):
                REGISTRY.unregister(collector)
        return cls(
            blocks=_gauge("blocks", "Blocks of the pool, by what running requests hold.", "kind"),
            block_bytes=_gauge("block_bytes", "Bytes of a block of the pool."),
            retained_rows=_gauge("retained_rows", "Rows kept of the chunks in sealed blocks."),
            retained_bytes=_gauge("retained_bytes", "Bytes of the rows kept."),
            saved_bytes=_gauge(
                "saved_bytes",
                "Full KV of the running requests' tokens less the blocks that they hold.",
            ),
            cached_saved_bytes=_gauge(
                "cached_saved_bytes",
                "Full KV of the tokens that requests and the prefix cache keep less their blocks.",
            ),
            layout_info=_gauge(
                "layout_info", "What the KV cache is compressed to; always 1.", *LAYOUT_LABELS
            ),
            chunks_sealed=Counter(PREFIX + "chunks_sealed", "Chunks sealed.", ENGINE_LABELS),
            refused_requests=Counter(
                PREFIX + "refused_requests",
                "Requests refused before they reached an engine.",
                ("model_name", "reason"),
            ),
            drift={field: _gauge("drift_" + field, text) for field, text in DRIFT.items()}
            if has_drift
            else {},
            drift_sampled_chunks=Counter(
                PREFIX + "drift_sampled_chunks",
                "Sealed chunks that were compared with the profile.",
                ENGINE_LABELS,
            )
            if has_drift
            else None,
        )


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    # Of several API servers the one that heard of the engine last is right.
    return Gauge(PREFIX + name, text, (*ENGINE_LABELS, *labels), multiprocess_mode="mostrecent")


class EngineMetrics:
    """The metrics of one engine.

    Args:
        families: the metrics of all engines.
        plan: what is served.
        labels: values of `ENGINE_LABELS`.
    """

    def __init__(self, families: Families, plan: CompressionPlan, *labels: str) -> None:
        self._geometry = g = plan.geometry
        self._blocks = {
            kind: families.blocks.labels(*labels, kind) for kind in (*BlockCount._fields, "free")
        }
        self._retained_rows = families.retained_rows.labels(*labels)
        self._retained_bytes = families.retained_bytes.labels(*labels)
        self._saved_bytes = families.saved_bytes.labels(*labels)
        self._cached_saved_bytes = families.cached_saved_bytes.labels(*labels)
        self._chunks_sealed = families.chunks_sealed.labels(*labels)
        families.block_bytes.labels(*labels).set(g.block_bytes)
        families.layout_info.labels(
            *labels, g.digest, plan.scorer_name, plan.level, plan.ratio, g.chunk_size_tokens,
            list_parameters(plan.scorer_parameters),
        ).set(1)  # fmt: skip
        self._drift = {field: gauge.labels(*labels) for field, gauge in families.drift.items()}
        sampled = families.drift_sampled_chunks
        self._drift_sampled = sampled and sampled.labels(*labels)
        self._last: CacheCounts | None = None
        self._chunks = self._logged_chunks = 0

    def begin(self, num_blocks: int) -> None:
        """Tell the size of the pool, all of which is free but vLLM's null block."""
        self._blocks["free"].set(num_blocks - 1)

    def observe(self, counts: CacheCounts) -> None:
        """Take over what the engine core counted."""
        g, self._last = self._geometry, counts
        for kind, number in counts.blocks._asdict().items():
            self._blocks[kind].set(number)
        self._blocks["free"].set(counts.free)
        rows = g.retained_rows(counts.sealed, counts.first)
        self._retained_rows.set(rows)
        self._retained_bytes.set(g.rows_bytes(rows))
        self._saved_bytes.set(g.saved_bytes(counts.blocks, counts.tail_tokens))
        kept = g.full_bytes(counts.kept_tokens) - g.pool_bytes(counts.kept_blocks)
        self._cached_saved_bytes.set(kept)
        self._chunks_sealed.inc(counts.new_chunks)
        self._chunks += counts.new_chunks
        if counts.drift is not None and self._drift_sampled is not None:
            self._drift_sampled.inc(counts.drift.sampled_chunks)
            for field, gauge in self._drift.items():
                gauge.set(getattr(counts.drift, field))

    def line(self) -> tuple[int, str] | None:
        """Level and text of a line of the log; None before there is anything to tell."""
        if self._last is None:
            return None
        g, counts = self._geometry, self._last
        sealed, self._logged_chunks = self._chunks - self._logged_chunks, self._chunks
        drift = ""
        if counts.drift is not None:
            drift = f", drift: {counts.drift.deviation:.2f} (limit {counts.drift.limit:g})"
        kept = g.rows_bytes(g.retained_rows(counts.sealed, counts.first))
        saved = g.saved_bytes(counts.blocks, counts.tail_tokens)
        return logging.INFO if sealed or counts.blocks.total else logging.DEBUG, (
            f"KV compression: {kept / MIB:.1f} MiB of rows kept, {saved / MIB:.1f} MiB saved "
            f"against full KV, chunks sealed: {sealed} new, {self._chunks} in all, blocks: "
            f"{counts.sealed} sealed, {counts.recent} recent, {counts.query_ring} query ring, "
            f"{counts.free} free{drift}"
        )


class CompressionLogger(AggregateStatLoggerBase):
    """Turns the engine core's counts into metrics of this process."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        config: Any = vllm_config.additional_config
        plan = plan_of(config)
        assert plan is not None, "added only where there is a plan"
        families = Families.register(plan.drift_sample > 0)
        self._cache_config = vllm_config.cache_config
        model = vllm_config.model_config.served_model_name
        self._engines = {
            index: EngineMetrics(families, plan, model, str(index)) for index in engine_indexes
        }
        self._refused = {
            reason: families.refused_requests.labels(model, reason) for reason in REFUSALS
        }

    def record(  # noqa: D102
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        plain = take_counts(scheduler_stats)
        if plain is not None and engine_idx in self._engines:
            self._engines[engine_idx].observe(plain)

    def record_admission_rejection(self, reason: str) -> None:
        """Count a request that vLLM refused because too many wait."""
        if reason in self._refused:
            self._refused[reason].inc()

    def log_engine_initialized(self) -> None:
        """The pool has its size; the configuration has announced the layout."""
        blocks = (self._cache_config.num_gpu_blocks or 1) // len(self._engines)  # a sum over them
        for engine in self._engines.values():
            engine.begin(blocks)


class WritingCompressionLogger(CompressionLogger):
    """Writes a line for every engine in vLLM's periodic log as well."""

    def log(self) -> None:  # noqa: D102
        for index, engine in self._engines.items():
            line = engine.line()
            if line is not None:
                logger.log(line[0], "Engine %03d: %s", index, line[1])
