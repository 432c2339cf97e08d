"""Budgets swapped in a running engine, distributions read off it, and budgets measured with it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from tangram.budgets import allocate, measured_entries
from tangram.calibrate.budget_search.measure import measure_budgets
from tangram.errors import BudgetError, ConfigurationError
from tangram.geometry import HeadGroups
from tangram.plan.compression_plan import plan_of
from tests.engine.harness import (
    CACHE_BYTES,
    DEVICE,
    MODEL,
    TOLERANCE,
    assert_same,
    engine,
    generate,
)
from tests.engine.profiles import make_profile
from tests.engine.prompts import conversation_prompt, noise

SIZES = dict(
    num_layers=6,
    num_kv_heads=4,
    ratio=0.3,
    chunk_size_tokens=64,
    page_size_rows=16,
    page_group_size=2,
    n_sink_tokens=4,
)
OPTIONS = dict(compression_ratio=0.3, compression_chunk_size=64, page_group_size=2)
READING = dict(dtype=DEVICE.dtype, kv_cache_memory_bytes=CACHE_BYTES)
if DEVICE.has_kernels:
    READING["attention_config"] = DEVICE.options["attention_config"]
# Engines of both kinds, which FlashAttention serves without compression.
READING_BOTH = dict(
    dtype="bfloat16" if DEVICE.has_kernels else DEVICE.dtype, kv_cache_memory_bytes=CACHE_BYTES
)
EXACT = DEVICE.dtype == "float32"


def budgets_of(llm) -> HeadGroups:
    return plan_of(llm.llm_engine.vllm_config.additional_config).geometry.head_groups


def check_swap(tmp_path, **more) -> None:
    """After a swap an engine answers as a fresh one with those budgets."""
    path = tmp_path / "p"
    make_profile("snap_kv").save(path)
    prompts = [conversation_prompt(1, 160), noise(2, 120)]
    options = dict(compression_scorer="snap_kv", compression_profile=str(path), **OPTIONS, **more)
    with engine(**options, compression_level="crosslayer") as llm:
        wanted = budgets_of(llm)
        fresh = generate(llm, prompts, max_tokens=12, prompt_logprobs=True)
    with engine(**options, compression_level="uniform") as llm:
        assert budgets_of(llm) != wanted
        before = generate(llm, prompts, max_tokens=12, prompt_logprobs=True)
        swap(llm, wanted)
        # First from scratch, then with hits of blocks that were sealed after the swap.
        after = generate(llm, prompts, max_tokens=12, prompt_logprobs=True)
        assert_same(after, fresh)
        hit = generate(llm, prompts, max_tokens=12)
        assert all(answer.cached_tokens for answer in hit)
        if not more:  # in half precision the last bits depend on how a step was cut
            assert_same(hit, fresh)
        refuse_what_cannot_be_swapped(llm)
        # A refusal leaves the engine as it is.
        assert_same(generate(llm, prompts, max_tokens=12, prompt_logprobs=True), fresh)
        swap(llm, budgets_of(llm))
        assert_same(generate(llm, prompts, max_tokens=12, prompt_logprobs=True), before)
    assert far_apart(before, fresh), "the two budgets answer alike: nothing is tested"


def test_after_a_swap_an_engine_answers_as_a_fresh_one(tmp_path):
    check_swap(tmp_path)


@pytest.mark.gpu
def test_after_a_swap_the_kernels_answer_as_fresh_ones(tmp_path):
    check_swap(tmp_path, dtype="bfloat16")


@pytest.mark.gpu
def test_captured_graphs_cannot_be_swapped():
    with engine(**OPTIONS, dtype="bfloat16", enforce_eager=False) as llm:
        with pytest.raises(ConfigurationError, match="enforce_eager=True"):
            swap(llm, budgets_of(llm))


def refuse_what_cannot_be_swapped(llm) -> None:
    from vllm import SamplingParams

    larger = allocate("uniform", **(SIZES | {"ratio": 0.5}))
    with pytest.raises(BudgetError, match="change their size; start another engine"):
        swap(llm, larger)
    regrouped = allocate("uniform", **(SIZES | {"page_group_size": 1}))
    with pytest.raises(BudgetError, match="heads of a group"):
        swap(llm, regrouped)
    ids = llm.enqueue([{"prompt_token_ids": noise(1, 20)}], SamplingParams(max_tokens=4))
    with pytest.raises(ConfigurationError, match="while requests run"):
        swap(llm, budgets_of(llm))
    llm.llm_engine.abort_request(ids, internal=True)


def swap(llm, head_groups: HeadGroups) -> None:
    from tangram.engines.swapping import swap_budgets

    swap_budgets(llm, head_groups)


def far_apart(one, two) -> bool:
    return any(
        abs(a[token] - b[token]) > 0.1
        for mine, theirs in zip(one, two, strict=True)
        for a, b in zip(mine.prompt_logprobs, theirs.prompt_logprobs, strict=True)
        for token in a.keys() & b.keys()
    )


def test_distributions_are_those_of_the_engine():
    from tangram.engines.reading import ReadingEngine

    close = 1e-4 if EXACT else 1e-2
    whole = conversation_prompt(1, 150)
    samples = [whole, noise(2, 70), whole[:100]]
    positions = [[10, len(whole) - 1], [69], list(range(99))]
    reader = ReadingEngine(
        MODEL,
        list(map(len, samples)),
        compression=None,
        tokens_at_once=240,
        **READING,
        **DEVICE.stock,
    )
    try:
        states = reader.states(samples, positions)
        logprobs = [reader._model.compute_logits(each).float().log_softmax(-1) for each in states]
        vocabulary = logprobs[0].shape[1]
        uniform = -np.log(vocabulary) - logprobs[2].mean(dim=1)
        # A state of zeros has equal logits: KL(uniform || p) and KL(p || uniform) are known.
        zeros = torch.zeros_like(states[2])
        assert reader.divergence(zeros, states[2]) == pytest.approx(float(uniform.mean()), close)
        entropy = -(logprobs[2].exp() * logprobs[2]).sum(dim=1)
        from_uniform = float((np.log(vocabulary) - entropy).mean())
        assert reader.divergence(states[2], zeros) == pytest.approx(from_uniform, close)
        assert reader.divergence(states[2], states[2]) == 0
    finally:
        reader.close()
    with engine(compressed=False) as llm:
        answers = generate(llm, samples, max_tokens=1, prompt_logprobs=True)
    for answer, where, found in zip(answers, positions, logprobs, strict=True):
        entries = answer.prompt_logprobs + answer.logprobs
        for position, row in zip(where, found, strict=True):
            for token, value in entries[position].items():
                assert float(row[token]) == pytest.approx(value, abs=TOLERANCE[DEVICE.dtype].worst)


def swap_effect() -> list[float]:
    """Divergence of two budgets' distributions on each of three texts that are read together."""
    from tangram.engines.reading import ReadingEngine

    samples = [conversation_prompt(1, 150), noise(2, 70), noise(3, 200)]
    everywhere = [range(len(sample)) for sample in samples]
    none = dict(compression_level="uniform", compression_profile="none")
    compression = dict(**OPTIONS, **none)
    reader = ReadingEngine(
        MODEL, list(map(len, samples)), compression=compression, tokens_at_once=400, **READING
    )
    try:
        before = reader.states(samples, everywhere)
        profile = make_profile("key_diff")
        reader.swap_budgets(allocate("crosslayer", profile=profile, **SIZES))
        after = reader.states(samples, everywhere)
        return [reader.divergence(*pair) for pair in zip(before, after, strict=True)]
    finally:
        reader.close()


