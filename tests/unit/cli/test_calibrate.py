"""`tangram calibrate` before an engine starts: what it reads, and what it refuses."""

import dataclasses
import io
import json
import os
import shutil
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from tangram import cli
from tangram.calibrate import preparation as calibration
from tangram.calibrate.budget_search.measure import Measured
from tangram.calibrate.preparation import _max_tokens, prepare
from tangram.calibrate.recording.record import record_profile
from tangram.cli import calibrate
from tangram.cli.calibrate import _serve_command, _summary, parser
from tangram.errors import ConfigurationError, UnsupportedError
from tangram.plan.models import bundled_model, tokenizer_arguments
from tangram.profile import ModelIdentity, Profile
from tangram.profile.cache import locked
from tangram.scorers import get_scorer
from tests.unit.calibrate.tokenizers import STRICT, by_bytes


def prepared(tmp_path, *arguments, model="recall", tell=lambda line: None):
    """What a run does, with measuring unless it is told otherwise, as on a GPU."""
    out = ("--out", str(tmp_path / "p.profile"), "--measure")
    return prepare(parser().parse_args([model, *out, *arguments]), tell)


@pytest.mark.parametrize("is_cpu", [True, False])
def test_on_a_cpu_budgets_are_measured_where_that_is_asked_for(tmp_path, monkeypatch, is_cpu):
    """The search went on far beyond its time limit there."""
    monkeypatch.setattr(calibration, "is_cpu_build", lambda: is_cpu)
    few = ["recall", "--out", str(tmp_path / "p"), "--samples", "4", "--max-tokens", "600"]
    told = []
    for asked in ([], ["--measure"], ["--measure-ratios", "0.5"], ["--measure-time-limit", "9"]):
        plan = prepare(parser().parse_args([*few, *asked, "--dtype", "float32"]), told.append)
        assert bool(plan.held) == bool(plan.ratios) == (bool(asked) or not is_cpu)
        assert plan.measure_time_s == (9 if "9" in asked else 100 * len(plan.options.scorers))
    assert len(told) == is_cpu and all("with --measure measures" in line for line in told)
    prepare(parser().parse_args([*few, "--no-measure"]), told.append)
    assert len(told) == is_cpu, "who declines is not advised"


def test_the_recall_model_reads_conversations_of_its_own(tmp_path):
    plan = prepared(tmp_path, "--samples", "10", "--max-tokens", "800")
    assert {sample.kind for sample in plan.samples + plan.held} == {"recall"}
    assert (len(plan.samples), len(plan.held)) == (5, 5)
    assert plan.options.page_group_size == 1 and plan.ratios == (0.5, 0.25, 0.1)
    lengths = [len(sample.token_ids) for sample in plan.samples + plan.held]
    assert 480 <= min(lengths) and 700 < max(lengths) <= 800
    again = prepared(tmp_path, "--samples", "10", "--max-tokens", "800")
    assert plan == again
    other = prepared(tmp_path, "--samples", "10", "--max-tokens", "800", "--seed", "1")
    assert not {s.token_ids for s in plan.samples} & {s.token_ids for s in other.samples}


def test_the_config_is_that_of_the_revision(tmp_path, hub):
    """The cache was sized, and lengths were checked, by the config of the main branch."""
    few = ("--samples", "4", "--max-tokens", "600", "--no-measure", "--page-group-size", "1")
    engine = {"revision": "old", "tokenizer": str(bundled_model()), "dtype": "float32"}
    plan = prepared(tmp_path, *few, "--engine-args", json.dumps(engine), model=hub)
    recall = prepared(tmp_path, *few, "--dtype", "float32")
    assert plan.engine == recall.engine | engine
    assert (plan.weights, plan.samples) == (recall.weights, recall.samples)


