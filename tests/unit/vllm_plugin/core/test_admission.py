"""Who is admitted next of those that wait, and whose scheduler is used at all."""

import gc
import random
import weakref

import pytest
from vllm import SamplingParams
from vllm.config import SchedulerConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import FCFSRequestQueue, PriorityRequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import PrefixCacheStats
from vllm.v1.request import Request, RequestStatus

from benchmarks.serving import simulate
from benchmarks.serving.sides import find_model
from tangram.bundled import recall_model_path
from tangram.plan.options import CONFIG_KEY
from tangram.vllm_plugin import register
from tangram.vllm_plugin.core.admission import (
    ADMITS_BY_HISTORY,
    PATIENCE,
    AsyncHistoryScheduler,
    HistoryQueue,
    HistoryScheduler,
)
from tangram.vllm_plugin.frontend import configure


def request(name, tokens=10):
    return Request(str(name), [1] * tokens, SamplingParams(), None)


@pytest.fixture
def queue():
    """Whose requests have as many uncached tokens as tokens."""
    return HistoryQueue(lambda request: request.num_tokens)


def names(queue):
    """In the order in which they are admitted."""
    found = []
    while queue:
        first = queue.peek_request()
        assert queue.pop_request() is first
        found.append(first.request_id)
    return found


def test_those_whose_history_is_cached_go_first(queue):
    for name, uncached in (("none", 900), ("little", 90), ("all", 1), ("all, later", 1)):
        queue.add_request(request(name, uncached))
    assert [r.request_id for r in queue] == ["none", "little", "all", "all, later"]
    assert len(queue) == 4
    queue.peek_request()
    assert [r.request_id for r in queue] == names(queue) == ["all", "all, later", "little", "none"]
    with pytest.raises(IndexError):
        queue.peek_request()


def test_what_waited_long_enough_is_passed_no_more(queue):
    queue.add_request(request("none", 100))
    queue.clock_tokens += 99 * PATIENCE - 1
    queue.add_request(request("just in time", 1))
    queue.clock_tokens += 2
    queue.add_request(request("too late", 1))
    assert names(queue) == ["just in time", "none", "too late"]


@pytest.mark.parametrize("seed", range(20))
def test_nobody_is_passed_by_who_came_later_than_patience_allows(seed):
    """Whatever is cached of them, and however they are skipped, preempted or aborted meanwhile."""
    rng = random.Random(seed)
    uncached, came, passed_by, looks = {}, {}, {}, []
    queue = HistoryQueue(lambda r: looks.append(r) or uncached[r])
    preempted = []
    for number in range(300):
        queue.clock_tokens += rng.randrange(3000)
        for _ in range(rng.choice((0, 1, 1, 2, 5))):
            new = request(f"{number}-{len(came)}")
            uncached[new], came[new] = (
                rng.choice((1, 30, rng.randrange(1, 500))),
                queue.clock_tokens,
            )
            queue.add_request(new)
        if len(queue) < 2:
            continue
        skipped = []
        for _ in range(rng.randrange(3)):
            queue.peek_request()
            skipped.insert(0, queue.pop_request())
        if queue and rng.random() < 0.7:
            first = queue.peek_request()
            assert queue.pop_request() is first
            before = [r for r in queue if r not in preempted and came[r] < came[first]]
            if first not in preempted:
                passed_by.update({(r, first): came[first] - came[r] for r in before})
            if rng.random() < 0.2:
                first.status = RequestStatus.PREEMPTED
                preempted.append(first)
                queue.prepend_request(first)
        queue.prepend_requests(skipped)
        if queue and rng.random() < 0.1:
            queue.remove_requests([rng.choice(list(queue))])
    assert len(passed_by) > 50
    for (passed, _), later_tokens in passed_by.items():
        assert later_tokens < PATIENCE * uncached[passed]
    assert len(looks) == len(set(looks)), "a history is looked up once"


def test_preempted_requests_stay_in_front(queue):
    first, second = request("first", 5000), request("second", 9000)
    for running in (first, second):
        queue.add_request(running)
        assert queue.pop_request() is running
        running.status = RequestStatus.PREEMPTED
    queue.add_request(request("cached", 1))
    queue.prepend_request(second)
    queue.prepend_request(first)
    queue.add_request(request("also cached", 1))
    assert names(queue) == ["first", "second", "cached", "also cached"]


def test_who_is_put_in_front_without_having_come_stays_there(queue):
    """As a request whose blocks came from elsewhere, and did not arrive."""
    queue.add_request(request("cached", 1))
    queue.prepend_request(request("other", 9000))
    assert names(queue) == ["other", "cached"]


