"""What sealing asks a scorer."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from tangram.errors import ScorerError
from tangram.scorers import Scorer
from tangram.vllm_plugin.worker.runners import sealing
from tests.kernels.inputs import make_geometry


@dataclass(frozen=True)
class Flat(Scorer):
    name: ClassVar[str] = "flat"

    def score(self, chunks):
        return chunks.keys.sum(dim=(-2, -1))


def test_a_scorer_that_gives_no_scores_is_named():
    geometry = make_geometry([[2, 2]], chunk_size_tokens=64)
    sealed = SimpleNamespace(geometry=geometry, scorer=Flat(), statistics=lambda *_: {})
    step = SimpleNamespace(
        sealed=sealed, view=SimpleNamespace(ring=None, scores=None), layer=0, softmax_scale=1.0
    )
    raw = torch.zeros(1, geometry.num_kv_heads, 64, 2 * geometry.head_size)
    with pytest.raises(ScorerError, match=r"'flat' \(.*\.Flat\) returned a tensor \[1, 64\] of"):
        sealing._score(step, None, None, raw, torch.arange(64)[None])
