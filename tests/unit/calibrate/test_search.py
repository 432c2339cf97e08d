"""The search, on divergences that are known functions of the budgets."""

import dataclasses
import itertools

import numpy as np
import pytest

from tangram.budgets import BudgetProblem, MeasuredEntry, with_entry
from tangram.budgets.curves import greedy_pages
from tangram.budgets.grouping import group_by_demand, head_pages
from tangram.calibrate.budget_search.candidates import blends, nearby, single_rules
from tangram.calibrate.budget_search.choice import choose
from tangram.calibrate.budget_search.moves import (
    PageWorth,
    against_all,
    between,
    move_pages,
    shake_pages,
)
from tangram.calibrate.budget_search.search import search_budgets
from tangram.errors import ConfigurationError
from tangram.profile import ModelIdentity, Profile

LAYERS, HEADS = 5, 4
SHARES = np.linspace(0, 1, 17)


def make_problem(ratio=0.2, group=1, seed=0, layers=LAYERS, **arrays):
    random = np.random.default_rng(seed)
    shape = (3, LAYERS, HEADS)
    need = random.lognormal(0, 1, shape)
    mass = 1 - (1 - SHARES) ** (1 + 5 * need[..., None])
    statistics = {
        "threshold_share/crosslayer": np.clip(0.2 * need, 0.01, 1)[None],
        "threshold_share/perlayer": np.clip(0.1 * need + 0.1, 0.01, 1)[None],
        "mass_curve": mass,
        "error_curve": (1 - mass) * random.lognormal(0, 1, shape)[..., None],
    }
    profile = Profile(
        model=ModelIdentity("M", layers, HEADS, HEADS, 8, 8, 8),
        scorer_name="key_diff",
        chunk_size_tokens=256,
        window_size_tokens=32,
        n_sink_tokens=4,
        ratios=(ratio,),
        shares=tuple(SHARES),
        arrays=arrays.get("arrays", statistics),
    )
    return BudgetProblem(
        level="measured",
        num_layers=layers,
        num_kv_heads=HEADS,
        ratio=ratio,
        chunk_size_tokens=256,
        page_size_rows=16,
        page_group_size=group,
        n_sink_tokens=4,
        profile=profile,
    )


def entry_of(problem, head_groups):
    """What a profile holds once these budgets were measured."""
    return MeasuredEntry(
        ratio=problem.ratio,
        page_group_size=problem.page_group_size,
        chunk_size_tokens=problem.chunk_size_tokens,
        page_size_rows=problem.page_size_rows,
        n_sink_tokens=problem.n_sink_tokens,
        window_size_tokens=32,
        head_groups=head_groups,
    )


class Needs:
    """Divergence: every head has a weight and a scale, and samples differ a little."""

    def __init__(self, seed=1, noise=0.1):
        random = np.random.default_rng(seed)
        self.weight = random.lognormal(0, 1.5, (LAYERS, HEADS))
        self.scale = random.lognormal(0.7, 0.7, (LAYERS, HEADS))
        self.of_sample = random.lognormal(0, noise, (99, LAYERS, HEADS))
        self.asked = []

    def each(self, pages, samples):
        weight = self.weight * self.of_sample[list(samples)]
        return (weight * np.exp(-pages / self.scale)).sum(axis=(1, 2)) ** 1.5

    def loss(self, pages, samples):
        return float(self.each(pages, samples).mean())

    def __call__(self, budgets, samples):
        self.asked.append((budgets, tuple(samples)))
        return self.each(head_pages(budgets), samples)

    def best(self, problem, samples):
        steps = np.arange(problem.max_pages + 1)
        weight = (self.weight * self.of_sample[list(samples)]).mean(axis=0)
        gain = -weight[..., None] * np.exp(-steps / self.scale[..., None])
        pages = greedy_pages(gain, problem.total_pages, floor_pages=problem.floor_pages)
        return self.loss(pages, samples)


def equal(value):
    """The same divergence for all budgets on all samples."""
    return lambda budgets, samples: [value] * len(samples)


