"""Statistics of the engine core, and the loggers that make metrics of them."""

from tangram.vllm_plugin.compat.hook import Hook, has, takes

_LOGGERS = "vllm.v1.metrics.loggers"
_LOGGER = f"{_LOGGERS}:AggregateStatLoggerBase"
_FIELD = "statistics that a cache manager can add to"
_NO_FIELD = "vLLM's statistics have room for a cache's own"
_NO_LOGGER = "a plugin can add a logger only where a configuration asks for it"

HOOKS: tuple[Hook, ...] = (
    takes(
        "scheduler's statistics",
        "vllm.v1.core.sched.scheduler:Scheduler.make_stats",
        "sends the counts of the cache to the frontend",
        "kv_connector_stats",
        upstream=_FIELD,
        until=_NO_FIELD,
    ),
    has(
        "parts of the scheduler",
        "vllm.v1.core.sched.scheduler:Scheduler",
        "which requests run, and what they hold",
        "kv_cache_manager running vllm_config",
        upstream=_FIELD,
        until=_NO_FIELD,
    ),
    has(
        "statistics of a step",
        "vllm.v1.metrics.stats:SchedulerStats",
        "the counts travel in the field of KV connectors, which compression refuses",
        "kv_connector_stats",
        upstream=_FIELD,
        until=_NO_FIELD,
    ),
    takes(
        "loggers of statistics",
        f"{_LOGGERS}:StatLoggerManager.__init__",
        "adds the metrics of compression to vLLM's own",
        "vllm_config engine_idxs custom_stat_loggers enable_default_loggers client_count",
        upstream="loggers of plugins that turn nothing else on",
        until=_NO_LOGGER,
    ),
    takes(
        "making a logger",
        f"{_LOGGER}.__init__",
        "makes the metrics of all engines of a process",
        "vllm_config engine_indexes",
        upstream="loggers that are made per engine",
        until="as long as vLLM makes metrics by loggers",
    ),
    takes(
        "statistics that arrive",
        f"{_LOGGER}.record",
        "takes the counts out before vLLM's own loggers look",
        "scheduler_stats iteration_stats mm_cache_stats engine_idx",
        upstream=_FIELD,
        until=_NO_FIELD,
    ),
    takes(
        "refused requests",
        f"{_LOGGER}.record_admission_rejection",
        "counts requests that vLLM refuses because too many wait",
        "reason",
        upstream="a metric of vLLM's own of refused requests",
        until="vLLM counts them itself",
    ),
    has(
        "moments of a logger",
        _LOGGER,
        "the pool has its size; a line of the log is due",
        "log log_engine_initialized",
        upstream="further moments",
        until="as long as vLLM makes metrics by loggers",
    ),
)
