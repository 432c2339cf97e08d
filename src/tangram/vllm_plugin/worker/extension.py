"""What compression adds to vLLM's worker, and the proof that it is there.

The configuration names this class by its path, so a worker process in which the plugin cannot be
imported fails at start instead of serving uncompressed. So does a model that keeps another cache.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from tangram.geometry import HeadGroups
from tangram.plan.compression_plan import plan_of
from tangram.vllm_plugin.compat.override import override
from tangram.vllm_plugin.worker import graphs, sampling, selection
from tangram.vllm_plugin.worker.gates import attach_gates
from tangram.vllm_plugin.worker.refusals import refuse_uncompressed
from tangram.vllm_plugin.worker.storage import SEALED_NAME


def _get_kv_cache_spec(original: Callable) -> Callable:
    """A model may choose its layers' backend itself, and then none of our code is asked.

    It is asked before the model runs for the first time, and so before it is compiled.
    """

    def get_kv_cache_spec(self: Any) -> dict[str, Any]:
        specs = original(self)
        plan = plan_of(self.vllm_config.additional_config)
        if plan is not None:
            refuse_uncompressed(specs, plan.layer_map)
            config = self.vllm_config
            attach_gates(
                self.get_model(),
                config.compilation_config.static_forward_context[SEALED_NAME],
                config.scheduler_config.max_num_batched_tokens,
            )
        return specs

    return get_kv_cache_spec


graphs.install()
sampling.install()
selection.install()
override(Worker, "get_kv_cache_spec", _get_kv_cache_spec, {"self"})


class CompressionWorkerExtension:
    """Calls that `collective_rpc` reaches; vLLM mixes this class into its worker."""

    def tangram_status(self) -> dict[str, Any]:
        """The layout that this worker serves, from its cache rather than from its options.

        And where the plan had the budgets from.
        """
        sealed = self._tangram_sealed()
        plan = plan_of(self.vllm_config.additional_config)  # type: ignore[attr-defined]
        assert plan is not None, "there are sealed pages"
        return {
            "layout": sealed.geometry.digest,
            "scorer": sealed.scorer.name,
            "budgets": plan.budgets_title,
            "blocks": sealed.kv_cache.shape[0],
            "block_bytes": sealed.kv_cache.stride(0) * sealed.kv_cache.element_size(),
        }

    def tangram_checksums(self, blocks: list[int]) -> list[int]:
        """A checksum of the sealed rows of each of the blocks."""
        pages = self._tangram_sealed().pages
        return [zlib.crc32(pages[block].float().cpu().numpy().tobytes()) for block in blocks]

    def tangram_replace_budgets(self, heads: list[list[list[int]]], pages: list[list[int]]) -> None:
        """Lay the sealed blocks out anew; `swap.swap_budgets` tells when that may be done."""
        self._tangram_sealed().replace_budgets(HeadGroups.from_lists(heads, pages))

    def _tangram_sealed(self) -> Any:
        config = self.vllm_config  # type: ignore[attr-defined]
        return config.compilation_config.static_forward_context[SEALED_NAME]