@pytest.mark.parametrize("ratio", [0.1, 0.25])
def test_it_comes_near_the_best_budgets_there_are(ratio):
    problem, needs = make_problem(ratio), Needs()
    found = search_budgets(problem, needs, 9, time_limit_s=1e9, max_evaluations=400)
    check = range(1, 9, 2)
    best = needs.best(problem, check)
    rules = [needs.loss(head_pages(rule), check) for rule in single_rules(problem).values()]
    assert found.divergence == pytest.approx(needs.loss(head_pages(found.head_groups), check))
    assert found.divergence - best < 0.15 * (min(rules) - best)
    assert found.moved_pages > 0


def test_pairs_find_what_a_linear_belief_does_not():
    # A head that is worth nothing until it has half a chunk; all others are worth a little.
    problem, needs = make_problem(0.3), Needs()

    def divergence(budgets, samples):
        needy = head_pages(budgets)[3, 1] >= 8
        return needs(budgets, samples) * (0.1 if needy else 1.0)

    found = search_budgets(problem, divergence, 9, time_limit_s=1e9)
    assert head_pages(found.head_groups)[3, 1] >= 8
    best = needs.best(problem, range(1, 9, 2))
    assert found.divergence < 0.2 * best


def test_one_group_gives_to_all_others_and_takes_of_them():
    pages, bounds = np.array([1, 2, 5, 16]), dict(floor=1, most=16)
    assert against_all(pages, 2, -1.0, **bounds).tolist() == [2, 5, 1, 16]
    assert against_all(pages, 2, -0.5, **bounds).tolist() == [2, 3, 3, 16]
    assert against_all(pages, 2, 1.0, **bounds).tolist() == [1, 2, 9, 12]
    assert against_all(pages, 0, 0.5, **bounds).sum() == pages.sum()  # a page, if no more
    assert against_all(pages, 0, 0.5, **bounds)[0] == 2
    assert against_all(pages, 3, 1.0, **bounds).tolist() == pages.tolist()  # it is full
    assert against_all(pages, 0, -1.0, **bounds).tolist() == pages.tolist()  # on the floor
    full = np.full(3, 16)
    assert against_all(full, 0, -1.0, **bounds).tolist() == full.tolist()


def test_one_group_gives_to_another():
    pages, bounds = np.array([1, 2, 6, 16]), dict(floor=1, most=16)
    assert between(pages, 2, 0, 0.0, **bounds).tolist() == [2, 2, 5, 16]
    assert between(pages, 2, 0, 0.5, **bounds).tolist() == [3, 2, 4, 16]
    assert between(pages, 2, 0, 1.0, **bounds).tolist() == [6, 2, 1, 16]
    assert between(pages, 3, 2, 1.0, **bounds).tolist() == [1, 2, 16, 6]  # its room
    assert between(pages, 0, 2, 1.0, **bounds).tolist() == pages.tolist()


def test_shaken_pages_keep_their_sum_and_the_bounds():
    pages, rng = np.array([1, 2, 6, 16]), np.random.default_rng(0)
    for _ in range(50):
        shaken = shake_pages(pages, rng, 0.5, floor=1, most=16)
        assert shaken.sum() == pages.sum() and shaken.min() >= 1 and shaken.max() <= 16
        assert 0 < np.abs(shaken - pages).sum() <= 2 * 10  # half of the 21 above the floor
    full = np.full(4, 16)
    assert (shake_pages(full, rng, 0.5, floor=1, most=16) == full).all()


@pytest.mark.parametrize("group", [1, 2, 4])
def test_all_budgets_tried_have_the_exact_total_and_obey_the_bounds(group):
    problem, needs = make_problem(0.2, group), Needs()
    found = search_budgets(problem, needs, 6, time_limit_s=1e9, max_evaluations=150)
    assert len(needs.asked) == found.evaluations <= 150 + 8 * 3
    for budgets, _ in needs.asked:
        pages = np.array(budgets.pages)
        assert budgets.group_size == group
        assert pages.sum() == problem.total_pages
        assert pages.min() >= problem.floor_pages and pages.max() <= problem.max_pages


