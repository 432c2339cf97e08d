import numpy as np
import pytest
import torch

from tangram.budgets import LEVELS, MEASURED, allocate
from tangram.calibrate import QueryStatistics
from tangram.errors import ConfigurationError, ProfileError, ScorerError
from tangram.profile import Profile
from tangram.scorers import get_scorer
from tests.unit.calibrate.conftest import MODEL


def same(left, right, rtol=0.0):
    assert set(left.arrays) == set(right.arrays)
    for name, array in left.arrays.items():
        np.testing.assert_allclose(array, right.arrays[name], rtol=rtol, atol=rtol, err_msg=name)
    return True


def test_a_profile_holds_everything_and_every_level_can_be_asked(
    make_recorder, make_sample, record, tiny, tmp_path
):
    profile = record(make_recorder(), make_sample(60, 1), make_sample(40, 2))
    assert profile.model == tiny
    assert (profile.scorer_name, profile.scorer_parameters) == ("key_diff", {})
    assert (profile.chunk_size_tokens, profile.window_size_tokens) == (16, 4)
    assert profile.data == {"sha256": "00", "description": "noise", "n_samples": 2}
    assert {name: array.shape for name, array in profile.arrays.items()} == {
        "threshold_share/crosslayer": (3, 2, 2, 2),
        "threshold_share/perlayer": (3, 2, 2, 2),
        "mass_curve": (2, 2, 2, 9),
        "error_curve": (2, 2, 2, 9),
    }
    profile.save(tmp_path / "p")
    loaded = Profile.load(tmp_path / "p")
    for level in set(LEVELS) - {MEASURED}:
        groups = allocate(
            level,
            num_layers=2,
            num_kv_heads=2,
            ratio=0.5,
            chunk_size_tokens=64,
            page_size_rows=8,
            page_group_size=1,
            n_sink_tokens=2,
            profile=loaded,
        )
        assert np.sum(groups.pages) == 16


def test_neither_the_order_of_layers_nor_tiles_nor_other_samples_change_a_sample(
    make_recorder, make_sample, record
):
    one, other = make_sample(70, 1), make_sample(33, 2)
    plain = record(make_recorder(), one)
    assert same(plain, record(make_recorder(), one, order=[1, 0]))
    assert same(plain, record(make_recorder(max_query_rows=3), one), rtol=1e-5)
    both = record(make_recorder(), one, other)
    turned = record(make_recorder(), other, one)
    for name, array in both.arrays.items():
        if name.startswith("threshold"):
            np.testing.assert_array_equal(array, turned.arrays[name][:, ::-1])
            np.testing.assert_array_equal(array[:, :1], plain.arrays[name])
        elif name.endswith("curve"):
            np.testing.assert_array_equal(array, turned.arrays[name][::-1])
            np.testing.assert_array_equal(array[:1], plain.arrays[name])
        else:
            np.testing.assert_allclose(array, turned.arrays[name], rtol=1e-6, atol=1e-6)


def test_sinks_are_above_every_threshold(make_recorder, make_sample, record):
    recorder = make_recorder(n_sink_tokens=12, ratios=(0.01, 0.1875))
    profile = record(recorder, make_sample(70))
    shares = profile.arrays["threshold_share/crosslayer"]
    np.testing.assert_allclose(shares[0], 0.01, atol=1e-6)  # fewer than the sinks: split alike
    np.testing.assert_allclose(shares[1], 12 / 60 * 0.9375, atol=1e-6)


def test_low_precision_is_read_as_float32(make_recorder, make_sample, record):
    sample = [tuple(x.bfloat16() for x in layer) for layer in make_sample(50)]
    widened = [tuple(x.float() for x in layer) for layer in sample]
    assert same(record(make_recorder(), sample), record(make_recorder(), widened), rtol=1e-6)


def test_very_peaked_attention_gives_numbers(make_recorder, make_sample, record):
    sample = [(1000 * q, k, v, norms) for q, k, v, norms in make_sample(60)]
    profile = record(make_recorder(), sample)
    mass = profile.arrays["mass_curve"]
    assert np.isfinite(profile.arrays["error_curve"]).all()
    assert ((mass >= 0) & (mass <= 1)).all()


def test_a_scorer_that_needs_statistics_gets_those_of_a_first_pass(
    make_recorder, make_sample, record, tiny
):
    with pytest.raises(ScorerError, match="needs query_mean"):
        make_recorder("expected_attention")
    sample = make_sample(60)
    frequencies = torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)
    first = QueryStatistics(tiny, frequencies, n_sink_tokens=2)
    for layer, (queries, *_) in enumerate(sample):
        first.add_layer(layer, queries)
    profile = record(make_recorder("expected_attention", statistics=first.arrays()), sample)
    for name, array in first.arrays().items():
        np.testing.assert_array_equal(profile.arrays[name], array)
    assert profile.scorer_parameters == get_scorer("expected_attention").parameters()
    read_back = {name: profile.arrays[name] for name in first.arrays()}
    again = record(make_recorder("expected_attention", statistics=read_back), sample)
    assert same(profile, again)


def test_short_samples_count_for_nothing(make_recorder, make_sample, record):
    recorder = make_recorder()
    with pytest.raises(ProfileError, match="none of 2 samples has more than 16 tokens.*has 16"):
        record(recorder, make_sample(16), make_sample(3))
    profile = record(recorder, make_sample(17))
    assert profile.data["n_samples"] == 1
    assert profile.arrays["mass_curve"].shape[0] == 1
    assert same(profile, record(make_recorder(), make_sample(17)))


