"""The same tokens give the same answer however they were scheduled."""

import functools
import random

import pytest

from tests.engine.harness import DEVICE, assert_same, engine, few, generate
from tests.engine.prompts import conversation_prompt, noise


@pytest.fixture(scope="module")
def prompts():
    lengths = [700, 321, 64, 63, 65, 128, 190, 450]
    chats = [conversation_prompt(seed, length) for seed, length in ((1, 600), (2, 310))]
    chats += [chat + noise(99, 30) for chat in chats]
    return chats + [noise(seed, length) for seed, length in enumerate(lengths)]


def options(scorer, **more):
    return {
        "compression_ratio": 0.25,
        "compression_chunk_size": 64,
        "compression_scorer": scorer,
        **more,
    }


@pytest.fixture(scope="module", params=DEVICE.schedule_scorers)
def alone(request, prompts):
    """(scorer, answers): every prompt by itself, in one prefill step, nothing cached."""
    scorer = request.param
    with engine(**options(scorer, max_num_batched_tokens=4096, enable_prefix_caching=False)) as llm:
        return scorer, [generate(llm, [prompt], max_tokens=40)[0] for prompt in prompts]


@pytest.mark.parametrize("max_num_batched_tokens", few([64, 100, 4096], [100]))
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
        answers = generate(llm, [prompts[0]] * 3 + [prompts[4]] * 2, max_tokens=40)
        assert answers[1].cached_tokens >= 512
    assert_same(answers, [expected[0]] * 3 + [expected[4]] * 2)


@pytest.mark.parametrize("blocks", few([50, 85, 90], [50]))
def test_preemption_and_resumption(blocks, alone, prompts):
    """A pool too small for all requests: some are thrown out in the middle and start again.

    Admission leaves room for what it knows, so these sizes are those that are too small all the
    same. Asynchronous scheduling frees blocks a step later, for which others would be.
    """
    scorer, expected = alone
    more = dict(max_num_batched_tokens=256, max_model_len=800, max_num_seqs=16)
    # So would they be if the shorter prompts came first.
    more |= dict(async_scheduling=False, compression_admission=False)
    preempted = []
    with engine(**options(scorer, **more), num_gpu_blocks_override=blocks) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        preempt = scheduler._preempt_request

        def noted(request, *args, **kwargs):
            preempted.append(request.request_id)
            return preempt(request, *args, **kwargs)

        scheduler._preempt_request = noted
        assert_same(generate(llm, prompts, max_tokens=40), expected)
    assert preempted, "the pool was large enough for all"


@pytest.mark.thorough
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
        assert type(scheduler).__name__ == "AsyncHistoryScheduler"
        assert_same(generate(llm, prompts, max_tokens=40), expected)
