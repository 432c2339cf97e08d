"""What the managers of the cache groups let others find, and what they count as needed."""

from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from benchmarks.serving import simulate
from benchmarks.serving.sides import find_model
from tangram.vllm_plugin.core.counts import count_blocks, count_kept
from tangram.vllm_plugin.core.specs import RecentSpec, SealedSpec
from tests.kernels.inputs import make_geometry

CHUNK = 64
GEOMETRY = make_geometry([[2, 2]], chunk_size_tokens=CHUNK, window_size_tokens=32)


def make_manager(**more):
    init_none_hash(sha256)
    specs = [spec.of(GEOMETRY.block_shape, torch.float32) for spec in (SealedSpec, RecentSpec)]
    groups = [KVCacheGroupSpec([name], spec) for name, spec in zip("ab", specs, strict=True)]
    config = KVCacheConfig(num_blocks=200, kv_cache_tensors=[], kv_cache_groups=groups)
    sizes = dict(scheduler_block_size=CHUNK, hash_block_size=GEOMETRY.recent_block_tokens)
    return KVCacheManager(config, max_model_len=4096, max_in_flight_tokens=200, **sizes, **more)


@pytest.fixture
def manager():
    return make_manager()


def prompt(name, tokens=range(1000)):
    hashes = get_request_block_hasher(GEOMETRY.recent_block_tokens, sha256)
    return Request(name, list(tokens), SamplingParams(), None, block_hasher=hashes)


def found(manager, name):
    """Tokens that another request with the same prompt finds."""
    return manager.get_computed_blocks(prompt(name))[1]


def test_the_block_table_keeps_what_a_step_may_read():
    assert RecentSpec.of(GEOMETRY.block_shape, torch.float32).num_retained_tokens == CHUNK - 1 + 32


def test_a_step_that_is_not_run_leaves_nothing_to_be_found(manager):
    first = prompt("first")
    assert manager.allocate_slots(first, 300) is not None
    manager.free(first)
    assert found(manager, "other") == 0


def test_what_steps_before_it_computed_is_found(manager):
    first = prompt("first")
    manager.allocate_slots(first, 300)
    first.num_computed_tokens = 300
    manager.allocate_slots(first, 500)
    assert found(manager, "other") == 768  # planned, and will be computed before they are read
    manager.free(first)
    assert found(manager, "another") == 256
    again = prompt("again")
    blocks, hit, *_ = manager.get_computed_blocks(again)
    assert manager.allocate_slots(again, 500, hit, blocks) is not None
    again.num_computed_tokens = 756
    manager.free(again)
    assert found(manager, "last") == 704


def test_what_another_still_holds_stays_to_be_found(manager):
    first, second = prompt("first"), prompt("second")
    manager.allocate_slots(first, 500)
    first.num_computed_tokens = 500
    blocks, hit, *_ = manager.get_computed_blocks(second)
    manager.allocate_slots(second, 200, hit, blocks)
    second.num_computed_tokens = hit
    manager.free(second)
    assert found(manager, "other") == hit == 448


def resumed(manager):
    """Boundaries of the prompt at which another one can be resumed that goes on otherwise."""
    boundaries = range(CHUNK, 1000, CHUNK)
    others = {m: prompt(f"to {m}", [*range(m), 5000]) for m in boundaries}
    return [m for m, other in others.items() if manager.get_computed_blocks(other)[1] == m]


def test_kv_events_name_chunks_at_whose_end_nothing_can_be_resumed():
    """Why they are refused.

    A router learns of sealed blocks in one chain, for it takes events of full attention. Without
    the blocks between, the last would be behind no other.
    """
    manager = make_manager(enable_kv_cache_events=True)
    manager.coordinator.retention_interval = 512
    first = prompt("first")
    for end in (500, 1000):
        assert manager.allocate_slots(first, 500) is not None
        first.num_computed_tokens = end
    manager.free(first)
    stored = [e for e in manager.take_events() if e.kv_cache_spec_kind == "full_attention"]
    assert {event.group_idx for event in stored} == {0}
    assert [event.parent_block_hash for event in stored] == [None, stored[0].block_hashes[-1]]
    told = [hash for event in stored for hash in event.block_hashes]
    assert len(told) == 1000 // CHUNK == 15
    assert resumed(manager) == [512, 960]

    _, recent = manager.get_computed_blocks(prompt("other"))[0].blocks
    manager.block_pool.evict_blocks({block.block_id for block in recent if not block.is_null})
    removed = manager.take_events()
    assert removed and {event.group_idx for event in removed} == {1}
    assert resumed(manager) == [512]


