"""ExpectedAttention in the sealing kernel: the precision of its scores."""

import pytest
import torch

pytest.importorskip("triton", reason="the scores are worked out in Triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from tangram.kernels.seal_decode import kernel  # noqa: E402
from tangram.kernels.seal_decode.scorers import tiles_of  # noqa: E402
from tangram.kernels.seal_decode.scores_kernel import expected  # noqa: E402
from tangram.kernels.sizes import shared_bytes  # noqa: E402
from tangram.scorers import get_scorer  # noqa: E402
from tangram.scorers.base import Chunks  # noqa: E402
from tests.kernels import test_seal_decode as sealing  # noqa: E402
from tests.kernels.inputs import make_geometry  # noqa: E402

SCALE = 128**-0.5


@triton.jit
def _one_head(
    rows_ptr,
    out_ptr,
    mean_ptr,
    factor_ptr,
    rotation_ptr,
    count,
    scale,
    epsilon,
    C_PAD: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    token = tl.arange(0, C_PAD)
    rows = rows_ptr + token * (2 * D)
    scores = expected(
        rows, token < count, mean_ptr, factor_ptr, rotation_ptr, scale, epsilon,
        D, HALF, GROUP, TILE, COLUMNS, PARTS,
    )  # fmt: skip
    tl.store(out_ptr + token, scores, mask=token < count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_score_has_the_precision_of_float32(kernel_device, dtype):
    """One part of a factor alone would be off by 3e-4 or more, for queries as strong as these."""
    if (kernel_device, dtype) == ("cpu", torch.bfloat16):
        pytest.skip("Triton's interpreter multiplies the bits of bf16 matrices")
    g = make_geometry(
        [[1]], num_kv_heads=1, queries_per_kv_head=4, head_size=128, chunk_size_tokens=256,
        window_size_tokens=32, dtype=dtype,
    )  # fmt: skip
    scorer = get_scorer("expected_attention")
    arrays = sealing.query_statistics(g, strength=3.0)
    statistics = sealing.on_device(arrays, g, scorer, 1, kernel_device)
    generator = torch.Generator().manual_seed(0)
    rows = (1.5 * torch.randn(224, 2 * 128, generator=generator)).to(dtype)
    shape = tiles_of(
        scorer.name, 256, 128, dtype.itemsize, shared_bytes(torch.device(kernel_device))
    )
    got = torch.full((256,), torch.nan, device=kernel_device)
    _one_head[(1,)](
        rows.to(kernel_device),
        got,
        statistics.mean,
        statistics.factor,
        statistics.rotation[0],
        224,
        SCALE,
        scorer.epsilon,
        C_PAD=256,
        D=128,
        HALF=64,
        GROUP=4,
        TILE=shape.key_tile,
        COLUMNS=shape.factor_tile,
        PARTS=kernel._PARTS[dtype],
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
    key, value = rows[:, None].split(128, dim=-1)
    wanted = scorer.score(
        Chunks(
            keys=key,
            values=value,
            positions=torch.arange(224),
            softmax_scale=SCALE,
            window_size_tokens=32,
            statistics=sealing.of_layer(arrays, 0),
        )
    )
    torch.testing.assert_close(got[:224].cpu(), wanted[:, 0], rtol=5e-5, atol=0)
    assert got[224:].isnan().all()