def test_an_aborted_request_is_gone_and_leaves_no_trace(queue):
    waiting = [request(name, tokens) for name, tokens in (("a", 30), ("b", 20), ("c", 10))]
    for each in waiting:
        queue.add_request(each)
    queue.peek_request()
    queue.remove_request(waiting[1])
    queue.remove_requests([waiting[2]])
    assert names(queue) == ["a"]
    del waiting[:], each
    assert len(queue._waits) == 0


def test_nothing_is_looked_up_while_nobody_else_waits():
    looks = []
    queue = HistoryQueue(lambda request: looks.append(request) or 1)
    queue.add_request(request("alone"))
    assert queue.peek_request().request_id == "alone"
    assert looks == []
    queue.add_request(request("second"))
    for _ in range(3):
        queue.clock_tokens += 100
        queue.peek_request()
    assert [r.request_id for r in looks] == ["alone", "second"]


# In a scheduler


def engine_of(tmp_path, *options, memory_gib="0.1"):
    argv = "--model tiny --page-group-size 1 --max-model-len 8192 --max-num-batched-tokens 600"
    args = simulate.parser().parse_args([*argv.split(), "--memory-gib", memory_gib, *options])
    return simulate.Engine("tangram", find_model("tiny", tmp_path), args, simulate.StepTime())


def play(engine, *requests):
    """Steps until all have ended, and who began in which order."""
    live, order = {r.request_id: r for r in requests}, []
    while not all(r.is_finished() for r in requests):
        _, begun, ended = engine.step(live)
        order += begun
        for request_ in ended:
            del live[request_.request_id]
    return order


HISTORY, OTHER = list(range(100, 2100)), list(range(3000, 5000))


@pytest.mark.parametrize(
    ("options", "order"),
    [((), ["goes on", "new"]), (("--first-come",), ["new", "goes on"])],
)
def test_a_scheduler_admits_by_what_it_has_cached(tmp_path, options, order):
    engine = engine_of(tmp_path, *options)
    play(engine, engine.add("first turn", HISTORY, 2, 0.0))
    assert play(engine, engine.add("new", OTHER, 2, 0.0),
                engine.add("goes on", [*HISTORY, 7, 8], 2, 0.0)) == order  # fmt: skip
    assert engine.is_whole


def test_looks_leave_statistics_and_the_order_of_eviction_alone(tmp_path):
    engine = engine_of(tmp_path)
    scheduler, manager = engine.scheduler, engine.scheduler.kv_cache_manager
    manager.log_stats, manager.prefix_cache_stats = True, PrefixCacheStats()
    play(engine, engine.add("first turn", HISTORY, 2, 0.0))
    waiting = [engine.add("new", OTHER, 2, 0.0), engine.add("goes on", [*HISTORY, 7], 2, 0.0)]
    pool = manager.block_pool

    def state():
        stats = manager.prefix_cache_stats
        counts = stats.requests, stats.queries, stats.hits
        free = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
        return counts, free, [block.ref_cnt for block in pool.blocks]

    before = state()
    assert before[0][0] == 1 and len(before[1]) > 10
    assert scheduler.waiting.peek_request() is waiting[1]
    assert state() == before
    found = manager.get_computed_blocks(waiting[1])[1]
    assert scheduler._uncached_tokens(waiting[1]) == 2001 - found < 300
    waiting[1].skip_reading_prefix_cache = True
    assert scheduler._uncached_tokens(waiting[1]) == 2001


def test_an_abort_while_it_waits(tmp_path):
    engine = engine_of(tmp_path)
    new, other = engine.add("new", OTHER, 2, 0.0), engine.add("other", HISTORY, 2, 0.0)
    engine.scheduler.waiting.peek_request()
    engine.scheduler.finish_requests(["new"], RequestStatus.FINISHED_ABORTED)
    assert new.is_finished() and play(engine, other) == ["other"]
    assert engine.is_whole and not engine.scheduler.waiting


def test_the_clock_is_what_was_computed(tmp_path):
    engine = engine_of(tmp_path)
    play(engine, engine.add("new", OTHER, 3, 0.0))
    assert engine.scheduler.waiting.clock_tokens == len(OTHER) + 2


# Whose scheduler


class OfTheUser(Scheduler):
    """A scheduler from outside."""


def configured(monkeypatch, compression=None, is_async=True, **arguments):
    """The configuration of a platform where steps may overlap, with what was said of the scheduler.

    Returns:
        It, its scheduler, what the plugin said of those that wait, and what vLLM warned of.
    """
    register()
    check = current_platform.check_and_update_config

    def check_and_update(config):
        check(config)
        config.scheduler_config.async_scheduling = is_async

    platform = type(current_platform)
    monkeypatch.setattr(platform, "check_and_update_config", staticmethod(check_and_update))
    told, warned = [], []
    monkeypatch.setattr(configure.logger, "info", lambda text, *args: told.append(text % args))
    warn = "vllm.config.scheduler.logger.warning_once"
    monkeypatch.setattr(warn, lambda text, *args: warned.append(text % args))
    uniform = {"compression_profile": "none"}
    additional = {} if compression is None else {CONFIG_KEY: {**uniform, **compression}}
    made = EngineArgs(
        str(recall_model_path()), additional_config=additional, **arguments
    ).create_engine_config()
    scheduler = made.scheduler_config.get_scheduler_cls()
    return made, scheduler, [line for line in told if "waiting requests" in line], warned