@pytest.mark.parametrize(("hit", "blocks"), [(0, 11), (64, 11), (576, 11), (896, 4)])
def test_a_long_prompt_is_admitted_by_the_raw_blocks_that_it_holds_at_once(manager, hit, blocks):
    """Behind a hit that is longer than those blocks too."""
    recent = manager.coordinator.single_type_managers[1]
    assert recent.max_admission_blocks_per_request == 11
    null = recent.block_pool.null_block
    # Of 200 tokens in flight, a chunk and its window; blocks hold 32.
    needed = recent.get_num_blocks_to_allocate(
        "new", 1000, [null] * (hit // 32), hit, hit, 1000, apply_admission_cap=True
    )
    assert needed == blocks


PROMPT = list(range(1, 1051))


@pytest.mark.parametrize(
    ("spare", "planned", "hit"), [(3, {"long": 451, "short": 1}, 1024), (2, {"short": 1}, 0)]
)
def test_priorities_take_a_prompt_out_of_the_step(spare, planned, hit, tmp_path):
    """An answer of higher priority wants a block in the step in which a prompt has just had some.

    Args:
        spare: blocks that are left for the step; the prompt needs two beyond what it gives back.
        planned: tokens of the step.
        hit: tokens of the prompt that are found then. Of what the step before computed nothing is
            to be found: inside a prompt its window does not stay.
    """
    options = "--model tiny --page-group-size 1 --max-model-len 8192 --max-num-batched-tokens 600"
    args = simulate.parser().parse_args([*options.split(), "--memory-gib", "0.1"])
    engine = simulate.Engine("tangram", find_model("tiny", tmp_path), args, simulate.StepTime())
    scheduler, manager = engine.scheduler, engine.scheduler.kv_cache_manager
    scheduler.policy = SchedulingPolicy.PRIORITY
    scheduler.waiting = create_request_queue(scheduler.policy)
    short = engine.add("short", PROMPT[-127:], 500, 0.0)
    engine.step({"short": short})
    long = engine.add("long", PROMPT, 5, 0.0)
    long.priority = 1
    engine.step({"short": short, "long": long})
    assert (short.num_computed_tokens, long.num_computed_tokens) == (128, 599)
    scheduler.running.reverse()  # as after more of them
    pool = manager.block_pool
    pool.get_new_blocks(pool.get_num_free_blocks() - spare)
    assert scheduler.schedule().num_scheduled_tokens == planned
    other = Request("other", PROMPT, SamplingParams(), None, block_hasher=engine._hasher)
    assert manager.get_computed_blocks(other)[1] == hit


def test_what_is_kept_is_what_requests_hold_and_others_would_find(manager):
    """The gauge of bytes saved was 0 whenever no request ran."""
    scheduler = SimpleNamespace(kv_cache_manager=manager, running=[])
    assert count_kept(scheduler, count_blocks(scheduler)) == (0, 0)
    request = prompt("first")
    manager.allocate_slots(request, 500)
    request.num_computed_tokens = 500
    scheduler.running = [request]
    counts = count_blocks(scheduler)
    assert count_kept(scheduler, counts) == (500, counts.blocks.total)

    manager.free(request)
    scheduler.running = []
    counts = count_blocks(scheduler)
    assert counts.blocks.total == 0
    tokens, blocks = count_kept(scheduler, counts)
    assert tokens == found(manager, "other") == 448
    assert blocks > 448 // CHUNK, "the window before a boundary is cached raw, too"
    assert blocks <= len(manager.block_pool.cached_block_hash_to_block)

    assert manager.reset_prefix_cache()
    assert count_kept(scheduler, count_blocks(scheduler)) == (0, 0)
