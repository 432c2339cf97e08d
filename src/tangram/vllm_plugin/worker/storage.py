"""The caches that belong to no single layer: sealed pages of all layers, and the query ring.

vLLM allocates, binds and gives metadata to whatever is an `AttentionLayerBase` in the static
forward context. These two are, under names of their own; the attention layers' implementation finds
them there in every forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheSpec

from tangram.geometry import HeadGroups
from tangram.kernels.extend import MAX_STEP_TOKENS
from tangram.kernels.seal_decode import SealScorer
from tangram.kernels.segments import cut_step
from tangram.kernels.served import has_kernels
from tangram.plan.compression_plan import CompressionPlan
from tangram.plan.drift_reference import DriftReference
from tangram.profile import Profile
from tangram.scorers.base import Scorer
from tangram.vllm_plugin.core.specs import QueryRingSpec, SealedSpec
from tangram.vllm_plugin.drift.board import DriftBoard, board_path, engine_name
from tangram.vllm_plugin.drift.monitor import DriftMonitor
from tangram.vllm_plugin.worker.runners.base import LayerRunner
from tangram.vllm_plugin.worker.runners.device import DeviceKernels
from tangram.vllm_plugin.worker.runners.flash import find_flash_attention
from tangram.vllm_plugin.worker.runners.host import HostRunner

# vLLM wants exactly one integer in the name of a layer that has a cache.
SEALED_NAME = "tangram.0.sealed"
RING_NAME = "tangram.0.query_ring"


class _SharedCache(nn.Module, AttentionLayerBase):
    """A cache that all attention layers of the rank share.

    Attributes:
        geometry: the layout. `SealedCache` has the one in force; whoever needs budgets asks it in
            every step. The specs and the ring keep the one that the engine began with, of which
            they need nothing that `replace_budgets` can change.
    """

    def __init__(
        self, plan: CompressionPlan, dtype: torch.dtype, backend: type[AttentionBackend]
    ) -> None:
        super().__init__()
        self._backend = backend
        self.geometry = plan.geometry
        self.dtype = dtype
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        """The backend whose builder makes this cache's metadata."""
        return self._backend