def test_the_same_divergences_give_the_same_result():
    one, two = (
        search_budgets(make_problem(), Needs(), 6, time_limit_s=1e9, max_evaluations=120)
        for _ in range(2)
    )
    assert one == two


def test_moves_are_chosen_without_the_samples_that_have_the_last_word():
    needs = Needs()
    search_budgets(make_problem(), needs, 9, time_limit_s=1e9, max_evaluations=200)
    parts = {samples for _, samples in needs.asked}
    assert parts == {(0, 2, 4), (6, 8), (1, 3, 5, 7)}
    looks = sum(samples == (1, 3, 5, 7) for _, samples in needs.asked)
    assert looks < 0.15 * len(needs.asked)


@pytest.mark.parametrize("seed", range(4))
def test_no_rule_is_better_on_the_samples_that_have_the_last_word(seed):
    # Samples so different that moves fit the first part alone.
    problem, needs = make_problem(seed=seed), Needs(seed=seed, noise=3)
    found = search_budgets(problem, needs, 3, time_limit_s=1e9, max_evaluations=150)
    for rule in single_rules(problem).values():
        assert found.divergence <= needs.loss(head_pages(rule), [1]) + 1e-12
    assert found.divergence == pytest.approx(needs.loss(head_pages(found.head_groups), [1]))


def test_where_moves_only_fit_the_first_part_a_rule_is_taken():
    problem = make_problem()
    uniform = single_rules(problem)["uniform"]
    numbers = itertools.count(1)

    def divergence(budgets, samples):
        if budgets == uniform:
            return [1.0] * len(samples)
        return [2.0 if 1 in samples else 1 / (1 + next(numbers))] * len(samples)

    found = search_budgets(problem, divergence, 6, time_limit_s=1e9, max_evaluations=100)
    assert (found.head_groups, found.origin, found.moved_pages) == (uniform, "uniform", 0)


def test_without_time_the_output_errors_rule_alone_is_measured():
    """All seven were, on both parts: a slow machine took many times its limit."""
    problem, needs, told = make_problem(), Needs(), []
    found = search_budgets(problem, needs, 6, time_limit_s=0, progress=told.append)
    error = single_rules(problem)["error"]
    assert [budgets for budgets, _ in needs.asked] == [error] * 3  # two halves, and the last word
    assert (found.head_groups, found.origin, found.moved_pages) == (error, "error", 0)
    assert any(line.startswith("the time is up before uniform, cross") for line in told)


@pytest.mark.parametrize("seconds", [4, 9, 14, 30])
def test_the_time_limit_is_kept_within_one_reading_of_the_samples(seconds):
    now = [0.0]
    needs = Needs()

    def slow(budgets, samples):
        now[0] += len(samples)
        return needs(budgets, samples)

    search_budgets(make_problem(), slow, 6, time_limit_s=seconds, clock=lambda: now[0])
    assert seconds <= now[0] <= seconds + 6


def test_the_clock_ends_it():
    ticks = itertools.count()
    problem, needs = make_problem(), Needs()
    found = search_budgets(problem, needs, 6, time_limit_s=200, clock=lambda: float(next(ticks)))
    assert 100 < next(ticks) < 250
    assert found.moved_pages > 0


def test_only_rules_that_the_profile_allows_are_tried():
    problem = make_problem(arrays={})
    assert list(single_rules(problem)) == ["uniform"]
    found = search_budgets(problem, Needs(), 6, time_limit_s=1e9, max_evaluations=150)
    assert found.origin in ("uniform", "uniform to the power 0.5", "uniform to the power 1.5")
    assert found.moved_pages > 0


def test_a_ratio_of_one_leaves_nothing_to_move():
    found = search_budgets(make_problem(1.0), equal(0.0), 3, time_limit_s=1e9)
    assert set(itertools.chain(*found.head_groups.pages)) == {16}


def test_a_ratio_near_the_floor_that_groups_round_up():
    # In groups of 4 it comes out at a page each; the pages of single heads would be one too few.
    problem, needs = make_problem(0.06, group=4), Needs()
    assert problem.total_pages == problem.num_groups
    assert round(0.06 * problem.max_pages * LAYERS * HEADS) < LAYERS * HEADS
    found = search_budgets(problem, needs, 3, time_limit_s=1e9, max_evaluations=60)
    assert set(itertools.chain(*found.head_groups.pages)) == {1}


