"""CUDA graphs of model runner V2: what is captured, and what serves a step."""

from tangram.vllm_plugin.compat.hook import Hook, has, takes, uses

_GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils"
_MANAGER = f"{_GRAPHS}:ModelCudaGraphManager"
_OWN_MODE = "a mode with graphs of whole steps for decodes, and others for small steps of any kind"
_HAS_MODE = "vLLM captures decode steps and other small steps whole, each by itself"

HOOKS: tuple[Hook, ...] = (
    takes(
        "graphs that are captured",
        f"{_MANAGER}._init_candidates",
        "small steps with prefill become graphs of whole steps",
        "self",
        upstream=_OWN_MODE,
        until=_HAS_MODE,
    ),
    takes(
        "graph of a step",
        f"{_MANAGER}.dispatch",
        "a step of which a chunk is sampled for drift is no graph",
        "self num_reqs num_tokens uniform_token_count num_active_loras",
        upstream="a metadata builder that may ask for a step without a graph",
        until="a metadata builder may ask for a step without a graph",
    ),
    has(
        "manager of graphs",
        _MANAGER,
        "its lists of what is captured, and of what serves a number of tokens",
        "_candidates _capture_descs compilation_config cudagraph_mode dispatch max_num_reqs",
        upstream=_OWN_MODE,
        until=_HAS_MODE,
    ),
    uses(
        "capture of what is listed",
        f"{_GRAPHS}:CudaGraphManager.capture",
        "what is put on the list is captured",
        "_capture_descs",
        upstream=_OWN_MODE,
        until=_HAS_MODE,
    ),
    has(
        "what a graph serves",
        f"{_GRAPHS}:BatchExecutionDescriptor",
        "another one for whole steps is made of each for pieces",
        "cg_mode num_active_loras num_reqs num_tokens uniform_token_count",
        upstream=_OWN_MODE,
        until=_HAS_MODE,
    ),
    has(
        "kinds of graphs",
        "vllm.config.compilation:CUDAGraphMode",
        "pieces, whole steps, none; and both by the kind of step",
        "FULL FULL_AND_PIECEWISE NONE PIECEWISE",
        upstream=_OWN_MODE,
        until=_HAS_MODE,
    ),
    has(
        "cache among the layers",
        "vllm.config:CompilationConfig",
        "the manager finds the sealed pages there",
        "static_forward_context",
        upstream=_OWN_MODE,
        until=_HAS_MODE,
    ),
    has(
        "size of a step",
        "vllm.config:SchedulerConfig",
        "buffers have room for as many tokens and requests",
        "max_num_batched_tokens max_num_seqs",
        upstream=_OWN_MODE,
        until=_HAS_MODE,
    ),
)
