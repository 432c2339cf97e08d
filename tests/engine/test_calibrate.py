"""`tangram calibrate` with the real engine: what it writes, broken off or not."""

import json
import sys
import types

import numpy as np
import pytest
import torch

from tangram import cli
from tangram.calibrate.budget_search.measure import Measured
from tangram.calibrate.recording.record import record_profile
from tangram.cli import calibrate
from tangram.profile import Profile
from tangram.profile.scorer_choice import ScorerChoice
from tangram.scorers import AUTO_SCORERS
from tests.engine.profiles import identity

SIZES = (
    *("--samples", "4", "--max-tokens", "200", "--compression-chunk-size", "64"),
    *("--engine-args", '{"kv_cache_memory_bytes": 16777216}'),
)


@pytest.fixture(autouse=True)
def record(monkeypatch):
    """Every sample is saved, and the readings can be stopped after some."""
    stop_after = []

    def recording(*args, progress, **kwargs):
        def told(done):
            progress(done)
            if stop_after and done >= stop_after[0]:
                raise KeyboardInterrupt

        return original(*args, progress=told, **kwargs | {"save_every": 1})

    original = calibrate.record_profiles
    monkeypatch.setattr(calibrate, "record_profiles", recording)
    return stop_after


def run(path, *arguments) -> int:
    return cli.main(["calibrate", "recall", "--out", str(path), *SIZES, *arguments])


def test_a_run_that_is_broken_off_gives_the_same_bytes(tmp_path, record, capsys):
    scorer = "expected_attention"  # has every sample read twice
    arguments = ("--scorer", scorer, "--no-measure")
    whole, resumed = tmp_path / "whole.profile", tmp_path / "resumed.profile"
    assert run(whole, *arguments) == 0
    assert sorted(tmp_path.iterdir()) == [whole]
    record[:] = [3]  # in the second pass
    assert run(resumed, *arguments) == 130
    assert sorted(tmp_path.iterdir()) == [tmp_path / "resumed.profile.partial", whole]
    record.clear()
    capsys.readouterr()
    assert run(resumed, *arguments) == 0
    assert whole.read_bytes() == resumed.read_bytes()
    assert sorted(tmp_path.iterdir()) == [resumed, whole]
    said = capsys.readouterr().err
    assert "4 samples of" in said and "--compression-scorer expected_attention" in said

    profile = Profile.load(whole)
    assert profile.model.differences(identity()) == []
    assert (profile.scorer_name, profile.chunk_size_tokens) == (scorer, 64)
    assert profile.extra["sample_kinds"] == ["recall"] * 4
    assert max(profile.extra["sample_tokens"]) <= 200
    assert min(profile.extra["sample_later_queries"]) > 0
    assert profile.arrays["mass_curve"].shape[0] == 4


def test_the_best_of_several_scorers_is_kept_broken_off_or_not(tmp_path, record, capsys):
    """All of them are read together, twice; the first pass is of ExpectedAttention alone."""
    whole, resumed = tmp_path / "whole.profile", tmp_path / "resumed.profile"
    assert run(whole, "--no-measure") == 0
    said = capsys.readouterr().err
    record[:] = [3]
    assert run(resumed, "--no-measure") == 130
    record.clear()
    assert run(resumed, "--no-measure") == 0
    assert whole.read_bytes() == resumed.read_bytes()
    assert sorted(tmp_path.iterdir()) == [resumed, whole]

    profile = Profile.load(whole)
    choice = ScorerChoice.of(profile.extra)
    assert choice.winner == profile.scorer_name and choice.decided_by == "predicted error"
    assert list(choice.tried) == list(AUTO_SCORERS) and choice.left_out == {}
    assert all(list(found) == [0.5, 0.25] for found in choice.tried.values())
    assert f"scorer {choice.winner} is taken: budgets are not measured" in said
    assert all(f"{found[0.5]:.4g}" in said for found in choice.tried.values())

    alone = tmp_path / "alone.profile"
    assert run(alone, "--no-measure", "--scorer", choice.winner) == 0
    for name, array in Profile.load(alone).arrays.items():
        np.testing.assert_array_equal(array, profile.arrays[name])


