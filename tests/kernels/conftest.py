"""Kernels run on the GPU where there is one, and in Triton's interpreter elsewhere."""

import importlib.util
import os
import sys

import pytest
import torch


def _interpret_kernels():
    """Make Triton interpret kernels that are defined from now on.

    `triton.jit` asks the environment at every use. What Triton defines with it on import, such as
    `tl.max`, is compiled code only if somebody imported Triton before; then it is defined anew.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    if "triton" not in sys.modules:
        return
    import triton

    for name, module in list(sys.modules.items()):
        if name.startswith("triton.language"):
            for attribute, value in list(vars(module).items()):
                if isinstance(value, triton.JITFunction):
                    setattr(module, attribute, triton.jit(value.fn))


# Triton 3.9 warns where it is not said, and warnings are errors.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON and not torch.cuda.is_available():
    _interpret_kernels()


@pytest.fixture
def kernel_device():
    if not HAS_TRITON:
        pytest.skip("needs Triton, which is not installed")
    return "cuda" if torch.cuda.is_available() else "cpu"