@pytest.mark.parametrize(
    ("engine", "asked"),
    [
        ({}, ("m", {})),
        ({"revision": "a"}, ("m", {"revision": "a"})),
        ({"revision": "a", "tokenizer_revision": "b"}, ("m", {"revision": "b"})),
        ({"tokenizer": "t", "trust_remote_code": True}, ("t", {"trust_remote_code": True})),
    ],
)
def test_the_tokenizer_is_the_one_that_the_engine_takes(engine, asked):
    assert tokenizer_arguments(engine, "m") == asked


def test_a_path_goes_before_the_bundled_models_name(llama, tmp_path, monkeypatch):
    llama.rename(tmp_path / "recall")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="the tokenizer of recall cannot be loaded"):
        prepared(tmp_path, "--no-measure")


def test_a_revision_that_is_nowhere_is_named(tmp_path, hub):
    engine = ("--engine-args", '{"revision": "none"}')
    with pytest.raises(ConfigurationError, match="org/m .* revision none .*no network.*check the"):
        prepared(tmp_path, "--no-measure", *engine, model=hub)


def test_texts_of_the_users_own(tmp_path):
    path = tmp_path / "chats.jsonl"
    turns = [
        {"role": "user", "content": "the code of harbor is 4821. " * 40 + "harbor?"},
        {"role": "assistant", "content": "4821"},
    ] * 2
    rows = [{"messages": turns}, {"messages": turns[:1]}, {"text": "too short"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    plan = prepared(tmp_path, "--data", str(path), "--no-measure")
    assert sorted(len(sample.later) for sample in plan.samples) == [0, 3]
    assert plan.held == () and plan.ratios == ()
    assert plan.description == f"{path}, seed 0"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-tokens", "256"], ["--max-tokens is 256", "more than a chunk of 256"]),
        (["--max-tokens", "40000"], ["--max-tokens is 40000", "32768"]),
        (["--samples", "3"], ["--samples 4", "--no-measure"]),
        (["--compression-chunk-size", "100"], ["--compression-chunk-size"]),
        (["--page-group-size", "3"], ["--page-group-size is 3"]),
        (["--page-group-size", "0"], ["--page-group-size is 0"]),
        (["--scorer", "h2o"], ["h2o", "key_diff"]),
        (["--compression-scorer-parameters", "{"], ["--compression-scorer-parameters", "JSON"]),
        (
            ["--scorer", "snap_kv", "--compression-scorer-parameters", '{"kernel_size": 4}'],
            ["--compression-scorer-parameters: snap_kv: kernel_size is 4"],
        ),
        (["--scorer", "tova", "--compression-window-size", "0"], ["--compression-window-size"]),
        (["--measure-ratios", "0.05"], ["--compression-ratio 0.05", "0.0625"]),
        (["--engine-args", "{"], ["--engine-args", "JSON"]),
        (["--engine-args", "[]"], ["--engine-args", "object"]),
        (["--engine-args", '{"max_model_len": 9}'], ["--engine-args", "max_model_len"]),
        (["--data", "chats.csv"], ["chats.csv", ".jsonl"]),
        (["--data", "/nowhere/chats.jsonl"], ["/nowhere/chats.jsonl"]),
        (["--out", "/nowhere/p.profile"], ["--out", "/nowhere"]),
        (["--out", "."], ["--out .", "a folder"]),
        (["--measure-time-limit", "nan"], ["--measure-time-limit", "above 0"]),
        (["--engine-args", '{"fast": true}'], ["--engine-args", "no argument fast"]),
        (["--engine-args", '{"seed": "x"}'], ["--engine-args", "seed is 'x'", "integer"]),
        (["--engine-args", '{"block_size": 32}'], ["--engine-args", "--block-size 32", "--no-mea"]),
        (
            ["--engine-args", '{"kv_cache_dtype": "float16"}', "--dtype", "bfloat16"],
            ["--kv-cache-dtype float16 with a model in bfloat16"],
        ),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, arguments, words):
    out = ["--out", str(tmp_path / "p.profile")]
    assert cli.main(["calibrate", "recall", *out, "--measure", *arguments]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said


def test_texts_that_are_all_too_short_are_refused(tmp_path):
    path = tmp_path / "chats.txt"
    path.write_text("a few words")
    with pytest.raises(ConfigurationError, match="more than 256 tokens.*longer texts"):
        prepared(tmp_path, "--data", str(path))


def test_without_the_datasets_library_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigurationError, match="pip install datasets"):
        prepared(tmp_path, "--data", "hf:org/chats")


def test_a_dataset_may_be_fetched_for_the_bundled_model(tmp_path, capsys, monkeypatch):
    def load(name, split, streaming):
        raise OSError(f"offline: {os.environ.get('HF_HUB_OFFLINE')}")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    out = str(tmp_path / "p.profile")
    assert cli.main(["calibrate", "recall", "--out", out, "--data", "hf:org/chats"]) == 2
    assert "offline: None" in capsys.readouterr().err


def chats(*first_roles):
    """Conversations that begin with these roles, longer than a chunk."""
    answer = {"role": "assistant", "content": "b"}
    return [{"messages": [{"role": role, "content": "a" * 300}, answer]} for role in first_roles]


def test_rows_that_the_chat_template_refuses_are_told_before_samples_are_read(
    tmp_path, capsys, monkeypatch
):
    class Rows(list):
        def shuffle(self, seed, buffer_size):
            return iter(self)

    def stop(*arguments, **options):
        raise ConfigurationError("here")

    rows = Rows(chats("user", "system", "user", "system"))
    module = SimpleNamespace(load_dataset=lambda *arguments, **options: rows)
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(calibration, "load_tokenizer", lambda *arguments, **o: by_bytes(STRICT))
    monkeypatch.setattr(calibrate, "record_profiles", stop)
    out = ["--out", str(tmp_path / "p.profile"), "--no-measure"]
    assert cli.main(["calibrate", "recall", *out, "--data", "hf:org/chats"]) == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert ": 2; first hf:org/chats, row 2 of" in told


def test_a_line_that_the_chat_template_refuses_is_named(tmp_path, monkeypatch):
    """A file is its owner's to mend: nothing of it is skipped."""
    monkeypatch.setattr(calibration, "load_tokenizer", lambda *arguments, **o: by_bytes(STRICT))
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, chats("user", "system"))))
    with pytest.raises(ConfigurationError, match="chats.jsonl, line 2: .*chat template.*mend or"):
        prepared(tmp_path, "--data", str(path), "--no-measure")


