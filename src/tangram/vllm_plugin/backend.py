"""vLLM's attention backend for compressed layers: specs, metadata, and one layer's forward.

Within a layer, every chunk that a step completes is sealed for all requests before any request
attends: requests with the same prefix may hit each other's blocks within one step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from tangram.geometry import Geometry
from tangram.kernels.attend import attend
from tangram.kernels.segments import SealingChunks, Segments, cut_step
from tangram.vllm_plugin.cache_groups import QueryRingSpec, RecentSpec, SealedSpec
from tangram.vllm_plugin.plan import plan_of
from tangram.vllm_plugin.refusals import refuse_layer
from tangram.vllm_plugin.sealing import Step, seal_step, store_window_queries
from tangram.vllm_plugin.storage import RING_NAME, SEALED_NAME, QueryRing, SealedCache


@dataclass
class CompressedMetadata:
    """One cache group's view of a step.

    Attributes:
        block_table: [requests, blocks] int32, blocks of the group.
        slot_mapping: [tokens] int64, slots of the step's tokens; only the recent group's is used.
        num_tokens: tokens of the step, without padding.
        query_start: [requests + 1] int64 on the host.
        num_tokens_after: [requests] int64 on the host, tokens computed after the step.
        segments: the step cut at multiples of C.
        sealing: chunks that the step completes.
    """

    block_table: Tensor
    slot_mapping: Tensor
    num_tokens: int
    query_start: np.ndarray
    num_tokens_after: np.ndarray
    segments: Segments
    sealing: SealingChunks


class CompressedMetadataBuilder(AttentionMetadataBuilder[CompressedMetadata]):
    """Metadata of one cache group; the same for all three but for the blocks."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        assert isinstance(kv_cache_spec, SealedSpec | RecentSpec | QueryRingSpec)
        self.geometry: Geometry = kv_cache_spec.geometry

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CompressedMetadata:
        """Cut the step; host integers only."""
        common = common_attn_metadata
        lengths = common.seq_lens_cpu_upper_bound
        lengths = common.seq_lens.cpu() if lengths is None else lengths
        after = lengths[: common.num_reqs].numpy().astype(np.int64)
        query_start = common.query_start_loc_cpu[: common.num_reqs + 1].numpy().astype(np.int64)
        segments, sealing = cut_step(self.geometry, query_start, after)
        return CompressedMetadata(
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            num_tokens=common.num_actual_tokens,
            query_start=query_start,
            num_tokens_after=after,
            segments=segments,
            sealing=sealing,
        )


class CompressedAttentionBackend(AttentionBackend):
    """Attention over sealed pages and recent tokens."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list] = ["auto", "float16", "bfloat16"]

    recent_spec: ClassVar[RecentSpec]
    """Of the model that this process builds. vLLM asks the backend, not the layer, for the spec,
    and gives it no configuration; the model's first layer sets it, right before it is asked."""

    @staticmethod
    def get_name() -> str:
        """Name of the registry entry that stands for backends from outside."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[CompressedAttentionImpl]:
        """Implementation of one layer."""
        return CompressedAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CompressedMetadataBuilder]:
        """Builder of the metadata."""
        return CompressedMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list:
        """Any: blocks are never split."""
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Blocks outermost: a sealed block spans all layers."""
        return (KVCacheLayout.BLHNC,)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """A sealed block is nothing that a connector knows."""
        return False

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """A layer's full attention becomes its raw tokens; the sealed rows are a layer's own."""
        return cls.recent_spec if type(spec) is FullAttentionSpec else spec


class CompressedAttentionImpl(AttentionImpl):
    """One layer's attention."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        refuse_layer(
            alibi=alibi_slopes,
            sliding_windows=sliding_window,
            logit_soft_capping=logits_soft_cap,
            shared_KV=kv_sharing_target_layer_name,
            non_decoder_attention=attn_type != AttentionType.DECODER,
            **{name: value is not None for name, value in others.items()},
        )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        config = get_current_vllm_config()
        plan = plan_of(config.additional_config)
        assert plan is not None, "the backend is chosen only where there is a plan"
        self.geometry = plan.geometry
        assert (self.num_heads, self.num_kv_heads, self.head_size) == (
            plan.geometry.num_query_heads,
            plan.geometry.num_kv_heads,
            plan.geometry.head_size,
        ), "the model's layers differ from its configuration"
        layers = config.compilation_config.static_forward_context
        if SEALED_NAME not in layers:
            dtype = kv_cache_dtype_str_to_dtype(kv_cache_dtype, config.model_config)
            CompressedAttentionBackend.recent_spec = RecentSpec.of(plan.geometry, dtype)
            layers[SEALED_NAME] = SealedCache(plan, dtype)
            if plan.geometry.has_query_ring:
                layers[RING_NAME] = QueryRing(plan, dtype)

    def forward(  # noqa: D102
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CompressedMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if attn_metadata is None:  # a profiling run, before there is a cache
            return output.fill_(0)
        context = get_forward_context()
        groups = context.attn_metadata
        sealed: SealedCache = context.no_compile_layers[SEALED_NAME]
        ring: QueryRing | None = context.no_compile_layers.get(RING_NAME)
        recent = attn_metadata
        step = Step(
            layer=extract_layer_index(layer.layer_name),
            query=query[: recent.num_tokens],
            softmax_scale=self.scale,
            recent_cache=kv_cache,
            recent_table=recent.block_table,
            sealed_table=groups[SEALED_NAME].block_table,
            ring_table=None if ring is None else groups[RING_NAME].block_table,
            query_start=recent.query_start,
            num_tokens_after=recent.num_tokens_after,
        )
        self._write(kv_cache, key, value, recent)
        seal_step(step, recent.sealing, sealed, ring)
        if ring is not None:
            store_window_queries(step, ring)
        attend(
            step.query,
            recent.segments,
            sealed.pages,
            step.sealed_table,
            kv_cache,
            step.recent_table,
            geometry=self.geometry,
            layer=step.layer,
            softmax_scale=self.scale,
            out=output,
        )
        return output

    def _write(
        self, kv_cache: Tensor, key: Tensor, value: Tensor, metadata: CompressedMetadata
    ) -> None:
        """Write the step's keys and values to their recent blocks."""
        count = metadata.num_tokens
        slots = metadata.slot_mapping[:count].long()
        rows = torch.cat([key[:count], value[:count]], dim=-1).to(kv_cache.dtype)
        if bool((slots < 0).any()):
            rows, slots = rows[slots >= 0], slots[slots >= 0]
        R = self.geometry.recent_block_tokens
        kv_cache[slots // R, :, slots % R] = rows
