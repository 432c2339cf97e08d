"""Measuring budgets: which scorer the engine serves with."""

import sys
from types import SimpleNamespace

import pytest
import torch

from tangram.calibrate.budget_search import measure
from tangram.profile import ModelIdentity, Profile
from tangram.scorers import get_scorer

MODEL = ModelIdentity("Tiny", 2, 4, 8, 16, 128, 50)


class Stop(Exception):
    pass


@pytest.mark.parametrize("kernel_size", [5, 7])
def test_the_engine_has_the_parameters_of_the_profiles_scorer(monkeypatch, kernel_size):
    served = []

    class Reader:
        def __init__(self, model, lengths, *, compression, **engine):
            served.append(compression)

        def states(self, samples, positions):
            return [torch.zeros(len(each), 4) for each in positions]

        def close(self): ...

    def search(*args, **limits):
        raise Stop

    monkeypatch.setitem(
        sys.modules, "tangram.engines.reading", SimpleNamespace(ReadingEngine=Reader)
    )
    monkeypatch.setattr(measure, "search_budgets", search)
    profile = Profile(
        model=MODEL,
        scorer_name="snap_kv",
        scorer_parameters=get_scorer("snap_kv", kernel_size=kernel_size).parameters(),
        chunk_size_tokens=64,
        window_size_tokens=8,
        n_sink_tokens=4,
    )
    with pytest.raises(Stop):
        measure.measure_budgets(profile, "m", [[1] * 99] * 3, ratios=[0.5], time_limit_s=1)
    full, compressed = served
    assert full is None
    assert compressed["compression_scorer"] == "snap_kv"
    assert compressed["compression_scorer_parameters"] == {"kernel_size": kernel_size}
