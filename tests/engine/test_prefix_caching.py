"""A conversation's next turn finds the sealed history of the last one."""

import pytest

from tests.engine.harness import DEVICE, assert_same, engine, generate
from tests.engine.prompts import conversation_prompt, noise

C = 64
OPTIONS = dict(compression_ratio=0.25, compression_chunk_size=C, max_num_batched_tokens=256)


def turns(first: list[int]) -> list[list[int]]:
    """Prompts of three turns; each continues the one before and an answer that was given to it."""
    second = first + noise(11, 30) + noise(12, 41)
    return [first, second, second + noise(13, 3 * C) + noise(14, 17)]


@pytest.mark.parametrize("scorer", DEVICE.schedule_scorers)
def test_later_turns_hit_every_sealed_block_and_answer_the_same(scorer):
    prompts = turns(conversation_prompt(1, 500))
    with engine(**OPTIONS, compression_scorer=scorer, enable_prefix_caching=False) as llm:
        uncached = [generate(llm, [prompt], max_tokens=10)[0] for prompt in prompts]
    assert [answer.cached_tokens for answer in uncached] == [0, 0, 0]
    with engine(**OPTIONS, compression_scorer=scorer) as llm:
        answers = [generate(llm, [prompt], max_tokens=10)[0] for prompt in prompts]
        metrics = {metric.name: metric for metric in llm.get_metrics()}
    assert_same(answers, uncached)
    history = [0, len(prompts[0]), len(prompts[1])]
    assert [answer.cached_tokens for answer in answers] == [n // C * C for n in history]
    assert metrics["vllm:prefix_cache_hits"].value == sum(n // C * C for n in history)
    assert metrics["vllm:prefix_cache_queries"].value == sum(map(len, prompts))


@pytest.mark.thorough
@pytest.mark.parametrize("window", [0, 8, 40])
def test_hits_with_other_windows(window):
    prompts = turns(noise(1, 5 * C + 9))
    more = dict(compression_window_size=window, compression_scorer=DEVICE.schedule_scorers[0])
    with engine(**OPTIONS, **more, enable_prefix_caching=False) as llm:
        uncached = [generate(llm, [prompt], max_tokens=5)[0] for prompt in prompts]
    with engine(**OPTIONS, **more) as llm:
        answers = [generate(llm, [prompt], max_tokens=5)[0] for prompt in prompts]
    assert_same(answers, uncached)
    assert answers[2].cached_tokens == len(prompts[1]) // C * C


def test_chunks_of_an_answer_are_hit_too():
    """What was sealed while decoding is the same as what prefill would have sealed."""
    prompt = noise(3, 100)
    more = dict(compression_scorer=DEVICE.schedule_scorers[0])
    with engine(**OPTIONS, **more, **DEVICE.graphs) as llm:
        answer = generate(llm, [prompt], max_tokens=200)[0]
        follow_up = prompt + answer.tokens + noise(4, 20)
        cached = generate(llm, [follow_up], max_tokens=10)[0]
    with engine(**OPTIONS, **more, enable_prefix_caching=False) as llm:
        uncached = generate(llm, [follow_up], max_tokens=10)[0]
    # The last token of an answer is never computed, so the boundary has to lie before it.
    assert cached.cached_tokens == (len(prompt) + len(answer.tokens) - 1) // C * C
    assert_same([cached], [uncached])


@pytest.mark.parametrize("interval, second", [(None, 0), (2 * C, 4 * C), (C, 5 * C)])
def test_a_text_that_others_share_is_resumed_where_it_ends(interval, second):
    """At boundaries that were kept by the second of them, and at its end from the third on."""
    shared = conversation_prompt(8, 5 * C + 20)
    prompts = [shared + noise(seed, 3 * C) for seed in (21, 22, 23)]
    more = dict(compression_scorer=DEVICE.schedule_scorers[0])
    with engine(**OPTIONS, **more, enable_prefix_caching=False) as llm:
        uncached = generate(llm, prompts, max_tokens=10)
    if interval:
        more |= dict(prefix_cache_retention_interval=interval)
    with engine(**OPTIONS, **more) as llm:
        answers = [generate(llm, [prompt], max_tokens=10)[0] for prompt in prompts]
    assert_same(answers, uncached)
    assert [answer.cached_tokens for answer in answers] == [0, second, len(shared) // C * C]


def test_a_sealed_block_is_never_written_again():
    """Checksums of every sealed block, taken when it is first hashed and after every later step."""
    prompts = turns(conversation_prompt(5, 400)) + [noise(6, 300), noise(7, 130)]
    with engine(**OPTIONS) as llm:
        core = llm.llm_engine.engine_core.engine_core
        pool = core.scheduler.kv_cache_manager.block_pool
        managers = core.scheduler.kv_cache_manager.coordinator.single_type_managers
        sealed_group = [type(manager).__name__ for manager in managers].index("SealedManager")
        seen: dict[tuple[int, bytes], int] = {}
        checks = 0
        step = core.model_executor.execute_model

        def execute(*args, **kwargs):
            nonlocal checks
            result = step(*args, **kwargs)
            hashed = [
                block
                for block in pool.blocks
                if block.block_hash is not None
                and int.from_bytes(block.block_hash[-4:], "big") == sealed_group
            ]
            sums = llm.collective_rpc("tangram_checksums", args=([b.block_id for b in hashed],))[0]
            for block, checksum in zip(hashed, sums, strict=True):
                key = (block.block_id, bytes(block.block_hash))
                checks += key in seen
                assert seen.setdefault(key, checksum) == checksum
            return result

        core.model_executor.execute_model = execute
        for _ in range(2):
            generate(llm, prompts, max_tokens=70)
    assert len(seen) >= 15 and checks > 1000
    assert len(set(seen.values())) > 10, "blocks are not all alike"
