"""Scorers of other packages that give something else than scores."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from tangram.calibrate.recording.layer_sample import LayerSample, score_sealed
from tangram.errors import ScorerError
from tangram.scorers import Scorer, checked_scores, get_scorer
from tests.kernels.inputs import make_geometry

SHAPE = (2, 37, 2)
EXPECTED = f"a tensor {list(SHAPE)} of torch.float32 on cpu"


@dataclass(frozen=True)
class Answers(Scorer):
    """Gives what it was made with, or raises it."""

    name: ClassVar[str] = "answers"

    answer: Any = None

    def score(self, chunks):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (None, "returned a NoneType"),
        ([0.0], "returned a list"),
        (torch.zeros(37, 2), "returned a tensor [37, 2] of torch.float32 on cpu"),
        (torch.zeros(2, 2, 37), "returned a tensor [2, 2, 37] of torch.float32 on cpu"),
        (torch.zeros(*SHAPE, 1), "returned a tensor [2, 37, 2, 1] of torch.float32 on cpu"),
        (torch.zeros(SHAPE).half(), "returned a tensor [2, 37, 2] of torch.float16 on cpu"),
        (torch.zeros(SHAPE).double(), "returned a tensor [2, 37, 2] of torch.float64 on cpu"),
        (torch.zeros(SHAPE, device="meta"), "returned a tensor [2, 37, 2] of torch.float32 on m"),
        (IndexError("far\nout"), "raised IndexError: far out"),
        (AssertionError(), "raised AssertionError: "),
    ],
)
def test_what_is_no_scores_names_the_scorer(answer, found, make_chunks):
    with pytest.raises(ScorerError) as error:
        checked_scores(Answers(answer), make_chunks((2,)))
    message = str(error.value)
    assert message.startswith(f"the scorer 'answers' ({__name__}.Answers) {found}")
    assert f"expected {EXPECTED}: correct its method score" in message
    assert "\n" not in message


def test_what_a_scorer_says_itself_stays(make_chunks):
    with pytest.raises(ScorerError, match=r"^answers: no window$"):
        checked_scores(Answers(ScorerError("answers: no window")), make_chunks((2,)))


def test_scores_are_given_as_they_are(make_chunks):
    scores = torch.full(SHAPE, torch.nan)
    assert checked_scores(Answers(scores), make_chunks((2,))) is scores
    chunks = make_chunks((2,), dtype=torch.bfloat16)
    for name in ("key_diff", "snap_kv", "expected_attention"):
        scorer = get_scorer(name)
        assert torch.equal(checked_scores(scorer, chunks), scorer.score(chunks))


def test_calibration_checks_them():
    geometry = make_geometry([[2, 2]], chunk_size_tokens=64, window_size_tokens=32)
    heads = torch.zeros(200, geometry.num_kv_heads, geometry.head_size)
    sample = LayerSample(heads, heads, heads, 1.0)
    with pytest.raises(ScorerError, match=r"'answers' .* returned a NoneType, expected a tensor"):
        score_sealed(sample, Answers(), {}, geometry)
