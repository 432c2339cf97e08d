"""The same tokens give the same answer however they were scheduled."""

import functools
import random

import pytest

from tests.engine.harness import assert_same, engine, generate
from tests.engine.prompts import conversation_prompt, noise

SCORERS = ["key_diff", "snap_kv"]


@pytest.fixture(scope="module")
def prompts():
    lengths = [700, 321, 64, 63, 65, 128, 190, 450]
    chats = [conversation_prompt(seed, length) for seed, length in ((1, 600), (2, 310))]
    return chats + [noise(seed, length) for seed, length in enumerate(lengths)]


def options(scorer, **more):
    return {
        "compression_ratio": 0.25,
        "compression_chunk_size": 64,
        "compression_scorer": scorer,
        **more,
    }


@pytest.fixture(scope="module", params=SCORERS)
def alone(request, prompts):
    """(scorer, answers): every prompt by itself, in one prefill step, nothing cached."""
    scorer = request.param
    with engine(**options(scorer, max_num_batched_tokens=4096, enable_prefix_caching=False)) as llm:
        return scorer, [generate(llm, [prompt], max_tokens=40)[0] for prompt in prompts]


@pytest.mark.parametrize("max_num_batched_tokens", [64, 100, 4096])
def test_any_step_size_among_others(max_num_batched_tokens, alone, prompts):
    scorer, expected = alone
    more = dict(max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=16)
    with engine(**options(scorer, **more)) as llm:
        assert_same(generate(llm, prompts, max_tokens=40), expected)
        order = random.Random(0).sample(range(len(prompts)), len(prompts))
        shuffled = generate(llm, [prompts[i] for i in order], max_tokens=40)
    assert_same(shuffled, [expected[i] for i in order])


def test_identical_prompts_in_one_step(alone, prompts):
    scorer, expected = alone
    with engine(**options(scorer, max_num_batched_tokens=4096)) as llm:
        answers = generate(llm, [prompts[0]] * 3 + [prompts[2]] * 2, max_tokens=40)
        assert answers[1].cached_tokens >= 512
    assert_same(answers, [expected[0]] * 3 + [expected[2]] * 2)


def test_preemption_and_resumption(alone, prompts):
    """A pool too small for all requests: some are thrown out in the middle and start again."""
    scorer, expected = alone
    more = dict(max_num_batched_tokens=256, max_model_len=800, max_num_seqs=16)
    long_enough = [prompt + noise(99, 30) for prompt in prompts[:2]]
    with engine(**options(scorer, **more)) as llm:
        reference = [generate(llm, [p], max_tokens=40)[0] for p in long_enough]
    preempted = []
    # Admission leaves room for what it knows, so which pool is too small depends on the layout.
    for blocks in (100, 80, 60):
        with engine(**options(scorer, **more), num_gpu_blocks_override=blocks) as llm:
            scheduler = llm.llm_engine.engine_core.engine_core.scheduler
            original = scheduler._preempt_request
            scheduler._preempt_request = lambda request, *a, original=original, **kw: (
                preempted.append(request.request_id), original(request, *a, **kw))[1]  # fmt: skip
            answers = generate(llm, prompts + long_enough, max_tokens=40)
        assert_same(answers, expected + reference)
    assert preempted, "every pool was large enough for all"


def test_async_scheduling(alone, prompts, monkeypatch):
    """The CPU platform turns it off after the configuration is made, so it is turned on again."""
    from vllm.engine.arg_utils import EngineArgs

    make = EngineArgs.create_engine_config

    @functools.wraps(make)
    def with_async_scheduling(self, *args, **kwargs):
        config = make(self, *args, **kwargs)
        config.scheduler_config.async_scheduling = True
        return config

    monkeypatch.setattr(EngineArgs, "create_engine_config", with_async_scheduling)
    scorer, expected = alone
    with engine(**options(scorer, max_num_batched_tokens=100)) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        assert type(scheduler).__name__ == "AsyncScheduler"
        assert_same(generate(llm, prompts, max_tokens=40), expected)
