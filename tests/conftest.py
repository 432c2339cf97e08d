"""Settings of the whole test run; vLLM and transformers read the environment when imported."""

import os

import pytest

for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Else asking for logprobs compiles a kernel, which takes a while and a C++ compiler.
    "TORCH_COMPILE_DISABLE": "1",
    # Models of the tests are small: a second thread costs more than it gives.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    # An engine that a test forgot to tell of a profile fails at once, and does not calibrate.
    "TANGRAM_CALIBRATE_ARGS": "--no-test-calibrates-unless-it-says-so",
}.items():
    os.environ.setdefault(_name, _value)


MARKERS = (
    "browser: opens a page in Chromium",
    "engine: starts a vLLM engine",
    "gpu: needs a CUDA device",
    "thorough: one more case of a test, for runs that are not in a hurry",
    "timeout(seconds): of pytest-timeout, where that is installed",
)


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _has_cuda():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))
