"""Sealed blocks are counted once, however many requests hold them and whenever they let go."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.metrics.stats import SchedulerStats

from tangram.vllm_plugin.core import counts
from tangram.vllm_plugin.core.counts import STATS_KEY, CacheCounts, SealedCounts, take_counts

requests = st.lists(st.lists(st.integers(0, 8), unique=True, max_size=5), max_size=6)


def blocks(ids):
    return [SimpleNamespace(block_id=number) for number in ids]


@given(requests, st.randoms(use_true_random=False))
def test_counts_are_those_of_sets(held, random):
    counts, alive = SealedCounts(), {}
    events = [(name, begin) for name in range(len(held)) for begin in (True, False)]
    random.shuffle(events)
    for name, begin in events:
        if begin and name not in alive:
            ids = held[name]
            counts.take(blocks(ids[:1]), is_first=True)
            counts.take(blocks(ids[1:]), is_first=not ids[:1])
            alive[name] = ids
        elif name in alive:
            counts.give_back(blocks(alive.pop(name)))
        assert counts.held == len(set().union(*alive.values()))
        assert counts.held_first == len({ids[0] for ids in alive.values() if ids})


def test_counts_are_taken_out_of_the_statistics():
    counts = CacheCounts(
        sealed=3, first=1, recent=2, query_ring=0, free=9, tail_tokens=5, new_chunks=2
    )
    stats = SchedulerStats(kv_connector_stats={STATS_KEY: vars(counts)})
    assert take_counts(stats) == counts
    assert stats == SchedulerStats()
    assert take_counts(stats) is None and take_counts(None) is None


def test_statistics_of_a_connector_are_left_alone():
    stats = SchedulerStats(kv_connector_stats={"transfers": 3})
    assert take_counts(stats) is None
    assert stats.kv_connector_stats == {"transfers": 3}


def test_every_block_is_looked_at_when_the_engine_is_idle_and_seldom_else(monkeypatch):
    now, looked = [100.0], []
    scheduler = SimpleNamespace(running=["r"], vllm_config=None)
    sealed = SealedCounts(_drift=SimpleNamespace(read=lambda: None))
    monkeypatch.setattr(counts.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(counts, "_sealed_counts", lambda _: sealed)
    monkeypatch.setattr(counts, "count_blocks", lambda _: CacheCounts(0, 0, 0, 0, 9, 0, 0))
    monkeypatch.setattr(
        counts, "count_kept", lambda *_: looked.append(now[0]) or (len(looked), 2 * len(looked))
    )
    make_stats = counts._make_stats(lambda _: SchedulerStats())

    def kept(at, running):
        now[0], scheduler.running = at, running
        told = take_counts(make_stats(scheduler))
        return told and (told.kept_tokens, told.kept_blocks)

    assert kept(100.0, ["r"]) == (1, 2)
    assert kept(100.1, ["r"]) is None
    assert kept(101.0, ["r"]) == kept(104.0, ["r"]) == (1, 2)
    assert kept(105.0, ["r"]) == (2, 4)
    assert kept(105.1, []) == (3, 6)
    assert looked == [100.0, 105.0, 105.1]
