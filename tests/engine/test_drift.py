"""Drift while serving: the limit holds for calibration's kind of text, and finds others out."""

import logging
from pathlib import Path

import pytest
import torch
from prometheus_client import REGISTRY

from tangram.vllm_plugin.drift.board import DriftBoard
from tangram.vllm_plugin.drift.monitor import LEAST_CHUNKS, DriftMonitor
from tangram.vllm_plugin.worker.storage import SEALED_NAME
from tests.engine.harness import MODEL, engine, generate
from tests.engine.prompts import conversation_prompt, noise

PROFILE = str(Path(MODEL) / "expected_attention.profile")
TOKENS = 2600
WHERE = "cuda" if torch.cuda.is_available() else "cpu"


def metric(name: str) -> float:
    labels = {"model_name": MODEL, "engine": "0"}
    found = REGISTRY.get_sample_value(f"tangram:drift_{name}", labels)
    assert found is not None, name
    return found


class Warnings(logging.Handler):
    """The warnings of drift that are written while it is attached."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "calibrated on" in record.getMessage():
            self.found.append(record.getMessage())

    def __enter__(self) -> "Warnings":
        logging.getLogger("vllm.tangram").addHandler(self)
        return self

    def __exit__(self, *exception: object) -> None:
        logging.getLogger("vllm.tangram").removeHandler(self)


@pytest.mark.parametrize("level", ["error", "crosslayer"])
def test_conversations_stay_within_the_limit_and_random_tokens_do_not(level, tmp_path):
    options = dict(
        compression_ratio=0.25,
        compression_scorer="expected_attention",
        compression_profile=PROFILE,
        compression_level=level,
        compression_drift_sample=1,
        page_group_size=1,
        max_num_batched_tokens=256,
    )
    with engine(**options) as llm, Warnings() as warnings:
        generate(llm, [conversation_prompt(seed, TOKENS) for seed in (1, 2)], max_tokens=2)
        assert metric("sampled_chunks_total") >= LEAST_CHUNKS
        assert 0 < metric("deviation") < 0.9 * metric("limit")
        assert warnings.found == []

        # A second worker's view: one that has seen nothing of the conversations.
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        board = DriftBoard(tmp_path / "board", create=True)
        reference = layers[SEALED_NAME].drift.reference
        layers[SEALED_NAME].drift = DriftMonitor(reference, 1, torch.device(WHERE), board)
        generate(llm, [noise(seed, TOKENS) for seed in (1, 2)], max_tokens=2)
        found = board.read()
        assert found.sampled_chunks >= LEAST_CHUNKS
        assert found.deviation > found.limit
        assert len(warnings.found) == 1
