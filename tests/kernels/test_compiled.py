"""Every kernel compiled for every architecture, on any machine that has Triton."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton")
pytest.importorskip("triton.backends.nvidia", reason="Triton cannot compile for CUDA here")

from tests.kernels.compiling import SHARED_KIB, Compiled  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TENSOR_MEMORY_COLUMNS = 512


def compile_for(capability, which, cache):
    """What a process that does not interpret kernels compiles; and who spills, for a reader."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiling", str(capability), which],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = [Compiled(**json.loads(line)) for line in done.stdout.splitlines()]
    for one in found:
        if one.stack_bytes:
            print(f"sm_{capability}: {one.stack_bytes} B spilled by {one.kernel}, {one.case}")
    return found


def check(capability, found):
    too_large = [one for one in found if one.shared_bytes > SHARED_KIB[capability] << 10]
    assert not too_large
    assert max(one.tensor_columns for one in found) <= TENSOR_MEMORY_COLUMNS
    # Below compute capability 9 no kernel can wait for another; from there on decode's do.
    waits = {one.kernel for one in found if one.is_dependent}
    assert waits == ({"_decode", "_combine"} if capability >= 90 else set())
    assert {one.kernel for one in found} == {
        "_store_kernel", "_store_queries_kernel", "_schedule", "_decode", "_combine",
        "_gather_kernel", "_prefill_kernel", "_seal_kernel", "_cut", "_extend", "_combine_tiles",
    }  # fmt: skip


# A busy machine may take ten times the minute that one architecture takes.
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("capability", "which"),
    [
        # The least shared memory: what fits there fits everywhere.
        *((capability, "some" if capability == 89 else "few") for capability in SHARED_KIB),
        *(
            pytest.param(capability, "some", marks=pytest.mark.thorough)
            for capability in SHARED_KIB
            if capability != 89
        ),
    ],
)
def test_every_kernel_fits_a_processor(capability, which, tmp_path):
    found = compile_for(capability, which, tmp_path)
    check(capability, found)
    # Decode takes keys and values of 64 rows by 128 threads, in pieces of 16 bytes: two tiles
    # before the loop, and one in it. Triton 3.9 once did neither: it had lost that rows are
    # aligned, and said nothing.
    decode = [
        one.copies for one in found if one.kernel == "_decode" and "head_size=128" in one.case
    ]
    assert decode and all(copies == {"0x10": 3 * 2 * 64 * 256 // 16 // 128} for copies in decode)
    if capability == 90:
        products = [one.products for one in found if "expected_attention" in one.case]
        assert len(products) == (2 if which == "some" else 1) and min(products) > 0


@pytest.mark.thorough
@pytest.mark.timeout(4 * 3600)
@pytest.mark.skipif(
    "TANGRAM_TEST_ALL_KERNELS" not in os.environ,
    reason="takes half an hour or more an architecture: set TANGRAM_TEST_ALL_KERNELS=1",
)
@pytest.mark.parametrize("capability", SHARED_KIB)
def test_every_kernel_of_every_shape_fits_a_processor(capability, tmp_path):
    check(capability, compile_for(capability, "all", tmp_path))
