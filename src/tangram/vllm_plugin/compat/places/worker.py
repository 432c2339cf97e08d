"""The worker, and the calls that reach it."""

from tangram.vllm_plugin.compat.hook import Hook, has, takes

HOOKS: tuple[Hook, ...] = (
    takes(
        "caches of a model's layers",
        "vllm.v1.worker.gpu_worker:Worker.get_kv_cache_spec",
        "proves that every layer is compressed",
        "self",
        upstream="layers whose backend cannot be chosen by the model",
        until="as long as a model may choose its layers' backend itself",
    ),
    has(
        "worker's configuration",
        "vllm.v1.worker.gpu_worker:Worker",
        "the worker's extension finds the sealed pages in it",
        "vllm_config",
        upstream="extensions that are given the configuration",
        until="as long as the extension is mixed into the worker",
    ),
    takes(
        "calls to workers",
        "vllm:LLM.collective_rpc",
        "proves that the layout is served",
        "method args",
        upstream="calls that go by another way",
        until="as long as a served layout has to be proven",
    ),
)
