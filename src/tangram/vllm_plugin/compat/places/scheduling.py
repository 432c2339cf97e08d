"""The scheduler: in which order it admits requests that wait, and what it finds of them."""

from tangram.vllm_plugin.compat.hook import Hook, has, takes, uses

_SCHED = "vllm.v1.core.sched"
_SCHEDULER = f"{_SCHED}.scheduler:Scheduler"
_QUEUE = f"{_SCHED}.request_queue:FCFSRequestQueue"
_POLICY = "a scheduling policy that heeds the prefix cache"
_NO_POLICY = "vLLM admits requests by what is cached of them"

HOOKS: tuple[Hook, ...] = (
    has(
        "choice of the scheduler",
        "vllm.config:SchedulerConfig",
        "names the plugin's scheduler where the user named none, and asked for no priorities",
        "async_scheduling policy scheduler_cls",
        upstream=_POLICY,
        until=_NO_POLICY,
    ),
    takes(
        "class of the scheduler",
        "vllm.config:SchedulerConfig.get_scheduler_cls",
        "vLLM warns of a scheduler from outside that it may be slow",
        "self",
        upstream="a promised interface of schedulers",
        until="vLLM does not warn of a subclass of the scheduler that it would choose",
    ),
    has(
        "prefix caching",
        "vllm.config:CacheConfig",
        "without it there is nothing to order by",
        "enable_prefix_caching",
        upstream="fields that move or get other names",
        until=_NO_POLICY,
    ),
    has(
        "scheduler while steps overlap",
        f"{_SCHED}.async_scheduler",
        "the plugin's goes on from the one that vLLM would choose",
        "AsyncScheduler",
        upstream="one scheduler for both",
        until=_NO_POLICY,
    ),
    has(
        "queue of a scheduler",
        _SCHEDULER,
        "is another one, and looks histories up",
        "kv_cache_manager waiting",
        upstream=_POLICY,
        until=_NO_POLICY,
    ),
    takes(
        "making a scheduler",
        f"{_SCHEDULER}.__init__",
        "replaces the queue",
        "vllm_config kv_cache_config",
        upstream=_POLICY,
        until=_NO_POLICY,
    ),
    uses(
        "planning a step",
        f"{_SCHEDULER}.schedule",
        "the order is made when a step first asks for a request",
        "peek_request",
        upstream="other queues of requests that wait",
        until=_NO_POLICY,
    ),
    has(
        "a step",
        f"{_SCHED}.output:SchedulerOutput",
        "the tokens that the engine has computed are the queue's clock",
        "total_num_scheduled_tokens",
        upstream=_POLICY,
        until=_NO_POLICY,
    ),
    takes(
        "adding to the queue",
        f"{_QUEUE}.add_request",
        "when a request came",
        "request",
        upstream="other queues of requests that wait",
        until=_NO_POLICY,
    ),
    takes(
        "the first of the queue",
        f"{_QUEUE}.peek_request",
        "puts those first whose history is cached",
        "self",
        upstream="other queues of requests that wait",
        until=_NO_POLICY,
    ),
    has(
        "a request that waits",
        "vllm.v1.request:Request",
        "its history, and whether it was preempted",
        "block_hashes num_tokens status",
        upstream=_POLICY,
        until=_NO_POLICY,
    ),
    has(
        "preempted requests",
        "vllm.v1.request:RequestStatus",
        "they stay in front",
        "PREEMPTED",
        upstream="another place for them",
        until=_NO_POLICY,
    ),
    takes(
        "whether a history is looked up",
        "vllm.v1.core.kv_cache_manager:KVCacheManager.prefix_cache_lookup_enabled",
        "requests that read no cache have nothing cached",
        "request",
        upstream="a lookup that counts nothing",
        until=_NO_POLICY,
    ),
    takes(
        "looking a history up",
        "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.find_longest_cache_hit",
        "what is cached of a request that waits, without a trace in statistics or blocks",
        "block_hashes max_cache_hit_length",
        upstream="a lookup that counts nothing",
        until=_NO_POLICY,
    ),
)