def test_a_model_without_a_tokenizer_is_refused(tmp_path, llama):
    with pytest.raises(ConfigurationError, match="tokenizer of .* cannot be loaded"):
        prepared(tmp_path, model=str(llama))


def test_built_in_samples_of_a_chunk_or_less_are_dropped(tmp_path):
    sizes = ("--samples", "20", "--max-tokens", "258", "--no-measure")
    lengths = [len(sample.token_ids) for sample in prepared(tmp_path, *sizes).samples]
    assert 0 < len(lengths) < 20 and min(lengths) > 256
    with pytest.raises(ConfigurationError, match="--max-tokens 257 no built-in sample.*256"):
        prepared(tmp_path, "--samples", "1", "--max-tokens", "257", "--no-measure")


def test_an_engine_that_does_not_compress_takes_what_stock_vllm_takes(tmp_path):
    plan = prepared(
        tmp_path, "--samples", "4", "--no-measure", "--engine-args", '{"block_size": 32}'
    )
    assert plan.engine["block_size"] == 32


def test_where_no_ratio_can_be_measured_no_sample_is_held_back(tmp_path):
    chunk = ("--compression-chunk-size", "16", "--compression-window-size", "8")
    plan = prepared(tmp_path, "--samples", "4", "--max-tokens", "300", *chunk)
    assert (len(plan.samples), plan.held, plan.ratios) == (4, (), ())
    few = prepared(tmp_path, "--samples", "2", "--max-tokens", "300", *chunk)
    assert len(few.samples) == 2


