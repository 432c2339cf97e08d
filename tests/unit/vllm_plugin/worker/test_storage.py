"""The caches that belong to no layer: what is dropped when vLLM takes them back."""

from types import SimpleNamespace

import torch

from tangram.plan.compression_plan import make_plan
from tangram.plan.options import CompressionOptions
from tangram.profile import ModelIdentity
from tangram.vllm_plugin.worker.backend import CompressedAttentionBackend
from tangram.vllm_plugin.worker.storage import SealedCache


def test_kernels_let_go_of_a_cache_as_soon_as_vllm_does():
    """Else the small cache on which graphs are measured would stay beside the real one."""
    model = ModelIdentity("Sample", 2, 4, 8, 64, 512, 100)
    sealed = SealedCache(
        make_plan(CompressionOptions(), model, 2), torch.float16, CompressedAttentionBackend
    )
    calls = []
    sealed.runner = SimpleNamespace(forget_caches=lambda: calls.append("forgotten"))
    sealed.scorer = sealed.scorer
    assert not calls
    sealed.kv_cache = torch.zeros(3)
    sealed.kv_cache = torch.tensor([])
    assert calls == ["forgotten"] * 2