@pytest.mark.skipif(DEVICE.has_kernels, reason="on a GPU every engine of the tests runs on it")
def test_runner_v2_swaps_and_reads_alike():
    script = """
import json, types
import triton.backends

# vLLM looks for a Triton backend of the platform; the interpreter needs none.
driver = types.SimpleNamespace(is_active=lambda: False)
triton.backends.backends["cpu"] = types.SimpleNamespace(compiler=None, driver=driver)
from tests.engine.test_measured import swap_effect

print(json.dumps(swap_effect()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == pytest.approx(swap_effect(), rel=1e-2)
    assert min(found) > 1e-4


def test_measuring_finds_budgets_that_diverge_less_and_the_engine_takes_them(tmp_path):
    profile = make_profile("key_diff")
    samples = [conversation_prompt(seed, 200) for seed in (11, 12, 13)]
    told: list[str] = []
    measured = measure_budgets(
        profile,
        MODEL,
        samples,
        ratios=[0.3],
        page_group_size=2,
        chunk_size_tokens=64,
        time_limit_s=600,
        max_evaluations=36,
        progress=told.append,
        **READING_BOTH,
    )
    [entry] = measured_entries(measured)
    assert (entry.ratio, entry.sizes) == (0.3, (2, 64, 16, 4))
    assert entry.window_size_tokens == 32
    assert sum(map(sum, entry.head_groups.pages)) == round(0.3 * 4 * 6 * 2)
    candidates = {trial["name"]: trial for trial in entry.log["candidates"]}
    assert {"uniform", "crosslayer", "perlayer", "mass", "error", "improved"} <= set(candidates)
    checked = [trial["checked"] for trial in candidates.values() if trial["checked"] is not None]
    assert entry.log["divergence"] == min(checked) > 0
    assert any("taken" in line for line in told)

    path = tmp_path / "measured.profile"
    measured.save(path)
    with engine(**OPTIONS, compression_profile=str(path)) as llm:
        plan = plan_of(llm.llm_engine.vllm_config.additional_config)
    assert plan.level == "measured"
    assert plan.geometry.head_groups == entry.head_groups


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(later=[[1]]), "positions are given for 1 samples and there are 3"),
        (dict(later=[[1], [], [1]]), "sample 1 of 10 tokens.*got 0"),
        (dict(later=[[1], [1], [10]]), "sample 2 of 10 tokens.*from 10 to 10"),
        (dict(samples=[range(10)] * 2), "2 sample.*at least 3"),
        (dict(ratios=[0.001]), "smallest ratio that works"),
        (dict(page_group_size=3), "--page-group-size is 3"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_an_engine_starts(change, message):
    asked = dict(samples=[range(10)] * 3, ratios=[0.3], time_limit_s=1)
    with pytest.raises(ValueError, match=message):
        measure_budgets(make_profile("key_diff"), "no model", **(asked | change))
