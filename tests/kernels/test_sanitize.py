"""The command that runs compute-sanitizer: what it covers, and what it makes of its words."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="the cases are Triton's kernels")

from benchmarks.kernels import sanitize  # noqa: E402
from tangram.kernels.seal_decode import KERNEL_SCORERS  # noqa: E402


def test_the_cases_are_of_every_kernel_type_head_size_and_number_of_query_heads():
    assert {shape.dtype for shape in sanitize.SHAPES} == {torch.float16, torch.bfloat16}
    assert {shape.head_size for shape in sanitize.SHAPES} == {64, 128, 256}
    assert {shape.queries_per_kv_head for shape in sanitize.SHAPES} == {1, 4, 16}
    kinds = {"store", "store queries", "decode", "prefill", "gather"}
    kinds |= {f"seal {scorer}" for scorer in KERNEL_SCORERS}
    for which in ("all", "few"):
        assert {name.partition(",")[0] for name, _ in sanitize.cases(which)} == kinds


def test_a_few_cases_agree_with_their_references(kernel_device, capsys):
    assert sanitize.run_cases("few") == 0
    assert f"{5 + len(KERNEL_SCORERS)} cases agree" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("printed", "found"),
    [
        ("========= ERROR SUMMARY: 0 errors\n", (0, 0)),
        ("========= ERROR SUMMARY: 1 error\n", (1, 0)),
        ("========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)\n", (2, 1)),
        ("========= Error: Device not supported\n", (None, 0)),
    ],
)
def test_the_totals_of_a_tool(printed, found):
    assert sanitize.summary(printed) == found


def run(monkeypatch, tmp_path, *, planted, found, code=0):
    """The command with a tool that says what it is told to; its exit code."""
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(
        "#!/bin/sh\n"
        '[ "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 ] || exit 5\n'
        f'case "$*" in *planted*) echo "{planted}";; *) echo "{found}"; exit {code};; esac\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sanitize, "_compile", lambda: None)
    return sanitize.run_tools(["memcheck", "racecheck"])


def test_the_exit_code_says_whether_a_tool_found_something(monkeypatch, tmp_path, capsys):
    clean, one = "ERROR SUMMARY: 0 errors", "ERROR SUMMARY: 1 error"
    assert run(monkeypatch, tmp_path, planted=one, found=clean) == 0
    assert run(monkeypatch, tmp_path, planted=one, found=one, code=99) == 1
    # A case that fails, or a tool that cannot run, is not a clean run.
    assert run(monkeypatch, tmp_path, planted=one, found=clean, code=1) == 1
    assert run(monkeypatch, tmp_path, planted=one, found="Device not supported") == 1
    assert "did not come to its end" in capsys.readouterr().out
    # Nor is one with a tool that overlooks the planted error.
    assert run(monkeypatch, tmp_path, planted=clean, found=clean) == 1
