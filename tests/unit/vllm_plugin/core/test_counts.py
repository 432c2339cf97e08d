"""Sealed blocks are counted once, however many requests hold them and whenever they let go."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.metrics.stats import SchedulerStats

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