class SealedCache(_SharedCache):
    """Sealed pages of all layers, and the scorer that decides what goes into them.

    Attributes:
        gates: [layers], what makes scores with their tokens; None for other scorers.
        step_scores: [tokens or more, kv_heads] float32, scores of the step's tokens, of the layer
            whose projection ran last; None for other scorers.
    """

    def __init__(
        self,
        plan: CompressionPlan,
        dtype: torch.dtype,
        backend: type[AttentionBackend],
        gates: nn.ModuleList | None = None,
    ) -> None:
        super().__init__(plan, dtype, backend)
        self.gates = gates
        self.step_scores: Tensor | None = None
        self._plan = plan
        self.scorer: Scorer = plan.scorer
        self._profile: Profile | None = (
            plan.load_profile() if self.scorer.needs_statistics else None
        )
        self._layers = plan.layer_map
        self._ordinals: dict[str, int | None] = {}
        self.runner: LayerRunner = HostRunner()
        self.drift: DriftMonitor | None = None
        self._keeps_step = False
        self._statistics: dict[tuple[int, torch.device], dict[str, Tensor]] = {}

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """One block of this group is one sealed chunk."""
        return SealedSpec.of(self.geometry.block_shape, self.dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        """vLLM gives the cache, and takes it back, by setting `kv_cache`."""
        super().__setattr__(name, value)
        if name == "kv_cache" and hasattr(self, "runner"):
            self.runner.forget_caches()

    def ordinal_of(self, layer_name: str) -> int | None:
        """The ordinal of a layer by vLLM's name for it; None if it is not compressed."""
        if layer_name not in self._ordinals:
            self._ordinals[layer_name] = self._layers.ordinal(extract_layer_index(layer_name))
        return self._ordinals[layer_name]

    @property
    def pages(self) -> Tensor:
        """[blocks, pages_per_block, H_p, P, 2 * head_size], a view of the pool."""
        g, pool = self.geometry, self.kv_cache
        blocks, _, _, width = pool.shape
        block, _, row, element = pool.stride()
        page = g.page_size_rows * row
        return pool.as_strided(
            (blocks, g.pages_per_block, g.page_group_size, g.page_size_rows, width),
            (block, g.page_group_size * page, page, row, element),
        )

    def prepare_device(self, device: torch.device, vllm_config: VllmConfig) -> None:
        """Make the kernels' tables, if kernels serve this layout on this device.

        Called whenever vLLM is about to make the caches.
        """
        self._keeps_step = vllm_config.parallel_config.data_parallel_size > 1
        if self._plan.drift_sample and self.drift is None:
            self.drift = self._make_drift_monitor(device, vllm_config)
        if self.runner.is_device:
            return
        served = has_kernels(self.geometry, self.scorer.name, self.dtype)
        if device.type != "cuda" or not served:
            return
        layers = self._compressed(get_layers_from_vllm_config(vllm_config, Attention))
        self.runner = DeviceKernels(
            self.geometry,
            SealScorer.of(
                self.scorer,
                {} if self._profile is None else self._profile.arrays,
                self.geometry,
                vllm_config.model_config.max_model_len,
                device,
            ),
            device,
            vllm_config.scheduler_config.max_num_seqs,
            recent_caches=lambda: [layer.kv_cache for layer in layers],
            flash=find_flash_attention(
                self.geometry,
                self.dtype,
                device,
                vllm_config.attention_config.flash_attn_version,
            ),
            max_step_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        )

    def cuts_on_device(self, tokens: int, is_decode: bool) -> bool:
        """Whether kernels cut a step: of single tokens, or small and with no chunk to sample."""
        if not self.runner.is_device:
            return False
        return is_decode or (tokens <= MAX_STEP_TOKENS and not self.samples_next)

    @property
    def samples_next(self) -> bool:
        """Whether the next step with prefill is one that the host must cut, to sample a chunk.

        Ranks that keep step agree on the graph of a step before each of them runs it. There larger
        steps alone are sampled.
        """
        return self.drift is not None and self.drift.is_due and not self._keeps_step

    def pass_over(self, query_start: np.ndarray, num_tokens: np.ndarray) -> None:
        """Count the chunks of a small step that kernels cut, of which none is sampled.

        Args:
            query_start: [requests + 1] int64, where each request's queries begin.
            num_tokens: [requests] int64, tokens computed after the step.
        """
        if self.drift is not None:
            self.drift.pass_over(cut_step(self.geometry, query_start, num_tokens)[1])

    def replace_budgets(self, head_groups: HeadGroups) -> None:
        """Lay sealed blocks out anew; what they hold until now is lost.

        No step may be running, nothing in a block may be hit afterwards, and no captured graph may
        be replayed: `swap.swap_budgets` sees to all three.

        Raises:
            BudgetError: budgets of another size, see `geometry.replace_budgets`.
        """
        self.geometry = self.geometry.replace_budgets(head_groups)
        self.runner = self.runner.for_layout(self.geometry)

    def _compressed(self, layers: Mapping[str, Any]) -> list[Any]:
        """Those of a model's attention layers that are compressed, in order."""
        ordinals = {name: self.ordinal_of(name) for name in layers}
        found = {ordinal: layers[name] for name, ordinal in ordinals.items() if ordinal is not None}
        assert found.keys() == set(range(self.geometry.num_layers)), sorted(found)
        return [found[ordinal] for ordinal in range(len(found))]

    def _make_drift_monitor(self, device: torch.device, vllm_config: VllmConfig) -> DriftMonitor:
        plan = self._plan
        reference = DriftReference.of(plan.load_profile(), plan.level, plan.ratio, plan.geometry)
        board = DriftBoard(board_path(engine_name(), vllm_config), create=True)
        return DriftMonitor(reference, plan.drift_sample, device, board)

    def statistics(self, layer: int, device: torch.device) -> dict[str, Tensor]:
        """The profile's arrays of a layer, on the device; empty when the scorer needs none."""
        if self._profile is None:
            return {}
        key = (layer, device)
        if key not in self._statistics:
            self._statistics[key] = {
                name: torch.from_numpy(array.copy()).to(device)
                for name, array in self._profile.layer_statistics(layer).items()
                if name in self.scorer.needs_statistics
            }
        return self._statistics[key]


class QueryRing(_SharedCache):
    """The last W queries of every running request; position p lies at p % W."""

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """Blocks of this group are private to a request and never cached."""
        return QueryRingSpec.of(self.geometry.block_shape, self.dtype)

    @property
    def queries(self) -> Tensor:
        """[blocks, ring_block_tokens, layers, query_heads, head_size], a view of the pool."""
        g = self.geometry
        return self.kv_cache[:, 0].unflatten(2, (g.num_layers, g.num_query_heads, g.head_size))