@pytest.fixture
def sliding(tmp_path):
    """A model with weights and a tokenizer, whose layers attend to a window each."""
    folder = tmp_path / "sliding"
    shutil.copytree(bundled_model(), folder, ignore=shutil.ignore_patterns("config.json"))
    config = json.loads((bundled_model() / "config.json").read_text())
    for name in ("layer_types", "use_sliding_window", "max_window_layers"):
        del config[name]
    named = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    (folder / "config.json").write_text(json.dumps(config | named | {"sliding_window": 512}))
    return str(folder)


def test_a_window_that_the_engine_leaves_out_is_no_hindrance(tmp_path, sliding):
    """It was the remedy that a server offered, and calibration refused the model all the same."""
    few = ("--samples", "4", "--compression-chunk-size", "128")
    with pytest.raises(UnsupportedError, match=f"'{sliding}'.*--disable-sliding-window"):
        prepared(tmp_path, *few, model=sliding)
    engine = ("--engine-args", '{"disable_sliding_window": true}')
    plan = prepared(tmp_path, *few, *engine, model=sliding)
    assert plan.engine["disable_sliding_window"] is True
    assert max(len(sample.token_ids) for sample in plan.samples + plan.held) < 512


LAYOUT = SimpleNamespace(chunk_size_tokens=256)