def test_a_sample_that_is_not_finite_is_refused_before_it_counts(
    make_recorder, make_sample, record
):
    recorder = make_recorder()
    broken = [[tensor.clone() for tensor in layer] for layer in make_sample(60)]
    broken[1][2][7] = torch.inf
    with pytest.raises(ProfileError, match=r"sample 2 \(60 tokens\).*not finite.*--dtype bfloat16"):
        record(recorder, make_sample(40), broken)


def test_queries_that_are_not_finite_are_refused(tiny, make_sample):
    queries = make_sample(60)[1][0].clone()
    queries[3] = torch.nan
    frequencies = torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64)
    statistics = QueryStatistics(tiny, frequencies, n_sink_tokens=2)
    with pytest.raises(ProfileError, match="60 tokens has queries that are not finite in layer 1"):
        statistics.add_layer(1, queries)


def test_mistakes_of_the_caller_are_told(make_recorder, make_sample):
    recorder, sample = make_recorder(), make_sample(20)
    with pytest.raises(ProfileError, match=r"not complete: no layers \[0, 1\]"):
        recorder.finish_sample()
    recorder.add_layer(0, *sample[0])
    with pytest.raises(ProfileError, match=r"not complete: no layers \[1\]"):
        recorder.finish_sample()
    with pytest.raises(ProfileError, match="not finished"):
        recorder.profile({})
    with pytest.raises(ProfileError, match="layer 0 was added twice"):
        recorder.add_layer(0, *sample[0])
    with pytest.raises(ProfileError, match="not one of 2 layers"):
        recorder.add_layer(2, *sample[0])
    with pytest.raises(ProfileError, match="must have the shapes"):
        recorder.add_layer(1, *make_sample(21)[1])
    with pytest.raises(ProfileError, match="output projections of shape"):
        make_recorder(output_projections=[])
    with pytest.raises(ProfileError, match="share_grid"):
        make_recorder(share_grid=0)
    with pytest.raises(ConfigurationError, match="--compression-window-size"):
        make_recorder(window_size_tokens=16)
    with pytest.raises(ScorerError, match="--compression-window-size"):
        make_recorder("snap_kv", window_size_tokens=0)


@pytest.mark.parametrize("scorer", ["key_diff", "expected_attention"])
@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_recorder_goes_on_from_its_state_bit_for_bit(
    make_recorder, make_sample, record, tiny, tmp_path, scorer, done
):
    from safetensors.numpy import load_file, save_file

    given = {}
    if scorer == "expected_attention":
        queries = QueryStatistics(tiny, torch.tensor([1.0, 0.1, 0.01]).double(), n_sink_tokens=2)
        for layer, part in enumerate(make_sample(90, 9)):
            queries.add_layer(layer, part[0])
        given = {"statistics": queries.arrays()}
    samples = [make_sample(60, 1), make_sample(12, 2), make_sample(45, 3)]
    record(make_recorder(scorer, **given), *samples).save(tmp_path / "whole")

    before = make_recorder(scorer, **given)
    for sample in samples[:done]:
        for layer, part in enumerate(sample):
            before.add_layer(layer, *part)
        before.finish_sample()
    save_file(before.state(), tmp_path / "state")
    after = make_recorder(scorer, **given)
    after.restore(load_file(tmp_path / "state"))
    record(after, *samples[done:]).save(tmp_path / "resumed")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "resumed").read_bytes()


def test_query_statistics_go_on_from_their_state(tiny, make_sample):
    frequencies = torch.tensor([1.0, 0.1, 0.01]).double()
    whole, first = (QueryStatistics(tiny, frequencies, 2) for _ in range(2))
    samples = [make_sample(30, 1), make_sample(50, 2)]
    for layer in range(2):
        for sample in samples:
            whole.add_layer(layer, sample[layer][0])
        first.add_layer(layer, samples[0][layer][0])
    second = QueryStatistics(tiny, frequencies, 2)
    second.restore(first.state())
    for layer in range(2):
        second.add_layer(layer, samples[1][layer][0])
    for name, array in whole.arrays().items():
        np.testing.assert_array_equal(array, second.arrays()[name])


def test_scores_that_are_made_of_hidden_states(make_recorder, make_sample, record, tmp_path):
    """By gates that give a token's place, which is what StreamingLLM scores by."""
    sizes = MODEL.hidden_size, MODEL.num_kv_heads
    weight = torch.zeros(sizes[1], sizes[0])
    weight[:, 0] = 1.0
    layers = {"weight": weight, "bias": torch.zeros(sizes[1])}
    state = {
        f"layers.{layer}.{name}": tensor
        for layer in range(MODEL.num_layers)
        for name, tensor in layers.items()
    }
    torch.save(state, tmp_path / "gates.pt")
    sample = make_sample(60, 1)
    hidden = torch.randn(60, sizes[0])
    hidden[:, 0] = torch.arange(60)
    profile = record(
        make_recorder(f"kvzap:{tmp_path / 'gates.pt'}"), [(*of, hidden) for of in sample]
    )
    plain = record(make_recorder("streaming_llm"), sample)
    shown = record(make_recorder("streaming_llm"), [(*of, hidden) for of in sample])
    assert same(plain, shown), "another scorer looked at hidden states"
    for name in ("mass_curve", "error_curve"):
        np.testing.assert_array_equal(profile.arrays[name], plain.arrays[name])
    assert profile.scorer_name == "kvzap"
    assert profile.scorer_parameters["weights"].startswith("sha256:")
