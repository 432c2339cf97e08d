"""vLLM's FlashAttention 3, where this device has it and it does what the kernels ask of it."""

from __future__ import annotations

import logging
from functools import partial

import torch

from tangram.geometry import Geometry
from tangram.kernels.flash import PagedAttention, fits

logger = logging.getLogger("vllm.tangram")

PROBE_TOLERANCE = 0.03
"""Largest difference of an element of the probe, whose values are of the order of 1."""


def find_flash_attention(
    geometry: Geometry, dtype: torch.dtype, device: torch.device, version: int | None = None
) -> PagedAttention | None:
    """FlashAttention 3 for the sealed part of prefill, or None where Triton does all of it.

    Needs a Hopper GPU, a layout that `fits`, and a build of vLLM's that has the type: a tiny call
    is made and its result compared. A build without kernels for a type that vLLM's own have ends
    the process at such a call; there `--attention-config.flash_attn_version 2` keeps it from being
    made.

    Args:
        geometry: the layout.
        dtype: of queries, keys and values.
        device: where they are.
        version: of FlashAttention that vLLM was told to take, None if that was left to it.
    """
    if device.type != "cuda" or not fits(geometry) or version not in (None, 3):
        return None
    try:
        from vllm.v1.attention.backends.fa_utils import is_fa_version_supported

        if not is_fa_version_supported(3):
            return None
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    # Without splits: they would be parts in float32 of all queries, for sequences that are many.
    attention: PagedAttention = partial(
        flash_attn_varlen_func, causal=False, return_softmax_lse=True, num_splits=1, fa_version=3
    )
    try:
        difference = probe(attention, geometry, dtype, device)
    except RuntimeError as error:
        logger.info("Prefill runs without FlashAttention 3: %s", error)
        return None
    if not difference < PROBE_TOLERANCE:
        logger.info("Prefill runs without FlashAttention 3: a probe was off by %s", difference)
        return None
    logger.info("Large prefill steps attend to sealed rows with FlashAttention 3")
    return attention


def probe(
    attention: PagedAttention, geometry: Geometry, dtype: torch.dtype, device: torch.device
) -> float:
    """Largest difference of results and their sums, of two sequences of two pages and one.

    NaN counts as infinitely far off. Raises what `attention` raises.
    """
    g, scale = geometry, geometry.head_size**-0.5
    P, D = g.page_size_rows, g.head_size
    random = torch.Generator(device).manual_seed(0)
    pages = torch.randn(4, P, 1, 2 * D, generator=random, device=device).to(dtype)
    query = torch.randn(2, g.queries_per_kv_head, D, generator=random, device=device).to(dtype)
    keys, values = pages.split(D, dim=-1)
    out, lse_ln = attention(
        q=query,
        k=keys,
        v=values,
        cu_seqlens_q=torch.arange(3, dtype=torch.int32, device=device),
        max_seqlen_q=1,
        seqused_k=torch.tensor([2 * P, P], dtype=torch.int32, device=device),
        max_seqlen_k=2 * P,
        block_table=torch.tensor([[2, 0], [3, 1]], dtype=torch.int32, device=device),
        softmax_scale=scale,
        out=torch.empty_like(query),
    )
    differences = []
    for index, rows in enumerate((pages[[2, 0]], pages[[3]])):
        key, value = rows.float().flatten(0, 2).split(D, dim=-1)
        scores = query[index].float() @ key.T * scale
        differences += [
            (out[index] - scores.softmax(dim=-1) @ value).abs().max(),
            (lse_ln[:, index] - scores.logsumexp(dim=-1)).abs().max(),
        ]
    return float(torch.stack(differences).nan_to_num(torch.inf).max())
