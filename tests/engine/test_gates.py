"""Scores that are made with their tokens, in eager and compiled engines: the oracle's answers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tangram.errors import ScorerError
from tests.engine.harness import MODEL, engine, few
from tests.engine.kept import sealed_cache
from tests.engine.prompts import conversation_prompt, noise
from tests.engine.test_against_oracle import check
from tests.gate_files import write_gates

RECALL = dict(layers=6, hidden=256, heads=4)


@pytest.fixture(scope="module", params=few(["fastkvzip", "kvzap"], ["fastkvzip"]))
def scorer(request, tmp_path_factory):
    """NAME:FILE."""
    path = tmp_path_factory.mktemp("gates") / "gates.pt"
    return f"{request.param}:{write_gates(request.param, path, **RECALL)}"


def follow_the_oracle(scorer, **options):
    """Prompts in pieces beside answers, chunks sealed in decode, and then a hit of all of it."""
    with engine(
        compression_ratio=0.25,
        compression_chunk_size=64,
        compression_scorer=scorer,
        max_num_batched_tokens=100,
        **options,
    ) as llm:
        prompts = [conversation_prompt(1, 330), noise(12, 120), noise(13, 63)]
        oracle, answers = check(llm, prompts, max_tokens=70, prompt_logprobs=False)
        assert any(not kept.all() for kept in oracle.kept)
        prompts = [
            prompt + answer.tokens + noise(14, 70)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        _, later = check(llm, prompts, max_tokens=20, prompt_logprobs=False)
        mode = llm.llm_engine.vllm_config.compilation_config.mode
    for prompt, answer in zip(prompts, later, strict=True):
        assert answer.cached_tokens == (len(prompt) - 71) // 64 * 64
    return int(mode)


def test_gates_follow_the_oracle(scorer):
    assert follow_the_oracle(scorer) == 0


def test_compiled_gates_follow_the_oracle(scorer, tmp_path):
    """In a process of its own: the tests' own does without compiling."""
    script = (
        "from tests.engine.test_gates import follow_the_oracle as f\n"
        f"print('mode', f({scorer!r}, enforce_eager=False))"
    )
    variables = {
        "TORCH_COMPILE_DISABLE": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CACHE_ROOT": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split("mode")[-1]) > 0, "nothing was compiled"


def test_preempted_requests_make_their_scores_again(scorer):
    with engine(
        compression_ratio=0.25,
        compression_chunk_size=64,
        compression_scorer=scorer,
        compression_admission=False,
        max_num_batched_tokens=256,
        max_model_len=800,
        max_num_seqs=16,
        async_scheduling=False,
        num_gpu_blocks_override=50,
    ) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        preempt, preempted = scheduler._preempt_request, []

        def noted(request, *args, **kwargs):
            preempted.append(request.request_id)
            return preempt(request, *args, **kwargs)

        scheduler._preempt_request = noted
        prompts = [noise(seed, 90 + 40 * (seed % 3)) for seed in range(20, 32)]
        check(llm, prompts, max_tokens=160, prompt_logprobs=False)
        assert preempted, "the pool was large enough for all"


def test_blocks_are_as_large_as_the_layout_says(scorer):
    with engine(
        compression_ratio=0.25, compression_chunk_size=64, compression_scorer=scorer
    ) as llm:
        (status,) = llm.collective_rpc("tangram_status")
        g = sealed_cache(llm).geometry
        core = llm.llm_engine.engine_core.engine_core
        groups = core.scheduler.kv_cache_config.kv_cache_groups
    assert g.has_stored_scores and status["block_bytes"] == g.block_bytes > g.sealed_block_bytes
    assert [len(group.layer_names) for group in groups] == [1, g.num_layers]


def test_a_file_that_changes_under_an_engine_is_refused(tmp_path, monkeypatch):
    from tangram.vllm_plugin.worker import backend

    path = write_gates("kvzap", tmp_path / "gates.pt", **RECALL)
    load = backend.load_gates

    def changed(*args):
        write_gates("kvzap", path, seed=1, **RECALL)
        os.utime(path, ns=(1, 1))
        return load(*args)

    monkeypatch.setattr(backend, "load_gates", changed)
    refused = pytest.raises(ScorerError, match=r"gates\.pt: the file has changed")
    with refused, engine(compression_scorer=f"kvzap:{path}"):
        pass


def test_calibration_sees_what_values_are_made_of():
    from tangram.engines.capturing import FullKVEngine

    reader = FullKVEngine(MODEL, 128, dtype="float32", kv_cache_memory_bytes=1 << 26)
    found = []
    try:
        projections = [d.self_attn.qkv_proj for d in reader._decoders]
        reader.read(noise(5, 90), lambda *of_layer: found.append(of_layer), hidden_states=True)
        assert len(found) == len(projections)
        for projection, (_, _, _, value, _, hidden) in zip(projections, found, strict=True):
            made = projection(hidden)[0][:, -value[0].numel() :]
            torch.testing.assert_close(made, value.flatten(1))
    finally:
        reader.close()