def test_one_group_in_all_has_nothing_to_move():
    bounds = dict(floor=1, most=16)
    assert against_all(np.array([5]), 0, 1.0, **bounds).tolist() == [5]
    problem = make_problem(0.25, arrays={}, layers=1, group=4)
    found = search_budgets(problem, equal(1.0), 3, time_limit_s=1e9)
    assert found.head_groups.pages == ((4,),)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_budgets_whose_divergence_is_no_number_are_never_taken(bad):
    problem, needs = make_problem(), Needs()
    numbers = itertools.count()

    def divergence(budgets, samples):
        each = needs(budgets, samples)
        return [*each[:-1], bad] if next(numbers) % 5 == 4 else each

    found = search_budgets(problem, divergence, 6, time_limit_s=1e9, max_evaluations=120)
    assert found.divergence < 1e3 and found.moved_pages > 0
    with pytest.raises(ConfigurationError, match="answers that are numbers.*--dtype"):
        search_budgets(problem, equal(bad), 6, time_limit_s=1e9, max_evaluations=120)


def test_too_few_samples_are_refused():
    with pytest.raises(ConfigurationError, match="2 sample.*at least 3"):
        search_budgets(make_problem(), Needs(), 2, time_limit_s=1)


def test_budgets_that_are_clearly_closer_are_taken():
    near, far = np.linspace(0.1, 0.2, 8), np.linspace(0.3, 0.4, 8)
    assert choose({"near": near, "far": far}) == ("near", ())
    assert choose({"far": far, "near": near}) == ("near", ())


def test_one_sample_does_not_decide_between_budgets_within_noise():
    """By the mean `b` is ahead: `a` is far off on one sample, and closer on the other seven."""
    a = np.array([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 1.2])
    b = np.full(8, 0.2)
    assert a.mean() > b.mean()
    assert choose({"a": a, "b": b}) == ("a", ("b",))
    far = np.full(8, 0.9)
    assert choose({"a": a, "b": b, "far": far}) == ("a", ("b",))


def test_one_sample_tells_nothing_apart_and_of_equal_ones_the_last_is_taken():
    one, two = np.array([0.1]), np.array([0.2])
    assert choose({"one": one, "two": two}) == ("one", ("two",))
    assert choose({"first": one, "last": one}) == ("last", ("first",))


def test_what_the_samples_cannot_tell_apart_is_said():
    problem, rules, told = make_problem(), single_rules(make_problem()), []
    noise = np.random.default_rng(0).normal(0, 0.1, 16)

    def divergence(budgets, samples):
        base = {rules["error"]: 1.0, rules["uniform"]: 1.01}.get(budgets, 2.0)
        wobble = noise[list(samples)] * (1 if budgets == rules["uniform"] else 0)
        return base + wobble

    found = search_budgets(
        problem, divergence, 16, time_limit_s=1e9, max_evaluations=40, progress=told.append
    )
    taken, other = found.origin, *found.within_noise
    assert {taken, other} == {"error", "uniform"} and found.check_samples == 8
    assert told[-1] == f"within noise of it on 8 samples: {other}"


def test_blends_lie_between_their_rules():
    problem = make_problem(0.3)
    rules, made = single_rules(problem), dict(blends(problem, ["mass", "uniform"]))
    mass, uniform = (head_pages(rules[name]) for name in ("mass", "uniform"))
    mean = head_pages(made["arithmetic mean of mass, uniform"])
    assert (np.abs(mean - (mass + uniform) / 2) <= 1).all()
    layers = head_pages(made["layers of mass, heads of uniform"]).sum(axis=1)
    assert (np.abs(layers - mass.sum(axis=1)) <= HEADS).all()
    flat = head_pages(made["mass to the power 0.5"])
    assert flat.std() < mass.std() < head_pages(made["mass to the power 1.5"]).std()


