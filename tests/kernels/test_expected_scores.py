"""ExpectedAttention in the sealing kernel: the precision of its scores, and what a GPU gets."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="the scores are worked out in Triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from tangram.kernels.seal_decode import kernel  # noqa: E402
from tangram.kernels.seal_decode.scorers import tiles_of  # noqa: E402
from tangram.kernels.seal_decode.scores_kernel import expected  # noqa: E402
from tangram.scorers import get_scorer  # noqa: E402
from tangram.scorers.base import Chunks  # noqa: E402
from tests.kernels import test_seal_decode as sealing  # noqa: E402
from tests.kernels.inputs import make_geometry  # noqa: E402

SCALE = 128**-0.5


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from tangram.kernels.seal_decode import kernel
from tangram.kernels.seal_decode.scorers import tiles_of
fn = kernel._seal_kernel.kernel
names = fn.arg_names
types = {"layer_table_ptr": "*i64", "softmax_scale": "fp32", "epsilon": "fp32"}
types |= {name: "*fp32" for name in ("mean_ptr", "factor_ptr", "rotation_ptr")}
types |= {name: "*bf16" for name in ("recent_ptr", "sealed_ptr", "ring_ptr", "query_ptr")}
for C, D in ((256, 128), (2048, 256)):
    shape = tiles_of("expected_attention", C, D, 2)
    sizes = dict(
        SCORER="expected_attention", SMOOTH=5, HAS_QUERY=False, C=C, W=32, S=4, R=64, P=16, D=D,
        RING_R=1, LAYERS=36, HEADS=8, GROUP=4, C_PAD=C, REQUESTS_PAD=128, HALF=D // 2, PARTS=3,
        KEY_TILE=shape.key_tile, ROW_TILE=shape.row_tile, QUERY_TILE=16,
        FACTOR_TILE=shape.factor_tile, KEY_BITS=32, DIGIT_BITS=4,
    )
    source = triton.compiler.ASTSource(
        fn,
        {
            name: "constexpr" if name in sizes
            else types.get(name, "*i32" if name.endswith("_ptr") else "i32")
            for name in names
        },
        constexprs={(names.index(name),): value for name, value in sizes.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name.endswith("_ptr") or name.startswith("stride") and "table" not in name
        },
    )
    options = dict(num_warps=shape.warps, num_stages=shape.stages)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(made.metadata.shared, made.asm["ptx"].count("wgmma.mma_async"))
"""


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
    shape = tiles_of(scorer.name, 256, 128, dtype.itemsize)
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


def test_it_fits_a_processor_and_its_matrix_units(tmp_path):
    """Compiled for a Hopper GPU, which need not be there."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        shared_bytes, products = map(int, line.split())
        assert shared_bytes <= 227 << 10 and products > 0, line
    assert len(done.stdout.splitlines()) == 2
