"""The automatic profile of a server: looked up, made once, or refused with the remedy."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from vllm.engine.arg_utils import EngineArgs

from tangram.errors import ConfigurationError, ProfileMismatchError
from tangram.plan.compression_plan import plan_of
from tangram.plan.options import CONFIG_KEY
from tangram.vllm_plugin.frontend import auto_profile
from tests.engine.harness import MODEL
from tests.engine.profiles import make_profile
from tests.engine.test_refusals import configure, parse

TINY = "--samples 2 --max-tokens 200 --no-measure"


@pytest.fixture
def logged(monkeypatch):
    lines = []
    for level in ("info", "warning"):
        monkeypatch.setattr(
            auto_profile.logger, level, lambda text, *args: lines.append(text % args)
        )
    return lines


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TANGRAM_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TANGRAM_CALIBRATE_ARGS")
    return tmp_path / "profiles"


@pytest.fixture
def made(monkeypatch):
    """Stands in for the command: writes a profile of made-up statistics; its arguments."""
    calls = []

    def calibrate(path, arguments, model, environment):
        calls.append(arguments)
        scorer = arguments[arguments.index("--compression-scorer") + 1]
        make_profile("expected_attention" if scorer == "auto" else scorer).save(path)

    monkeypatch.setattr(auto_profile, "_calibrate", calibrate)
    return calls


def auto(**options):
    return plan_of(
        configure(compression={"compression_profile": "auto", **options}).additional_config
    )


def test_drift_is_compared_with_the_profile_that_is_calibrated_first(cache, made):
    assert auto(compression_drift_sample=9).drift_sample == 9
    assert len(made) == 1


@pytest.mark.timeout(180)
def test_a_server_calibrates_once_and_keeps_the_profile(cache, monkeypatch, logged):
    monkeypatch.setenv("TANGRAM_CALIBRATE_ARGS", TINY)
    flags = ("--compression-chunk-size", "64", "--dtype", "float32", "--max-model-len", "1024")
    arguments = parse("--enable-compression", *flags)
    plan = plan_of(arguments.create_engine_config().additional_config)
    assert Path(plan.profile_path).parent == cache and plan.load_profile() is not None
    assert plan.level != "uniform" and plan.geometry.chunk_size_tokens == 64
    assert "calibrating one first" in logged[0] and MODEL in logged[0]
    assert logged[1].startswith("calibrated in") and plan.profile_path in logged[1]
    assert [file.suffix for file in sorted(cache.iterdir())] == [".profile"]

    del logged[:]
    monkeypatch.setattr(auto_profile, "_calibrate", lambda *args: pytest.fail("made again"))
    again = plan_of(arguments.create_engine_config().additional_config)
    assert again == plan
    assert not any("calibrat" in line for line in logged)


def test_what_fails_keeps_the_server_from_starting_and_names_the_remedies(
    cache, monkeypatch, tmp_path
):
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\necho noise\necho 'tangram: the disk is full'\necho more; exit 2\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(auto_profile.sys, "executable", str(python))
    with pytest.raises(ConfigurationError) as error:
        auto()
    (log,) = cache.glob("*.log")
    for words in (
        "exit code 2", "the disk is full", str(log), "--compression-profile none",
        f"tangram calibrate {MODEL} --out FILE",
    ):  # fmt: skip
        assert words in str(error.value)
    assert list(cache.glob("*.profile")) == []


def test_a_server_that_is_stopped_stops_calibrating(monkeypatch, tmp_path):
    python, number = tmp_path / "python", tmp_path / "pid"
    python.write_text(f"#!/bin/sh\necho $$ > {number}\nexec sleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr(auto_profile.sys, "executable", str(python))
    before = signal.getsignal(signal.SIGTERM)

    def stop():
        while not (number.exists() and number.read_text().strip()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(SystemExit, match="143"):
        auto()
    with pytest.raises(ProcessLookupError):
        os.kill(int(number.read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) is before


def test_flags_stand_for_auto_unless_something_is_said():
    config = json.dumps({CONFIG_KEY: {"compression_profile": "given.profile"}})
    for flags, expected in (
        ([], None),
        (["--compression-profile", "none"], "none"),
        (["--additional-config", config], "given.profile"),
    ):
        arguments = parse("--enable-compression", *flags)
        assert arguments.additional_config[CONFIG_KEY].get("compression_profile") == expected


def test_every_way_in_calibrates_where_no_profile_is_named(made):
    """Python and `additional_config` served with uniform budgets, which lose answers."""
    ways = [{CONFIG_KEY: {}}, parse("--enable-compression").additional_config]
    plans = []
    for way in ways:
        arguments = EngineArgs(MODEL, dtype="float32", additional_config=way)
        plans.append(plan_of(arguments.create_engine_config().additional_config))
    assert plans[0] == plans[1] and plans[0].profile_path and plans[0].level != "uniform"
    assert len(made) == 1


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"compression_level": "uniform"}, 0),
        ({"compression_ratio": 1.0}, 0),
        ({"compression_profile": "none"}, 1),
        ({"compression_profile": "None"}, 1),
        ({"compression_profile": "none", "compression_ratio": 1.0}, 0),
    ],
)
def test_what_needs_no_profile_gets_none(made, logged, options, warned):
    compression = {"compression_profile": "auto", **options}
    plan = plan_of(configure(compression=compression, load_format="dummy").additional_config)
    assert plan.profile_path is None and plan.level == "uniform" and made == []
    uniform = [line for line in logged if "(uniform budgets)" in line]
    assert len(uniform) == warned
    assert all(line.startswith("--compression-profile is none: ") for line in uniform)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"load_format": "dummy"}, "--load-format dummy makes the weights up"),
        ({"skip_tokenizer_init": True}, "--skip-tokenizer-init leaves no tokenizer"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_and_not_served_uniform(made, arguments, said):
    with pytest.raises(ConfigurationError) as error:
        configure(compression={"compression_profile": "auto"}, **arguments)
    for words in (said, "--compression-profile FILE", "--compression-profile none", "in Python"):
        assert words in str(error.value)
    assert made == []


def test_without_a_tokenizer_a_cached_profile_is_taken(made):
    plan = auto()
    again = configure(compression={"compression_profile": "auto"}, skip_tokenizer_init=True)
    assert plan_of(again.additional_config) == plan and len(made) == 1


def test_a_scorer_that_needs_statistics_has_them_made_for_uniform_budgets_too(made):
    plan = auto(compression_level="uniform", compression_scorer="expected_attention")
    assert plan.profile_path and len(made) == 1


def test_the_plan_is_of_the_scorer_that_was_calibrated_or_of_one_without_a_profile(made):
    """The options beside the plan are part of vLLM's hash of its configuration: no `auto` there."""
    for options, scorer in (
        ({}, "expected_attention"),
        ({"compression_level": "uniform"}, "key_diff"),
        ({"compression_profile": "none"}, "key_diff"),
    ):
        given = {"compression_profile": "auto", "compression_scorer": "auto", **options}
        config = configure(compression=given).additional_config
        assert plan_of(config).scorer_name == scorer
        assert config["tangram"]["compression_scorer"] == scorer
    assert len(made) == 1


