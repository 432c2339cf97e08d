"""Scores that are made with their tokens, in eager and compiled engines: the oracle's answers."""

from __future__ import annotations

import pytest

from tests.engine.harness import engine, few
from tests.engine.prompts import conversation_prompt, noise
from tests.engine.test_against_oracle import check
from tests.gate_files import write_gates

RECALL = dict(layers=6, hidden=256, heads=4)


@pytest.fixture(scope="module", params=few(["fastkvzip", "kvzap"], ["fastkvzip"]))
def scorer(request, tmp_path_factory):
    """NAME:FILE."""
    path = tmp_path_factory.mktemp("gates") / "gates.pt"
    return f"{request.param}:{write_gates(request.param, path, **RECALL)}"


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_gates_follow_the_oracle(scorer, eager):
    """Prompts in pieces beside answers, chunks sealed in decode, and then a hit of all of it."""
    options = {} if eager else {"enforce_eager": False}
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
    for prompt, answer in zip(prompts, later, strict=True):
        assert answer.cached_tokens == (len(prompt) - 71) // 64 * 64
