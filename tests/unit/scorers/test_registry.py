"""Names, spellings, parameters, and scorers of other packages."""

import sys
import types
from dataclasses import FrozenInstanceError, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from tangram import scorers
from tangram.errors import ConfigurationError, ScorerError
from tangram.scorers import (
    AUTO_SCORERS,
    ENTRY_POINT_GROUP,
    SEALING_ORDER,
    UNCALIBRATED_SCORER,
    Scorer,
    get_scorer,
    is_auto,
    registered_name,
    scorer_names,
)

BUILT_IN = (
    "streaming_llm",
    "key_norm",
    "key_diff",
    "expected_attention",
    "learned",
    "snap_kv",
    "tova",
    "fastkvzip",
    "kvzap",
)


@dataclass(frozen=True)
class Oldest(Scorer):
    name: ClassVar[str] = "oldest"

    offset: float = 0.0

    def score(self, chunks):
        return self.offset - get_scorer("streaming_llm").score(chunks)


@pytest.fixture
def installed(monkeypatch):
    """Makes entry points of this group the given ones: name -> object or "module:attribute"."""
    packages = types.ModuleType("other_package")
    monkeypatch.setitem(sys.modules, "other_package", packages)

    def install(*named):
        points = []
        for i, (name, target) in enumerate(named):
            if not isinstance(target, str):
                setattr(packages, f"thing_{i}", target)
                target = f"other_package:thing_{i}"
            points.append(metadata.EntryPoint(name, target, ENTRY_POINT_GROUP))

        def entry_points(**selected):
            assert selected == {"group": ENTRY_POINT_GROUP}
            return metadata.EntryPoints(points)

        monkeypatch.setattr(metadata, "entry_points", entry_points)

    return install


@pytest.fixture
def nothing_may_look_for_packages(monkeypatch):
    def entry_points(**_):
        raise AssertionError("looked for packages")

    monkeypatch.setattr(metadata, "entry_points", entry_points)


def test_names(installed):
    installed()
    assert scorer_names() == BUILT_IN
    assert UNCALIBRATED_SCORER in AUTO_SCORERS and set(AUTO_SCORERS) <= set(BUILT_IN)
    assert get_scorer(UNCALIBRATED_SCORER).needs_statistics == ()
    assert sorted(SEALING_ORDER) == sorted(BUILT_IN)


def test_auto_is_no_scorer_in_any_spelling(installed):
    assert all(map(is_auto, ("auto", "Auto", " AUTO "))) and not is_auto("automatic")
    assert registered_name("Auto") == "auto" and registered_name("KeyDiff") == "key_diff"
    with pytest.raises(ScorerError, match="unknown --compression-scorer 'auto'"):
        get_scorer("auto")
    installed(("auto", Oldest))
    with pytest.raises(ScorerError, match="taken by tangram itself"):
        scorer_names()


@pytest.mark.usefixtures("nothing_may_look_for_packages")
@pytest.mark.parametrize("name", BUILT_IN)
def test_file_class_and_name_agree(name):
    scorer = get_scorer(name)
    assert scorer.name == name
    assert type(scorer).__module__ == f"tangram.scorers.{name}"
    assert type(scorer).__name__.lower() == name.replace("_", "")
    assert scorer_names(third_party=False) == BUILT_IN


def test_every_file_is_in_the_registry():
    helpers = {"__init__", "base", "gates", "select", "shares"}
    files = {file.stem for file in Path(scorers.__file__).parent.glob("*.py")}
    assert files - helpers == set(BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_scorer_is_a_frozen_value(name):
    scorer = get_scorer(name)
    assert scorer == get_scorer(name)
    assert hash(scorer) == hash(get_scorer(name))
    assert scorer.parameters() == {f.name: getattr(scorer, f.name) for f in fields(scorer)}
    with pytest.raises(FrozenInstanceError):
        scorer.kernel_size = 9


@pytest.mark.usefixtures("nothing_may_look_for_packages")
@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("KeyDiff", "key_diff"),
        ("key-diff", "key_diff"),
        ("keydiff", "key_diff"),
        ("KEY_DIFF", "key_diff"),
        (" key_diff ", "key_diff"),
        ("snapkv", "snap_kv"),
        ("SnapKV", "snap_kv"),
        ("TOVA", "tova"),
        ("StreamingLLM", "streaming_llm"),
        ("streaming-llm", "streaming_llm"),
        ("ExpectedAttention", "expected_attention"),
        ("Key-Norm", "key_norm"),
    ],
)
def test_spellings(spelling, name):
    assert get_scorer(spelling).name == name


def test_an_unknown_name_lists_the_known_ones(installed):
    installed(("oldest", Oldest))
    with pytest.raises(ScorerError) as caught:
        get_scorer("h2o")
    assert "--compression-scorer 'h2o'" in str(caught.value)
    for name in (*BUILT_IN, "oldest"):
        assert name in str(caught.value)
    assert isinstance(caught.value, ConfigurationError)