@pytest.mark.parametrize(
    ("is_async", "expected"), [(True, AsyncHistoryScheduler), (False, HistoryScheduler)]
)
def test_compression_takes_the_place_of_the_scheduler_that_vllm_would_choose(
    monkeypatch, is_async, expected
):
    _, scheduler, told, warned = configured(monkeypatch, {}, is_async)
    assert scheduler is expected
    assert issubclass(scheduler, AsyncScheduler) == is_async
    assert len(told) == 1 and "cached go first" in told[0]
    assert warned == [], "vLLM's warning is of schedulers that may be slow"


@pytest.mark.parametrize(
    ("compression", "arguments", "expected", "reason"),
    [
        ({"compression_admission": False}, {}, AsyncScheduler, "--no-compression-admission"),
        ({}, {"scheduling_policy": "priority"}, AsyncScheduler, "--scheduling-policy"),
        ({}, {"enable_prefix_caching": False}, AsyncScheduler, "nothing is cached"),
        ({}, {"scheduler_cls": OfTheUser}, OfTheUser, "--scheduler-cls"),
        ({}, {"scheduler_cls": f"{__name__}.OfTheUser"}, OfTheUser, "--scheduler-cls"),
    ],
)
def test_what_else_was_asked_for_is_left_alone(
    monkeypatch, compression, arguments, expected, reason
):
    _, scheduler, told, warned = configured(monkeypatch, compression, **arguments)
    assert scheduler.__qualname__ == expected.__qualname__
    assert not issubclass(scheduler, HistoryScheduler | AsyncHistoryScheduler)
    assert len(told) == 1 and reason in told[0]
    assert len(warned) == (expected is OfTheUser), "of a class of the user's vLLM warns as ever"


@pytest.mark.parametrize("compression", [None, {"enable_compression": False}])
def test_without_compression_nothing_of_the_scheduler_changes(monkeypatch, compression):
    made, scheduler, told, warned = configured(monkeypatch, compression)
    assert made.scheduler_config.scheduler_cls is None
    assert (scheduler, told, warned) == (AsyncScheduler, [], [])
    of_user = SchedulerConfig.default_factory(scheduler_cls=OfTheUser)
    assert of_user.get_scheduler_cls() is OfTheUser


def test_the_order_of_admission_has_nothing_to_do_with_what_is_compiled(monkeypatch):
    on, off = (
        configured(monkeypatch, {"compression_admission": is_on})[0] for is_on in (True, False)
    )
    assert on.scheduler_config.scheduler_cls != off.scheduler_config.scheduler_cls
    assert on.additional_config == off.additional_config
    assert on.compute_hash() == off.compute_hash()


def with_scheduler(monkeypatch, **fields):
    """Engines have such fields in their scheduler's configuration."""
    original = simulate._configured

    def configured(*args):
        made, *rest = original(*args)
        vars(made.scheduler_config).update(fields)
        return made, *rest

    monkeypatch.setattr(simulate, "_configured", configured)


def test_priorities_keep_their_queue(tmp_path, monkeypatch):
    assert type(engine_of(tmp_path, "--first-come").scheduler.waiting) is FCFSRequestQueue
    with_scheduler(monkeypatch, policy="priority", scheduler_cls=None)
    assert type(engine_of(tmp_path).scheduler.waiting) is PriorityRequestQueue


def test_a_scheduler_whose_steps_overlap_admits_alike(tmp_path, monkeypatch):
    with_scheduler(monkeypatch, scheduler_cls=ADMITS_BY_HISTORY, async_scheduling=True)
    engine = engine_of(tmp_path)
    assert type(engine.scheduler) is AsyncHistoryScheduler
    play(engine, engine.add("first turn", HISTORY, 2, 0.0))
    new, goes_on = engine.add("new", OTHER, 2, 0.0), engine.add("goes on", HISTORY, 2, 0.0)
    assert play(engine, new, goes_on) == ["goes on", "new"]
    assert engine.is_whole


def test_a_queue_holds_no_request_that_it_gave_away():
    """Each comes alone, so that none is ever looked up."""
    queue, gone = HistoryQueue(lambda request: 1), []
    for _ in range(3):
        request = Waiting()
        gone.append(weakref.ref(request))
        queue.add_request(request)
        assert queue.peek_request() is request and queue.pop_request() is request
        del request
    gc.collect()
    assert [each() for each in gone] == [None] * 3


class Waiting:
    """As much of a request as the queue asks for."""

    status = RequestStatus.WAITING