def test_budgets_are_measured_on_texts_held_back(tmp_path, monkeypatch):
    from dataclasses import replace

    from tangram.calibrate.preparation import prepare

    calls = []

    def measure_profiles(profiles, model, samples, *, later, ratios, progress, **options):
        calls.append((model, samples, later, ratios, options))
        progress("ratio 0.5: a line")
        extra = {**profiles[0].extra, "measured": list(ratios)}
        each = {ratio: np.ones(1) for ratio in ratios}
        return [Measured(replace(profile, extra=extra), each) for profile in profiles]

    module = types.ModuleType("tangram.calibrate.budget_search.measure")
    module.measure_profiles, module.Measured = measure_profiles, Measured
    monkeypatch.setitem(sys.modules, "tangram.calibrate.budget_search.measure", module)
    out = tmp_path / "p.profile"
    assert run(out, "--measure-time-limit", "7", "--dtype", "float32") == 0

    profile = Profile.load(out)
    assert profile.scorer_name == "key_diff"  # of equals the cheapest to seal
    assert profile.extra["scorers"]["decided_by"] == "divergence"
    assert profile.extra["measured"] == [0.5, 0.25]  # a page of 16 is a quarter of the chunk
    assert len(profile.extra["sample_tokens"]) == 1
    ((model, samples, later, ratios, options),) = calls
    assert model.endswith("models/recall") and ratios == (0.5, 0.25)
    assert profile.extra["held_back_tokens"] == [len(sample) for sample in samples]
    assert len(samples) == len(later) == 3
    assert all(max(where) < len(sample) for where, sample in zip(later, samples, strict=True))
    assert options["time_limit_s"] == 7 and options["page_group_size"] == 1
    assert options["dtype"] == "float32" and options["kv_cache_memory_bytes"] == 1 << 24
    given = ["recall", "--out", str(out), "--measure", *SIZES]
    plan = prepare(calibrate.parser().parse_args(given))
    assert not {s.token_ids for s in plan.samples} & {s.token_ids for s in plan.held}
    assert [s.token_ids for s in plan.held] == samples


GRANITE = dict(
    architectures=["GraniteForCausalLM"], model_type="granite", attention_multiplier=0.25,
    residual_multiplier=0.22, embedding_multiplier=12.0, logits_scaling=8.0, hidden_act="silu",
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, vocab_size=256, max_position_embeddings=1024,
    rms_norm_eps=1e-5, rope_theta=1e4, torch_dtype="float32", bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def test_a_model_whose_layers_take_no_residual(tmp_path):
    """Granite's add what a layer gives themselves; hooks once took three arguments for granted."""
    from tangram.engines.capturing import FullKVEngine

    (tmp_path / "config.json").write_text(json.dumps(GRANITE))
    engine = dict(load_format="dummy", skip_tokenizer_init=True, kv_cache_memory_bytes=1 << 24)
    tokens, norms = list(range(3, 100)), []
    reader = FullKVEngine(str(tmp_path), 128, dtype="float32", **engine)
    try:
        embedding = reader._model.model.embed_tokens
        expected = 12 * embedding(torch.tensor(tokens)).norm(dim=-1)
        reader.read(tokens, lambda layer, query, key, value, norm: norms.append(norm))
    finally:
        reader.close()
    torch.testing.assert_close(norms[0], expected)
    assert len(norms) == 2 and (norms[1] > 0).all()

    profile = record_profile(
        str(tmp_path), [tokens], scorer_name="key_diff", chunk_size_tokens=32,
        window_size_tokens=8, description="a line", dtype="float32", **engine,
    )  # fmt: skip
    assert profile.model.architecture == "GraniteForCausalLM"
    assert all(np.isfinite(array).all() for array in profile.arrays.values())
