"""Which generators a step's samples draw on."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tangram.vllm_plugin.worker import sampling


def runner(discarded):
    return SimpleNamespace(
        vllm_config=SimpleNamespace(additional_config={}),
        input_batch=SimpleNamespace(generators={0: "a", 2: "c"}, num_reqs=3),
        discard_request_mask=SimpleNamespace(np=np.array([*discarded, True])),
    )


@pytest.fixture
def seen(monkeypatch):
    """Samples as vLLM's own code would, and gives the generators that it finds."""

    def original(runner, grammar_output):
        if grammar_output == "fails":
            raise RuntimeError("no sample")
        return dict(runner.input_batch.generators)

    monkeypatch.setattr(sampling, "has_plan", lambda config: config.get("plan"))
    return sampling._sample_tokens(original)


@pytest.mark.parametrize(
    ("discarded", "used"),
    [
        ([True, False, False], {2: "c"}),
        ([False, True, True], {0: "a"}),
        ([False] * 3, {0: "a", 2: "c"}),
    ],
)
def test_a_discarded_sample_draws_on_no_generator(discarded, used, seen):
    step = runner(discarded)
    step.vllm_config.additional_config["plan"] = "there"
    assert seen(step, None) == used
    with pytest.raises(RuntimeError, match="no sample"):
        seen(step, "fails")
    assert step.input_batch.generators == {0: "a", 2: "c"}


def test_without_a_plan_nothing_changes(seen):
    assert seen(runner([True] * 3), None) == {0: "a", 2: "c"}