def test_the_command_is_told_what_is_served(made):
    auto(compression_chunk_size=128, compression_window_size=16, compression_scorer="SnapKV")
    (arguments,) = made
    pairs = dict(zip(arguments[1::2], arguments[2::2], strict=False))
    assert arguments[0] == MODEL
    assert pairs["--compression-chunk-size"] == "128" and pairs["--page-group-size"] == "2"
    assert pairs["--compression-window-size"] == "16"
    assert json.loads(pairs["--engine-args"]) == {"dtype": "float32"}


def test_the_command_is_told_of_the_scorers_parameters(made):
    seven = {"kernel_size": 7}
    with pytest.raises(ProfileMismatchError, match="the profile has snap_kv.kernel_size=5"):
        auto(compression_scorer="snap_kv", compression_scorer_parameters=seven)
    (arguments,) = made  # the profile that stands for its result is of the defaults
    given = arguments[arguments.index("--compression-scorer-parameters") + 1]
    assert json.loads(given) == seven


def test_what_no_profile_mends_is_refused_before_calibrating(made):
    with pytest.raises(ConfigurationError, match="--page-group-size"):
        auto(page_group_size=3)
    with pytest.raises(ConfigurationError, match="--compression-window-size"):
        auto(compression_scorer="snap_kv", compression_window_size=0)
    assert made == []


def test_two_servers_at_once_calibrate_once(made):
    plans = []
    threads = [threading.Thread(target=lambda: plans.append(auto())) for _ in range(2)]
    auto(compression_window_size=16)  # vLLM's own caches are filled by one thread
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(plans) == 2 and plans[0] == plans[1]
    assert len(made) == 2


def test_weights_that_cannot_be_told_apart_are_refused(made, tmp_path):
    from tests.engine.test_refusals import write_config

    (tmp_path / "model").mkdir()
    model = write_config(tmp_path / "model")
    with pytest.raises(ConfigurationError, match="no weights.*--compression-profile none"):
        configure(model, compression={"compression_profile": "auto"})
