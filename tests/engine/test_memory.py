"""What a request holds is what geometry says, at every step, and nothing is left at the end."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tangram.plan.compression_plan import plan_of
from tangram.vllm_plugin.core.counts import count_blocks
from tests.engine.harness import engine, few, generate
from tests.engine.prompts import conversation_prompt, noise

GROUPS = {"SealedManager": "sealed", "RecentManager": "recent", "QueryRingManager": "query_ring"}


def scheduler_of(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


def held(llm, request_id: str) -> dict[str, int]:
    """Blocks of a request by kind."""
    counts = dict.fromkeys(GROUPS.values(), 0)
    for manager in scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers:
        blocks = manager.req_to_blocks.get(request_id, [])
        counts[GROUPS[type(manager).__name__]] = sum(not block.is_null for block in blocks)
    return counts


def step_ranges(output) -> Iterator[tuple[str, int, int]]:
    """(request, tokens computed before the step, and after it)."""
    cached = output.scheduled_cached_reqs
    before = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    before |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
    for request_id, count in output.num_scheduled_tokens.items():
        yield request_id, before[request_id], before[request_id] + count


def assert_counts(llm) -> None:
    """What the managers counted is what their requests hold, a shared block once."""
    scheduler = scheduler_of(llm)
    counts = count_blocks(scheduler)
    blocks, first = {kind: set() for kind in GROUPS.values()}, set()
    for manager in scheduler.kv_cache_manager.coordinator.single_type_managers:
        kind = GROUPS[type(manager).__name__]
        for held_blocks in manager.req_to_blocks.values():
            blocks[kind] |= {block.block_id for block in held_blocks if not block.is_null}
            if kind == "sealed" and held_blocks:
                first.add(held_blocks[0].block_id)
    assert counts.blocks._asdict() == {kind: len(ids) for kind, ids in blocks.items()}
    assert counts.first == len(first)
    assert (
        counts.free + counts.blocks.total
        == scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1
    )


@contextmanager
def checked_steps(llm) -> Iterator[list[int]]:
    """Compare every request of every step with the formula; gives the chunks sealed so far."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    geometry = plan_of(llm.llm_engine.vllm_config.additional_config).geometry
    run, sealed = executor.execute_model, []

    def execute(output, *args, **kwargs):
        for request_id, before, after in step_ranges(output):
            expected = geometry.blocks_held(after, before)._asdict()
            assert held(llm, request_id) == expected, (before, after)
            sealed.append(expected["sealed"])
        assert_counts(llm)
        return run(output, *args, **kwargs)

    executor.execute_model = execute
    yield sealed
    executor.execute_model = run


def assert_pool_is_whole(llm) -> None:
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # one is the null block


@pytest.mark.parametrize("scorer", few(["key_diff", "snap_kv"], ["snap_kv"]))
@pytest.mark.parametrize(
    "chunk_size, ratio", few([(64, 0.25), (256, 0.5), (128, 1.0)], [(64, 0.25)])
)
def test_blocks_held_are_those_of_the_formula(scorer, chunk_size, ratio):
    with engine(
        compression_ratio=ratio,
        compression_chunk_size=chunk_size,
        compression_scorer=scorer,
        max_num_batched_tokens=200,
        async_scheduling=False,  # it frees a step later, when the step before is done
    ) as llm:
        prompts = [conversation_prompt(1, 700), noise(2, 255), noise(3, 63), noise(4, 1)]
        with checked_steps(llm) as sealed:
            generate(llm, prompts, max_tokens=150)
            generate(llm, prompts + prompts, max_tokens=20)
        assert max(sealed) >= 3
        assert_pool_is_whole(llm)


@pytest.mark.thorough
def test_the_pool_has_the_blocks_that_the_layout_promises():
    cache_bytes = 50_000_000
    with engine(
        compression_ratio=0.25, kv_cache_memory_bytes=cache_bytes, max_num_batched_tokens=512
    ) as llm:
        geometry = plan_of(llm.llm_engine.vllm_config.additional_config).geometry
        status = llm.collective_rpc("tangram_status")[0]
    assert status["block_bytes"] == geometry.block_bytes
    assert status["blocks"] == cache_bytes // geometry.block_bytes


@pytest.mark.thorough
def test_aborted_requests_give_their_blocks_back():
    from vllm import SamplingParams

    with engine(
        compression_ratio=0.25,
        compression_chunk_size=64,
        compression_scorer="snap_kv",
        max_num_batched_tokens=128,
    ) as llm:
        core = llm.llm_engine
        for i in range(6):
            core.add_request(
                f"request-{i}",
                {"prompt_token_ids": noise(i, 300 + i)},
                SamplingParams(max_tokens=200, temperature=0, ignore_eos=True),
            )
        for aborted in ("request-1", "request-5", "request-0", "request-3"):
            for _ in range(7):  # in the middle of its prefill, or of its answer
                core.step()
                assert_counts(llm)
            core.abort_request([aborted])
        finished = 0
        while core.has_unfinished_requests():
            finished += sum(output.finished for output in core.step())
        assert finished == 2
        assert_pool_is_whole(llm)
        coordinator = scheduler_of(llm).kv_cache_manager.coordinator
        assert_counts(llm)
        assert not any(manager.req_to_blocks for manager in coordinator.single_type_managers)