def test_pages_go_from_where_they_are_worth_least_to_where_most():
    pages, worth = np.array([4, 4, 4, 1]), np.array([3.0, 0.1, 1.0, -1.0])
    moved = move_pages(pages, worth, 2, floor=1, most=16)
    assert moved.tolist() == [6, 2, 4, 1]
    # No further than half of a group's pages, and no further than it is worth it.
    assert move_pages(pages, worth, 99, floor=1, most=16).tolist() == [6, 2, 4, 1]
    assert move_pages(pages, worth, 99, floor=4, most=16).tolist() == pages.tolist()
    assert move_pages(np.array([4, 4]), np.array([1.0, 1.0]), 9, floor=1, most=16).tolist() == [
        4,
        4,
    ]


def test_the_belief_learns_what_pages_are_worth():
    random = np.random.default_rng(0)
    worth = random.normal(0, 0.3, 6)
    belief = PageWorth(np.full((3, 2), 4))
    before = np.full((3, 2), 4)
    for _ in range(40):
        after = random.integers(2, 8, (3, 2))
        belief.learn(before, after, float(worth @ np.log(after / before).reshape(-1)))
    assert np.abs(belief.mean - worth).max() < 0.1
    assert np.abs(belief.draw(random) - worth).max() < 0.3


def test_what_was_found_for_another_ratio_is_tried():
    problem, needs = make_problem(0.25), Needs()
    found = search_budgets(problem, needs, 6, time_limit_s=1e9, max_evaluations=300)
    entry = entry_of(problem, found.head_groups)
    lower = dataclasses.replace(problem, ratio=0.15, profile=with_entry(problem.profile, entry))
    again = search_budgets(lower, needs, 6, time_limit_s=1e9, max_evaluations=60)
    assert again.origin == "measured nearby"


def test_every_measured_entry_is_a_candidate_whatever_its_sizes():
    """Two entries in chunks of 256: mostly floors at 0.08, and what is asked for at 0.2."""
    problem = make_problem(0.1)
    problem = dataclasses.replace(problem, chunk_size_tokens=512)
    order = np.random.default_rng(3).permutation(LAYERS * HEADS).reshape(LAYERS, HEADS)
    profile, pages = problem.profile, {}
    for ratio, rich in ((0.08, 3), (0.2, 8)):
        small = dataclasses.replace(problem, ratio=ratio, chunk_size_tokens=256)
        groups = group_by_demand(small, np.where(order < rich, 50.0, 1.0))
        pages[ratio] = head_pages(groups)
        profile = with_entry(profile, entry_of(small, groups))
    found = dict(nearby(dataclasses.replace(problem, profile=profile)))
    assert list(found) == [
        "measured nearby",
        "measured at 0.08 in chunks of 256",
        "measured at 0.2 in chunks of 256",
    ]
    # Half the ratio in twice the chunk is the same number of pages: the very same budgets.
    assert (head_pages(found["measured at 0.2 in chunks of 256"]) == pages[0.2]).all()
    assert (head_pages(found["measured nearby"]) != pages[0.2]).any()
    for budgets in found.values():
        assert head_pages(budgets).sum() == problem.total_pages


def test_rules_with_the_same_budgets_are_blended_once_and_uniform_always():
    problem = make_problem(0.3)
    arrays = dict(problem.profile.arrays)
    for name in ("threshold_share/crosslayer", "threshold_share/perlayer"):
        arrays[name] = arrays[name][:, :1]  # one sample: no deviation, so alpha changes nothing
    problem = dataclasses.replace(
        problem, profile=dataclasses.replace(problem.profile, arrays=arrays)
    )
    names = ["crosslayer", "crosslayer alpha 0", "mass", "error", "perlayer", "uniform"]
    means = [name for name, _ in blends(problem, names) if name.startswith("arithmetic")]
    assert means == [
        "arithmetic mean of crosslayer, mass",
        "arithmetic mean of crosslayer, error",
        "arithmetic mean of mass, error",
        "arithmetic mean of crosslayer, uniform",
        "arithmetic mean of mass, uniform",
        "arithmetic mean of error, uniform",
    ]
