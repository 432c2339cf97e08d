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
from vllm.forward_context import ForwardContext, get_forward_context
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

from tangram.kernels.cache_view import CacheView, recent_scores
from tangram.kernels.segments import cut_step
from tangram.kernels.served import has_kernels
from tangram.plan.compression_plan import plan_of
from tangram.vllm_plugin.core.specs import QueryRingSpec, RecentSpec, SealedSpec
from tangram.vllm_plugin.worker.gates import load_gates
from tangram.vllm_plugin.worker.refusals import refuse_heads, refuse_layer, refuse_spec
from tangram.vllm_plugin.worker.runners.step import HostStep, LayerStep
from tangram.vllm_plugin.worker.storage import RING_NAME, SEALED_NAME, QueryRing, SealedCache


@dataclass
class CompressedMetadata:
    """One cache group's view of a step.

    Attributes:
        block_table: [requests, blocks] int32, blocks of the group.
        slot_mapping: [tokens] int64, slots of the step's tokens; only the recent group's is used.
        num_tokens: tokens of the step, without padding.
        query_start: [requests + 1] int32 on the device.
        seq_lens: [requests] int32 on the device, tokens computed after the step.
        host: the step as the host sees it; None in a step that kernels cut, which may be part of a
            CUDA graph and knows nothing of the host.
        is_decode: every request computes one token, or none.
        view: the cache as the step's first layer sees it; of the recent group, once it has run.
    """

    block_table: Tensor
    slot_mapping: Tensor
    num_tokens: int
    query_start: Tensor
    seq_lens: Tensor
    host: HostStep | None
    is_decode: bool
    view: CacheView | None = None


class CompressedMetadataBuilder(AttentionMetadataBuilder[CompressedMetadata]):
    """Metadata of one cache group; only the recent group's is cut, the others give their blocks."""

    reorder_batch_threshold = 1
    """Decodes come first: model runner V1 sorts by it, V2 always does."""

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        assert isinstance(kv_cache_spec, SealedSpec | RecentSpec | QueryRingSpec)
        self._cuts = isinstance(kv_cache_spec, RecentSpec)
        layers = vllm_config.compilation_config.static_forward_context
        # Layout and kernels are asked of it anew in every step: budgets can be swapped.
        self._sealed: SealedCache = layers[SEALED_NAME]
        self._ring: QueryRing | None = layers.get(RING_NAME)
        self._sealed.prepare_device(device, vllm_config)

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """Decode steps can be captured whole where kernels serve them."""
        plan = plan_of(vllm_config.additional_config)
        assert plan is not None
        dtype = kv_cache_dtype_str_to_dtype(
            vllm_config.cache_config.cache_dtype, vllm_config.model_config
        )
        if has_kernels(plan.geometry, plan.scorer_name, dtype):
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.NEVER

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CompressedMetadata:
        """The step's metadata; the host cuts it unless kernels do."""
        return self._build(common_attn_metadata, captured=False)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> CompressedMetadata:
        """Of a step that is made up and captured: the host has no part in it and counts nothing."""
        return self._build(common_attn_metadata, captured=self._sealed.runner.is_device)

    def _build(self, common: CommonAttentionMetadata, captured: bool) -> CompressedMetadata:
        is_decode = common.max_query_len <= 1
        host = None
        if self._cuts:
            # vLLM builds first when it warms up or captures, before it says that it is ready.
            self._sealed.runner.warm_up(self._sealed, self._ring)
            by_device = captured or self._sealed.cuts_on_device(common.num_actual_tokens, is_decode)
            if not by_device:
                host = self._cut(common)
            elif not (captured or is_decode):
                self._sealed.pass_over(*_lengths(common))
        return CompressedMetadata(
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping[: common.num_actual_tokens],
            num_tokens=common.num_actual_tokens,
            query_start=common.query_start_loc,
            seq_lens=common.seq_lens,
            host=host,
            is_decode=is_decode,
        )

    def _cut(self, common: CommonAttentionMetadata) -> HostStep:
        query_start, after = _lengths(common)
        segments, sealing = cut_step(self._sealed.geometry, query_start, after)
        host = HostStep(query_start, after, segments, sealing)
        if self._sealed.drift is not None:
            host.sampled = self._sealed.drift.choose(sealing)
        self._sealed.runner.cut(host)
        return host


def _lengths(common: CommonAttentionMetadata) -> tuple[np.ndarray, np.ndarray]:
    """[requests + 1] where each request's queries begin, [requests] tokens after the step."""
    lengths = common.seq_lens_cpu_upper_bound
    lengths = common.seq_lens.cpu() if lengths is None else lengths
    after = lengths[: common.num_reqs].numpy().astype(np.int64)
    query_start = common.query_start_loc_cpu[: common.num_reqs + 1].numpy().astype(np.int64)
    return query_start, after


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
        if type(spec) is not FullAttentionSpec:
            return spec
        refuse_spec(spec, cls.recent_spec)
        return cls.recent_spec


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
        found = self.num_heads, self.num_kv_heads, self.head_size
        g = plan.geometry
        expected = g.num_query_heads, g.num_kv_heads, g.head_size
        refuse_heads(found, expected)
        layers = config.compilation_config.static_forward_context
        if SEALED_NAME not in layers:
            dtype = kv_cache_dtype_str_to_dtype(kv_cache_dtype, config.model_config)
            CompressedAttentionBackend.recent_spec = RecentSpec.of(g.block_shape, dtype)
            gates = None
            if g.has_stored_scores:
                gates = load_gates(plan, dtype, config.model_config.get_hidden_size())
            layers[SEALED_NAME] = SealedCache(plan, dtype, CompressedAttentionBackend, gates)
            if g.has_query_ring:
                layers[RING_NAME] = QueryRing(plan, dtype, CompressedAttentionBackend)

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
        sealed: SealedCache = context.no_compile_layers[SEALED_NAME]
        if attn_metadata.view is None:
            attn_metadata.view = _view(attn_metadata, context, sealed, kv_cache)
        ordinal = sealed.ordinal_of(layer.layer_name)
        assert ordinal is not None, f"{layer.layer_name} is not to be compressed"
        sealed.runner.run(
            LayerStep(
                layer=ordinal,
                softmax_scale=self.scale,
                query=query[: attn_metadata.num_tokens],
                key=key,
                value=value,
                out=output,
                slot_mapping=attn_metadata.slot_mapping,
                view=attn_metadata.view.of_layer(kv_cache),
                sealed=sealed,
                host=attn_metadata.host,
                is_decode=attn_metadata.is_decode,
                scores=sealed.step_scores,
            )
        )
        return output


def _view(
    metadata: CompressedMetadata, context: ForwardContext, sealed: SealedCache, recent: Tensor
) -> CacheView:
    """The cache as a step sees it: the recent group's metadata, and the other groups' tables."""
    groups: Any = context.attn_metadata
    ring: QueryRing | None = context.no_compile_layers.get(RING_NAME)
    return CacheView(
        sealed=sealed.pages,
        sealed_table=groups[SEALED_NAME].block_table,
        recent=recent,
        recent_table=metadata.block_table,
        query_start=metadata.query_start,
        seq_lens=metadata.seq_lens,
        ring=None if ring is None else ring.queries,
        ring_table=None if ring is None else groups[RING_NAME].block_table,
        scores=recent_scores(recent) if sealed.geometry.has_stored_scores else None,
    )