@pytest.mark.parametrize("name", [None, 3, ""])
def test_what_is_no_name_is_unknown(name, installed):
    installed()
    with pytest.raises(ScorerError, match="unknown --compression-scorer"):
        get_scorer(name)


def test_an_unknown_parameter_is_named():
    with pytest.raises(ScorerError, match="snap_kv has no parameter kernel: it takes kernel_size"):
        get_scorer("snap_kv", kernel=3)
    with pytest.raises(ScorerError, match="key_diff has no parameter kernel_size: it takes none"):
        get_scorer("key_diff", kernel_size=3)
    with pytest.raises(ScorerError, match="no parameter needs_statistics"):
        get_scorer("key_diff", needs_statistics=())


@pytest.mark.parametrize(
    ("name", "parameter", "value"),
    [
        ("snap_kv", "kernel_size", 0),
        ("snap_kv", "kernel_size", -3),
        ("snap_kv", "kernel_size", 4),
        ("snap_kv", "kernel_size", 5.0),
        ("snap_kv", "kernel_size", "5"),
        ("snap_kv", "kernel_size", True),
        ("expected_attention", "n_future_tokens", 0),
        ("expected_attention", "n_future_tokens", 1.5),
        ("expected_attention", "epsilon", -0.1),
        ("expected_attention", "epsilon", float("nan")),
        ("expected_attention", "epsilon", float("inf")),
        ("expected_attention", "epsilon", "much"),
        ("expected_attention", "epsilon", True),
    ],
)
def test_a_bad_parameter_is_named_with_its_value(name, parameter, value):
    with pytest.raises(ScorerError) as caught:
        get_scorer(name, **{parameter: value})
    for part in (name, parameter, repr(value), "expected"):
        assert part in str(caught.value)


def test_what_scorers_ask_for():
    asks = {name: get_scorer(name) for name in BUILT_IN}
    assert [n for n, s in asks.items() if s.needs_window_queries] == ["snap_kv", "tova"]
    assert [n for n, s in asks.items() if s.stores_scores] == ["fastkvzip", "kvzap"]
    assert {n: s.needs_statistics for n, s in asks.items() if s.needs_statistics} == {
        "expected_attention": ("query_mean", "query_covariance", "rope_frequencies"),
        "learned": ("row_weights", "rope_frequencies"),
    }


def test_a_package_adds_a_scorer(installed, make_chunks):
    installed(("oldest", Oldest))
    assert scorer_names() == (*BUILT_IN, "oldest")
    scorer = get_scorer("Oldest", offset=2.0)
    assert scorer == Oldest(offset=2.0)
    scores = scorer.score(make_chunks(tokens=3))
    assert torch.equal(scores[:, 0], torch.tensor([2.0, 1.0, 0.0]))
    with pytest.raises(ScorerError, match="oldest has no parameter size: it takes offset"):
        get_scorer("oldest", size=1)


def test_a_package_is_loaded_only_when_its_scorer_is_asked_for(installed):
    installed(("broken", "no_such_package:Broken"), ("oldest", Oldest))
    assert scorer_names() == (*BUILT_IN, "broken", "oldest")
    assert get_scorer("oldest") == Oldest()
    with pytest.raises(ScorerError, match="'broken' of no_such_package:Broken cannot be loaded"):
        get_scorer("broken")


@pytest.mark.parametrize("name", ["key_diff", "KeyDiff", "key-diff"])
def test_a_package_may_not_take_a_built_in_name(name, installed):
    installed((name, Oldest))
    for ask in (scorer_names, lambda: get_scorer("something_else")):
        with pytest.raises(ScorerError, match="taken by tangram itself: rename the entry point"):
            ask()
    assert get_scorer("key_diff").name == "key_diff"


def test_two_packages_may_not_share_a_name(installed):
    installed(("oldest", Oldest), ("Oldest", "elsewhere:Oldest"))
    with pytest.raises(ScorerError, match="elsewhere:Oldest is taken by other_package:thing_0"):
        get_scorer("oldest")
    installed(("oldest", Oldest), ("Oldest", "other_package:thing_0"))
    with pytest.raises(ScorerError, match="is taken by"):
        scorer_names()


def test_a_package_on_two_paths_is_one(installed):
    installed(("oldest", "other_package:thing_1"), ("oldest", Oldest))
    assert get_scorer("oldest") == Oldest()


def test_what_is_no_scorer_is_refused(installed):
    installed(("dictionary", dict), ("instance", Oldest()))
    for name in ("dictionary", "instance"):
        with pytest.raises(ScorerError, match="expected a subclass of tangram.scorers.Scorer"):
            get_scorer(name)


def test_an_entry_point_must_bear_the_name_of_its_class(installed):
    installed(("newest", Oldest))
    with pytest.raises(ScorerError, match="calls itself 'oldest'"):
        get_scorer("newest")