@pytest.mark.parametrize(
    ("config", "engine", "longest"),
    [
        ({"max_position_embeddings": 8192}, {}, 8192),
        ({"max_position_embeddings": 8192},
         {"hf_overrides": {"max_position_embeddings": 32768}}, 32768),
        ({"max_position_embeddings": 8192, "rope_scaling": {"type": "linear", "factor": 4.0}},
         {}, 32768),
        ({"max_position_embeddings": 8192, "rope_scaling": None,
          "rope_parameters": {"rope_type": "dynamic", "factor": 2}}, {}, 16384),
        ({"max_position_embeddings": 131072,
          "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, {}, 131072),
        ({"max_position_embeddings": 8192, "sliding_window": 1024},
         {"disable_sliding_window": True}, 1024),
        ({"max_position_embeddings": 8192, "sliding_window": None},
         {"disable_sliding_window": True}, 8192),
        ({"max_position_embeddings": 8192, "sliding_window": 1024,
          "rope_scaling": {"type": "linear", "factor": 4.0}},
         {"disable_sliding_window": True}, 4096),
    ],
)  # fmt: skip
def test_samples_are_as_long_as_vllm_lets_the_model_go(config, engine, longest):
    assert _max_tokens(longest - 1, config, engine, LAYOUT) == longest - 1
    with pytest.raises(ConfigurationError, match=f"less than the model's {longest}"):
        _max_tokens(longest, config, engine, LAYOUT)


def test_where_the_config_tells_no_length_none_is_claimed():
    assert _max_tokens(1_000_000, {}, {}, LAYOUT) == 1_000_000
    assert _max_tokens(None, {}, {}, LAYOUT) == 4096
    with pytest.raises(ConfigurationError, match="chunk-size.$"):
        _max_tokens(256, {}, {}, LAYOUT)


def test_without_a_terminal_there_are_plain_lines_of_what_goes_on(capsys):
    with calibrate._bar(Console(stderr=True), 12) as (done, tell):
        for samples in (0, 0, 1, 4, 5, 5, 6, 10, 11, 12, 12):  # read twice, some are told twice
            done(samples)
        tell("ratio 0.5: error: 0.25")
    assert capsys.readouterr().err.splitlines() == [
        *(f"{samples} of 12 samples read" for samples in (0, 5, 10, 12)),
        "measuring: ratio 0.5: error: 0.25",
    ]


def test_on_a_terminal_there_is_a_bar_and_no_plain_line():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with calibrate._bar(console, 10) as (done, tell):
        done(5)
        tell("ratio 0.5")
    said = console.file.getvalue()
    assert "5/10" in said and "measuring: ratio 0.5" in said and "samples read" not in said


def test_the_command_that_serves_names_what_is_not_by_default(tmp_path, capsys):
    out = tmp_path / "my profile"
    sizes = ("--compression-chunk-size", "512", "--page-group-size", "2")
    arguments = ["recall", "--out", str(out), "--samples", "4", "--max-tokens", "900", *sizes]
    arguments.append("--measure")
    plan = prepare(parser().parse_args(arguments))
    assert _serve_command(plan, "recall") == [
        "tangram", "serve", "--compression-profile", str(out), *sizes
    ]  # fmt: skip
    out.write_bytes(b"")
    _summary(plan, 1.0, "recall", Console(stderr=True))
    said = capsys.readouterr().err
    assert f"--compression-profile '{out}' {' '.join(sizes)}" in said and "3 more held" in said
    plain = prepared(tmp_path, "--samples", "4", "--max-tokens", "600")
    assert _serve_command(plain, "org/m")[2:5:2] == ["org/m", str(plain.out)]
    assert _serve_command(plain, "recall")[2:] == ["--compression-profile", str(plain.out)]


SEVEN = ("--compression-scorer-parameters", '{"kernel_size": 7}')


def test_the_scorers_parameters_reach_the_readings_and_the_command_that_serves(
    tmp_path, monkeypatch
):
    few = ("--samples", "4", "--max-tokens", "600", "--scorer", "snap_kv")
    plan = prepared(tmp_path, *few, *SEVEN)
    assert plan.options.scorer == get_scorer("snap_kv", kernel_size=7)
    assert _serve_command(plan, "recall")[4:] == ["--compression-scorer", "snap_kv", *SEVEN]
    plain = prepared(tmp_path, *few, "--compression-scorer-parameters", "{}")
    assert _serve_command(plain, "recall")[4:] == ["--compression-scorer", "snap_kv"]
    told = []

    def record_profiles(model, samples, scorers, **options):
        told.extend(scorers)
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "record_profiles", record_profiles)
    with pytest.raises(KeyboardInterrupt):
        calibrate.calibrate(plan, lambda done: None, lambda line: None)
    assert told == [get_scorer("snap_kv", kernel_size=7)]


def test_the_readings_are_with_the_scorers_parameters(monkeypatch):
    class Engine:
        def __init__(self, *args, **options): ...

        def facts(self):
            identity = SimpleNamespace(to_dict=dict)
            return SimpleNamespace(
                identity=identity, softmax_scale=1.0, output_projections=(), rope_frequencies=None
            )

        def close(self): ...

    made = []

    def recorder(identity, scorer, **sizes):
        made.append(scorer)
        raise KeyboardInterrupt

    capture = SimpleNamespace(FullKVEngine=Engine)
    monkeypatch.setitem(sys.modules, "tangram.engines.capturing", capture)
    monkeypatch.setattr("tangram.calibrate.StatisticsRecorder", recorder)
    seven = {"scorer_name": "snap_kv", "scorer_parameters": {"kernel_size": 7}}
    with pytest.raises(KeyboardInterrupt):
        record_profile("m", [[1] * 9], **seven, description="")
    assert made == [get_scorer("snap_kv", kernel_size=7)]


def test_a_scorer_that_needs_rope_is_refused_before_a_sample_is_read(monkeypatch):
    closed = []

    class Engine:
        def __init__(self, *args, **options): ...

        def facts(self):
            identity = SimpleNamespace(architecture="CohereForCausalLM")
            return SimpleNamespace(identity=identity, rope_frequencies=None)

        def close(self):
            closed.append(True)

    capture = SimpleNamespace(FullKVEngine=Engine)
    monkeypatch.setitem(sys.modules, "tangram.engines.capturing", capture)
    with pytest.raises(UnsupportedError, match="CohereForCausalLM.*--compression-scorer$"):
        record_profile("m", [[1] * 9], scorer_name="expected_attention", description="")
    assert closed


def test_what_was_found_is_kept_where_measuring_fails(tmp_path, capsys, monkeypatch):
    profile = Profile.load(bundled_model() / "key_diff.profile")
    profile = dataclasses.replace(profile, extra={})

    def measured(profiles, **extra):
        (profile,) = profiles
        profile = dataclasses.replace(profile, extra={**profile.extra, **extra})
        return [Measured(profile, {0.5: np.ones(2)})]

    def measure_profiles(profiles, *args, found, **options):
        found(measured(profiles, measured=[0.5]))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(calibrate, "record_profiles", lambda *args, **options: [profile])
    module = SimpleNamespace(measure_profiles=measure_profiles, Measured=Measured)
    monkeypatch.setitem(sys.modules, "tangram.calibrate.budget_search.measure", module)
    out = tmp_path / "p.profile"
    out.write_bytes(b"an older one")
    arguments = ["recall", "--out", str(out), "--samples", "4", "--max-tokens", "600", "--measure"]
    with pytest.raises(RuntimeError, match="out of memory"):
        calibrate.run(arguments)
    kept = out.with_name("p.profile.unmeasured")
    assert f"{kept} has the statistics" in capsys.readouterr().err
    assert Profile.load(kept).extra["measured"] == [0.5]
    assert out.read_bytes() == b"an older one"

    module.measure_profiles = lambda profiles, *args, **options: measured(profiles)
    assert calibrate.run(arguments) == 0
    assert sorted(tmp_path.iterdir()) == [out]
    assert Profile.load(out).extra["sample_kinds"] == ["recall"]


def test_a_second_run_to_the_same_file_is_refused(tmp_path, capsys, monkeypatch):
    """Both saved what they had gathered to the same file, one over the other."""
    profile = Profile.load(bundled_model() / "key_diff.profile")
    out = tmp_path / "p.profile"
    sizes = ("--samples", "4", "--max-tokens", "600", "--no-measure")
    second = []

    def record_profiles(*args, partial, **options):
        partial.write_bytes(b"of the first run")
        if not second:
            second.append(None)
            second.append(cli.main(["calibrate", "recall", "--out", str(out), *sizes]))
        assert partial.read_bytes() == b"of the first run"
        return [profile]

    monkeypatch.setattr(calibrate, "record_profiles", record_profiles)
    assert cli.main(["calibrate", "recall", "--out", str(out), *sizes]) == 0
    assert second == [None, 2]
    said = capsys.readouterr().err
    assert f"--out {out}: another run" in said and "name another file" in said
    assert sorted(tmp_path.iterdir()) == [out]
    assert cli.main(["calibrate", "recall", "--out", str(out), *sizes]) == 0


def test_a_ratio_that_the_chunk_does_not_allow_is_left_out(tmp_path):
    plan = prepared(
        tmp_path, "--samples", "4", "--max-tokens", "300", "--compression-chunk-size", "128"
    )
    assert plan.ratios == (0.5, 0.25)


def test_an_automatic_run_waits_for_another_and_one_by_hand_is_refused(
    tmp_path, monkeypatch, capsys
):
    """After an accident the next start was given advice about an --out that nobody gave."""
    plan = prepared(tmp_path, "--samples", "4", "--max-tokens", "600", "--no-measure")
    arguments = ["recall", "--out", str(plan.out)]
    identity = ModelIdentity("M", 2, 2, 4, 16, 64, 100)
    sizes = {"chunk_size_tokens": 256, "window_size_tokens": 32, "n_sink_tokens": 4}
    made = Profile(model=identity, scorer_name="key_diff", **sizes)
    monkeypatch.setattr(calibrate, "prepare", lambda *_: plan)
    monkeypatch.setattr(calibrate, "calibrate", lambda *_: made)
    with locked(plan.partial):
        with pytest.raises(ConfigurationError, match="--out .*: another run is calibrating"):
            calibrate.run(arguments)

        monkeypatch.setattr(calibrate, "follow_parent", lambda: True)
        waits = threading.Event()
        monkeypatch.setattr(calibrate, "_print", lambda *lines: waits.set())
        codes = []
        automatic = threading.Thread(target=lambda: codes.append(calibrate.run(arguments)))
        automatic.start()
        assert waits.wait(60)
        assert not plan.out.exists()
    automatic.join(60)
    assert codes == [0] and plan.out.exists()
