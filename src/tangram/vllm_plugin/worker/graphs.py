"""Small steps with prefill as one CUDA graph, on model runner V2.

vLLM captures decode steps whole, and of other steps the pieces between attentions, whose launches
then take the host longer than the device. Its mode FULL would capture all of them, decode steps too
with what only prefill needs. So decode steps keep their graphs, and beside them a small step of any
kind has one of its own, in place of the pieces.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tangram.kernels.extend import MAX_STEP_TOKENS
from tangram.vllm_plugin.compat.override import override
from tangram.vllm_plugin.worker.storage import SEALED_NAME, SealedCache

logger = logging.getLogger("vllm.tangram")


def install() -> None:
    """Override what is captured in this process, and what serves a step."""
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    override(ModelCudaGraphManager, "_init_candidates", _init_candidates, {"self"})
    override(
        ModelCudaGraphManager,
        "dispatch",
        _dispatch,
        {"self", "num_reqs", "num_tokens", "uniform_token_count", "num_active_loras"},
    )


def _sealed(manager: Any) -> SealedCache | None:
    """The cache of a worker whose kernels cut small steps."""
    sealed = manager.compilation_config.static_forward_context.get(SEALED_NAME)
    return sealed if sealed is not None and sealed.runner.is_device else None


def _init_candidates(original: Callable) -> Callable:
    def init_candidates(self: Any) -> None:
        from vllm.config.compilation import CUDAGraphMode

        original(self)
        if _sealed(self) is None:
            return
        if self.cudagraph_mode == CUDAGraphMode.FULL_AND_PIECEWISE:
            _capture_small_steps(self)
        elif self.cudagraph_mode != CUDAGraphMode.NONE:
            logger.info(
                "CUDA graph mode %s: small steps with prefill are no single graph; "
                "FULL_AND_PIECEWISE makes them one",
                self.cudagraph_mode.name,
            )

    return init_candidates


def _capture_small_steps(manager: Any) -> None:
    """Put graphs of whole steps in the place of pieces, up to what kernels cut."""
    from vllm.config.compilation import CUDAGraphMode

    pieces = manager._capture_descs.get(CUDAGraphMode.PIECEWISE, [])
    small = [desc for desc in pieces if desc.num_tokens <= MAX_STEP_TOKENS]
    if not small:
        return
    whole = [
        replace(
            desc, cg_mode=CUDAGraphMode.FULL, num_reqs=min(desc.num_tokens, manager.max_num_reqs)
        )
        for desc in small
    ]
    full = manager._capture_descs.setdefault(CUDAGraphMode.FULL, [])
    full.extend(whole)
    full.sort(key=lambda desc: desc.num_tokens, reverse=True)
    manager._capture_descs[CUDAGraphMode.PIECEWISE] = [d for d in pieces if d not in small]
    if not manager._capture_descs[CUDAGraphMode.PIECEWISE]:
        del manager._capture_descs[CUDAGraphMode.PIECEWISE]

    begin: dict[int, int] = {}
    for desc in sorted(whole, key=lambda desc: desc.num_tokens):
        loras = desc.num_active_loras
        for tokens in range(begin.get(loras, 0), desc.num_tokens + 1):
            known = manager._candidates.setdefault((tokens, loras), [])
            known[:] = [d for d in known if d.cg_mode == CUDAGraphMode.FULL] + [desc]
        begin[loras] = desc.num_tokens + 1
    largest = max(desc.num_tokens for desc in whole)
    logger.info("steps of up to %d tokens are one CUDA graph, with prefill too", largest)


def _dispatch(original: Callable) -> Callable:
    """A step of which a chunk is sampled is no graph: the host must cut it."""

    def dispatch(
        self: Any, num_reqs: int, num_tokens: int, uniform_token_count: Any, *args: Any, **kw: Any
    ) -> Any:
        from vllm.config.compilation import CUDAGraphMode

        desc = original(self, num_reqs, num_tokens, uniform_token_count, *args, **kw)
        if desc.cg_mode != CUDAGraphMode.FULL or desc.uniform_token_count is not None:
            return desc
        sealed = _sealed(self)
        if sealed is None or not sealed.samples_next:
            return desc
        return replace(desc, cg_mode=CUDAGraphMode.NONE, num_tokens=num_tokens, num_reqs=num_reqs)

    return dispatch
