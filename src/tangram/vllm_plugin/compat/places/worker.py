"""The worker, and the calls that reach it."""

from tangram.vllm_plugin.compat.hook import Hook, has, takes

_WINDING_BACK = "generators that are wound back by their state rather than an offset"
_CAN_WIND_BACK = "vLLM's CPU runner keeps the generator of a sample that it discards"

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
    has(
        "worker's model",
        "vllm.v1.worker.gpu_worker:Worker",
        "gates are put beside its projections, after its weights are loaded",
        "get_model",
        upstream="models that run before their caches' specs are asked for",
        until="as long as a scorer makes scores of hidden states",
    ),
    has(
        "width of a model",
        "vllm.config:ModelConfig",
        "gates have to fit hidden states",
        "get_hidden_size",
        upstream="another name",
        until="as long as a scorer makes scores of hidden states",
    ),
    takes(
        "sampling of a step",
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner.sample_tokens",
        "a seeded request whose prompt takes several steps would end the CPU engine",
        "self grammar_output",
        upstream=_WINDING_BACK,
        until=_CAN_WIND_BACK,
    ),
    has(
        "samples that are discarded",
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        "they are those of a prompt's steps before its last",
        "discard_request_mask input_batch vllm_config",
        upstream=_WINDING_BACK,
        until=_CAN_WIND_BACK,
    ),
    has(
        "buffers of a step",
        "vllm.v1.utils:CpuGpuBuffer",
        "which samples are discarded is known on the host",
        "np",
        upstream=_WINDING_BACK,
        until=_CAN_WIND_BACK,
    ),
    has(
        "generators of seeded requests",
        "vllm.v1.worker.gpu_input_batch:InputBatch",
        "a sample that is discarded draws on none",
        "generators num_reqs",
        upstream=_WINDING_BACK,
        until=_CAN_WIND_BACK,
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
