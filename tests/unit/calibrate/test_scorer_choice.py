"""Which scorer calibration keeps of those that it tried, and what it tells about the others."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tangram.budgets import allocate, measured_entries
from tangram.budgets.grouping import head_pages
from tangram.calibrate.budget_search import measure
from tangram.calibrate.budget_search.choice import NO_LOSS, choose_scorer, sealing_rank
from tangram.calibrate.budget_search.measure import Measured, measure_profiles
from tangram.calibrate.recording.record import record_profiles
from tangram.calibrate.recording.recorder import Recorders
from tangram.calibrate.recording.resume import Readings
from tangram.calibrate.remaining import Remaining
from tangram.calibrate.scorer_choice import by_divergence, by_predicted_error, predicted_error
from tangram.errors import ConfigurationError, ScorerError, UnsupportedError
from tangram.plan.options import CompressionOptions
from tangram.profile import ModelIdentity, Profile
from tangram.profile.scorer_choice import SCORERS, ScorerChoice
from tangram.scorers import get_scorer

MODEL = ModelIdentity("Tiny", 2, 4, 8, 16, 128, 50)
OPTIONS = CompressionOptions(compression_chunk_size=64, compression_window_size=8)
SHARES = (0.0, 0.25, 0.5, 1.0)


def profile_of(scorer, level=1.0, seed=0, samples=6):
    """Error curves that fall, by a factor higher or lower at every share."""
    random = np.random.default_rng(seed)
    need = random.uniform(0.5, 2.0, (samples, 2, 4, 1))
    errors = level * (1 - np.array(SHARES) ** (1 / need)) * need / 4
    return Profile(
        model=MODEL, scorer_name=scorer, scorer_parameters=get_scorer(scorer).parameters(),
        chunk_size_tokens=64, window_size_tokens=8, n_sink_tokens=4, shares=SHARES,
        arrays={"error_curve": errors.astype(np.float32)},
    )  # fmt: skip


def around(mean, samples=8, spread=0.05, seed=0):
    random = np.random.default_rng(seed)
    return np.array(mean)[:, None] * np.exp(spread * random.standard_normal((len(mean), samples)))


def test_the_scorer_that_diverges_less_is_taken_whatever_its_cost():
    each = {"expected_attention": around([0.05, 0.2]), "key_diff": around([0.1, 0.4], seed=1)}
    assert choose_scorer(each) == "expected_attention"
    assert choose_scorer(dict(reversed(each.items()))) == "expected_attention"


def test_of_those_that_are_alike_the_cheaper_to_seal_is_taken():
    each = {
        "expected_attention": around([0.099, 0.2], spread=0.0),
        "learned": around([0.1, 0.201], spread=0.0),
        "key_diff": around([0.11, 0.22], spread=0.0),
    }
    assert choose_scorer(each) == "learned"
    assert choose_scorer({**each, "key_diff": around([0.1, 0.2], spread=0.0)}) == "key_diff"


def test_noise_does_not_speak_for_the_worse_one():
    better = around([0.1, 0.2], spread=0.5)
    worse = 1.1 * around([0.1, 0.2], spread=0.5)
    assert choose_scorer({"expected_attention": better, "key_diff": worse}) == "expected_attention"


def test_every_ratio_has_the_same_say():
    """Twice as bad at 0.1 is undone by half as bad at 0.5, though there is far less to lose."""
    low, high = around([0.004, 1.0]), around([0.002, 1.5], seed=1)
    assert choose_scorer({"expected_attention": high, "key_diff": low}) == "expected_attention"


def test_what_loses_nothing_is_not_compared():
    least, less = around([NO_LOSS / 1000]), around([NO_LOSS / 2])
    assert choose_scorer({"expected_attention": least, "key_diff": less}) == "key_diff"


def test_another_packages_scorer_is_the_dearest():
    assert sealing_rank("key_diff") < sealing_rank("expected_attention") < sealing_rank("ours")


@pytest.mark.parametrize("ratio", [0.25, 0.4, 1.0])
def test_the_predicted_error_is_that_of_the_curves_at_what_heads_keep(ratio):
    profile = profile_of("key_diff")
    found = predicted_error(profile, ratio, OPTIONS)
    heads = allocate(
        "error", num_layers=2, num_kv_heads=4, ratio=ratio, chunk_size_tokens=64,
        page_size_rows=16, page_group_size=2, n_sink_tokens=4, profile=profile,
    )  # fmt: skip
    kept = head_pages(heads) / 4
    expected = [
        np.mean([
            np.interp(kept[layer, head], SHARES, curves[layer, head])
            for layer in range(2) for head in range(4)
        ])
        for curves in profile.arrays["error_curve"]
    ]  # fmt: skip
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_without_measuring_the_predicted_error_decides():
    profiles = [profile_of("expected_attention", 0.5), profile_of("key_diff", 1.0)]
    chosen = by_predicted_error(profiles, [0.5, 0.25], OPTIONS, {"learned": "too short"})
    assert chosen.scorer_name == "expected_attention"
    choice = ScorerChoice.of(chosen.extra)
    assert (choice.winner, choice.decided_by) == ("expected_attention", "predicted error")
    assert choice.left_out == {"learned": "too short"}
    for profile in profiles:
        for ratio, error in choice.tried[profile.scorer_name].items():
            assert error == predicted_error(profile, ratio, OPTIONS).mean()
    same = [profile_of("expected_attention"), profile_of("key_diff")]
    assert by_predicted_error(same, [0.5], OPTIONS, {}).scorer_name == "key_diff"


def test_what_was_tried_lasts_in_the_file(tmp_path):
    measured = [
        Measured(profile_of("key_diff"), {0.5: np.full(4, 0.2), 0.1: np.full(4, 0.4)}),
        Measured(profile_of("expected_attention"), {0.5: np.full(4, 0.1), 0.1: np.full(4, 0.3)}),
    ]
    by_divergence(measured, {}).save(tmp_path / "p")
    loaded = Profile.load(tmp_path / "p")
    choice = ScorerChoice.of(loaded.extra)
    assert choice.winner == loaded.scorer_name == "expected_attention"
    assert choice.tried["key_diff"] == pytest.approx({0.5: 0.2, 0.1: 0.4})
    assert str(choice) == "expected_attention, of key_diff, expected_attention by divergence"
    plain = loaded.extra[SCORERS]
    for odd in (None, [], {**plain, "tried": 7}, {**plain, "left_out": []}, {"tried": []}):
        assert ScorerChoice.of({SCORERS: odd}) is None
    assert ScorerChoice.of({}) is None


def test_what_cannot_be_had_is_left_out_until_one_is_left():
    told = []
    left = Remaining({"a": 1, "b": 2}, lambda *said: told.append(said))
    with left.leaving_out("a", ScorerError):
        raise ScorerError("no window")
    assert list(left) == [("b", 2)] and told == [("a", "no window")]
    with pytest.raises(ScorerError, match="the last"), left.leaving_out("b", ScorerError):
        raise ScorerError("the last")
    left = Remaining({"a": 1, "b": 2}, lambda *said: told.append(said))
    with pytest.raises(ConfigurationError, match="another"), left.leaving_out("a", ScorerError):
        raise ConfigurationError("of another kind")
    assert len(left) == 2 and len(told) == 1


class Engine:
    """Full KV of a model whose queries before RoPE cannot be had."""

    def __init__(self, *args, **options): ...

    def facts(self):
        return SimpleNamespace(
            identity=replace(MODEL, architecture="CohereForCausalLM"),
            rope_frequencies=None, softmax_scale=0.25,
            output_projections=[torch.ones(128, 128)] * 2,
        )  # fmt: skip

    def read(self, tokens, take, *, hidden_states=False):
        assert not hidden_states  # no scorer here asks for them
        random = torch.Generator().manual_seed(len(tokens))
        for layer in range(2):
            sizes = ((8, 16), (4, 16), (4, 16))
            arrays = [torch.randn(len(tokens), *size, generator=random) for size in sizes]
            take(layer, *arrays, torch.ones(len(tokens)))

    def close(self): ...


@pytest.fixture
def engine(monkeypatch):
    capture = SimpleNamespace(FullKVEngine=Engine)
    monkeypatch.setitem(sys.modules, "tangram.engines.capturing", capture)


def test_a_scorer_that_the_model_cannot_have_is_left_out(engine):
    told = {}
    profiles = record_profiles(
        "m", [[1] * 70, [1] * 99], CompressionOptions().scorers, chunk_size_tokens=32,
        window_size_tokens=8, description="", left_out=told.__setitem__,
    )  # fmt: skip
    assert [profile.scorer_name for profile in profiles] == ["key_diff"]
    assert list(told) == ["learned", "expected_attention"]
    assert all("NeoX" in reason for reason in told.values())
    with pytest.raises(UnsupportedError, match="learned needs queries or keys before RoPE"):
        record_profiles("m", [[1] * 70], [get_scorer("learned")], description="")


def test_scorers_that_are_read_together_are_as_if_read_alone(engine):
    samples, sizes = [[1] * 70, [1] * 99], {"chunk_size_tokens": 32, "window_size_tokens": 8}
    scorers = [get_scorer(name) for name in ("key_diff", "key_norm")]
    together = record_profiles("m", samples, scorers, description="", **sizes)
    for scorer, profile in zip(scorers, together, strict=True):
        (alone,) = record_profiles("m", samples, [scorer], description="", **sizes)
        assert profile.scorer_name == alone.scorer_name == scorer.name
        assert profile.extra == alone.extra and profile.data == alone.data
        for name, array in alone.arrays.items():
            np.testing.assert_array_equal(profile.arrays[name], array)


def test_recorders_go_on_from_where_they_were(make_recorder, make_sample, tmp_path):
    samples = [make_sample(40, seed) for seed in range(3)]

    def read(stop_after):
        recorders = Recorders({name: make_recorder(name) for name in ("key_diff", "key_norm")})
        readings = Readings(3, tmp_path / "partial", "d", 1, lambda *told: None)
        for number, sample in enumerate(readings.over(samples, "statistics", recorders)):
            if number == stop_after:
                return None
            recorders.begin_sample(())
            for layer, arrays in enumerate(sample):
                recorders.add_layer(layer, *arrays)
            recorders.finish_sample()
        return recorders.state()

    whole = read(None)
    (tmp_path / "partial").unlink()
    assert read(2) is None
    resumed = read(None)
    assert whole.keys() == resumed.keys() and {"key_diff/curves", "key_norm/curves"} <= set(whole)
    for name, array in whole.items():
        np.testing.assert_array_equal(resumed[name], array)


@pytest.fixture
def reader(monkeypatch):
    """Stands in for the engine; tells which ones were made."""
    made = []

    class Reader:
        def __init__(self, model, lengths, *, compression, **engine):
            name = compression and compression["compression_scorer"]
            made.append((name, compression and compression["compression_ratio"]))
            if name == "snap_kv":
                raise UnsupportedError("no such layer")
            self.scale = {"key_diff": 2.0}.get(name, 1.0)

        def states(self, samples, positions):
            return [torch.zeros(len(each), 4) for each in positions]

        def swap_budgets(self, budgets): ...

        def divergence(self, full, other):
            return 0.1 * self.scale

        def close(self): ...

    module = SimpleNamespace(ReadingEngine=Reader)
    monkeypatch.setitem(sys.modules, "tangram.engines.reading", module)
    return made


def test_scorers_share_one_full_reading_and_the_time(reader, monkeypatch):
    limits, searched = [], measure.search_budgets

    def search(*args, time_limit_s, **options):
        limits.append(time_limit_s)
        return searched(*args, time_limit_s=time_limit_s, **options)

    monkeypatch.setattr(measure, "search_budgets", search)
    monkeypatch.setattr(measure.time, "monotonic", lambda: 0.0)
    profiles = [profile_of(name) for name in ("snap_kv", "expected_attention", "key_diff")]
    told, kept = {}, []
    found = measure_profiles(
        profiles, "m", [[1] * 99] * 4, ratios=[0.25, 0.5], time_limit_s=60, max_evaluations=3,
        left_out=told.__setitem__, found=lambda each: kept.append(by_divergence(each, told)),
    )  # fmt: skip
    assert told == {"snap_kv": "no such layer"}
    assert reader[0] == (None, None) and [name for name, _ in reader].count(None) == 1
    assert reader[1:] == [
        ("snap_kv", 0.5), ("expected_attention", 0.5), ("key_diff", 0.5),
        ("expected_attention", 0.25), ("key_diff", 0.25),
    ]  # fmt: skip
    assert limits == [15, 20, 30, 60], "what one does not take is left to the others"
    assert [each.profile.scorer_name for each in found] == ["expected_attention", "key_diff"]
    for each, level in zip(found, (0.1, 0.2), strict=True):
        assert [entry.ratio for entry in measured_entries(each.profile)] == [0.5, 0.25]
        assert list(each.divergences) == [0.5, 0.25]
        np.testing.assert_allclose(each.divergences[0.5], [level, level])
    assert [profile.scorer_name for profile in kept] == ["expected_attention"] * 2
    assert [list(ScorerChoice.of(p.extra).tried["key_diff"]) for p in kept] == [[0.5], [0.5, 0.25]]
