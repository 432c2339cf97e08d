"""Drift: which chunks are sampled, what is made of their scores, and how it reaches the core."""

import gc
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tangram.errors import ConfigurationError
from tangram.kernels.segments import SealingChunks
from tangram.plan.compression_plan import make_plan
from tangram.plan.options import CompressionOptions
from tangram.profile import ModelIdentity, Profile
from tangram.vllm_plugin.drift.board import DriftBoard, DriftReader, DriftReading, board_path
from tangram.vllm_plugin.drift.monitor import LEAST_CHUNKS, LIMITS, DriftMonitor, DriftReference

MODEL = ModelIdentity("Sample", 2, 2, 4, 64, 256, 100)
RATIO, TOKENS = 0.25, 64
WANTED = np.array([[0.4, 0.1], [0.05, 0.45]])  # shares; each layer's mean is the ratio


def make_profile(**arrays) -> Profile:
    rng = np.random.default_rng(0)
    share = WANTED + rng.normal(0, 0.001, size=(1, 8, 2, 2))
    arrays = arrays or {"threshold_share/perlayer": share, "threshold_share/crosslayer": share}
    return Profile(
        model=MODEL,
        scorer_name="key_diff",
        chunk_size_tokens=256,
        window_size_tokens=32,
        n_sink_tokens=4,
        ratios=(RATIO,),
        shares=(0.0, 0.5, 1.0),
        arrays=arrays,
    )


def geometry():
    options = CompressionOptions(
        compression_ratio=RATIO, compression_chunk_size=TOKENS, page_group_size=1
    )
    return make_plan(options, MODEL, itemsize_bytes=2).geometry


def scores_of(shares) -> torch.Tensor:
    """[layers, tokens, heads] whose tokens above 1 are those shares."""
    counts = torch.from_numpy(np.asarray(shares) * TOKENS).round()
    order = torch.arange(TOKENS)[None, :, None]
    return (order < counts[:, None, :]).float() + 1e-3 * torch.rand(2, TOKENS, 2)


def monitor(tmp_path, scope="perlayer", every=1) -> tuple[DriftMonitor, DriftBoard]:
    reference = DriftReference.of(make_profile(), scope, RATIO, geometry())
    board = DriftBoard(tmp_path / "board", create=True)
    return DriftMonitor(reference, every, torch.device("cpu"), board), board


NO_SINKS = torch.zeros(TOKENS, dtype=torch.bool)
COUNTS = torch.tensor(True)


def add(target: DriftMonitor, shares, times: int = 1) -> None:
    chunk = SealingChunks(np.array([0]), np.array([1]))
    for _ in range(times):
        target.choose(chunk)
        for layer, scores in enumerate(scores_of(shares)):
            target.add_layer(layer, scores, NO_SINKS, COUNTS)


@pytest.mark.parametrize("scope", ["perlayer", "crosslayer"])
def test_text_like_the_samples_is_no_drift(tmp_path, scope):
    target, board = monitor(tmp_path, scope)
    add(target, WANTED, times=3)
    reading = board.read()
    assert reading.sampled_chunks == 3
    assert reading.deviation < 0.2
    # Uniform budgets: the two heads that want more than a quarter are known to.
    assert reading.heads_over_budget == reading.expected_over_budget == 0.5
    assert reading.limit == LIMITS[scope]


def test_the_deviation_is_that_of_a_mean_over_chunks(tmp_path):
    target, board = monitor(tmp_path)
    add(target, WANTED[:, ::-1])
    least = 0.1 * (RATIO * (1 - RATIO)) ** 0.5
    off = np.abs(WANTED[:, ::-1] - make_profile().arrays["threshold_share/perlayer"][0].mean(0))
    rounding = 0.5 / TOKENS / least
    assert board.read().deviation == pytest.approx(off.mean() / least, abs=rounding)
    add(target, WANTED)  # in the mean of both every head wants what its layer's heads do
    assert board.read().deviation == pytest.approx(off.mean() / least / 2, abs=rounding)


def test_a_layer_without_its_share_of_the_tokens_shows_across_layers_only(tmp_path):
    scaled = np.stack([WANTED[0] * 1.6, WANTED[1] * 0.4])
    for scope, is_off in (("perlayer", False), ("crosslayer", True)):
        target, board = monitor(tmp_path, scope)
        # Ties at the lower level fill the layers up in their heads' proportion to each other.
        ranked = scores_of(scaled) + 0.1 * scores_of(WANTED)
        for layer, scores in enumerate(ranked):
            target.add_layer(layer, scores, NO_SINKS, COUNTS)
        assert (board.read().deviation > 1.5) == is_off


def test_steps_that_are_made_up_do_not_count(tmp_path):
    target, board = monitor(tmp_path)

    def add_made_up():
        for layer in range(2):
            target.add_layer(layer, torch.randn(TOKENS, 2), NO_SINKS, ~COUNTS)

    add_made_up()
    assert board.read().sampled_chunks == 0
    add(target, WANTED)
    alone = board.read()
    add_made_up()
    assert alone.sampled_chunks == 1 and board.read() == alone


def test_sinks_are_above_every_threshold(tmp_path):
    target, board = monitor(tmp_path)
    sinks = torch.arange(TOKENS) < TOKENS * RATIO
    for layer in range(2):
        target.add_layer(layer, torch.randn(TOKENS, 2), sinks, COUNTS)
    least = 0.1 * (RATIO * (1 - RATIO)) ** 0.5
    assert board.read().deviation == pytest.approx(np.abs(WANTED - RATIO).mean() / least, rel=0.01)


def test_every_nth_chunk_is_chosen_and_never_a_first_one(tmp_path):
    target, _ = monitor(tmp_path, every=3)
    steps = [[0, 1], [0], [5], [2, 0, 3], [1], [7, 8, 9, 10, 11, 12]]
    # Later chunks in order: 1 5 2 | 3 1 7 | 8 9 10 | 11 12; of a step only one is taken.
    chosen = []
    for step in steps:
        sample = target.choose(SealingChunks(np.arange(len(step)), np.array(step)))
        chosen.append(None if sample is None else sample.chunk.tolist())
    assert chosen == [None, None, None, [2], None, [7]]


def test_the_log_warns_once_when_the_limit_is_passed(tmp_path, caplog):
    logger = logging.getLogger("vllm.tangram")
    logger.addHandler(caplog.handler)
    try:
        target, _ = monitor(tmp_path)
        add(target, WANTED[:, ::-1], times=LEAST_CHUNKS - 1)
        assert not caplog.records
        add(target, WANTED[:, ::-1], times=10)
    finally:
        logger.removeHandler(caplog.handler)
    # Where vLLM has not set its loggers up, pytest's own handler sees a record as well.
    (record,) = {id(record): record for record in caplog.records}.values()
    assert "Calibrate a --compression-profile on text like this traffic" in record.getMessage()


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (None, "no profile: give one with --compression-profile"),
        (make_profile(mass_curve=np.zeros((1, 2, 2, 3))), "threshold_share/perlayer"),
    ],
)
def test_without_threshold_shares_the_option_is_refused(profile, message):
    with pytest.raises(ConfigurationError) as raised:
        DriftReference.of(profile, "error", RATIO, geometry())
    assert "--compression-drift-sample" in str(raised.value)
    assert message in str(raised.value)


def test_the_plan_refuses_the_option_without_a_profile():
    options = CompressionOptions(compression_drift_sample=100)
    with pytest.raises(ConfigurationError, match="--compression-drift-sample"):
        make_plan(options, MODEL, itemsize_bytes=2)
    with pytest.raises(ConfigurationError, match="--compression-drift-sample is -1"):
        CompressionOptions.from_mapping({"compression_drift_sample": -1})


def test_a_reading_reaches_the_other_end_and_leaves_no_file(tmp_path):
    path = tmp_path / "board"
    reader = DriftReader(path)
    assert reader.read() is None  # the worker has not begun
    board = DriftBoard(path, create=True)
    assert reader.read() is None  # and not sampled
    assert not path.exists()
    board.write(DriftReading(3, 1.5, 0.25, 0.5, 1.2))
    assert reader.read() == DriftReading(3, 1.5, 0.25, 0.5, 1.2)
    board.write(DriftReading(7, 2.5, 0.25, 0.5, 1.2))
    assert reader.read() == DriftReading(4, 2.5, 0.25, 0.5, 1.2)
    assert DriftReader(None).read() is None


def test_a_file_that_nobody_reads_goes_with_the_worker(tmp_path):
    path = tmp_path / "board"
    board = DriftBoard(path, create=True)
    assert path.exists()
    del board
    gc.collect()
    assert not path.exists()


def test_a_file_that_an_earlier_worker_left_is_made_anew(tmp_path):
    path = tmp_path / "board"
    earlier = DriftBoard(path, create=True)
    earlier.write(DriftReading(9, 9, 9, 9, 9))
    board = DriftBoard(path, create=True)
    assert board.read() == DriftReading(0, 0, 0, 0, 0)
    assert DriftBoard(path, create=False).read() == DriftReading(0, 0, 0, 0, 0)


def test_engines_of_a_dense_model_served_data_parallel_have_a_board_each():
    """vLLM makes each of them believe that it is alone; they shared one file."""
    from vllm.config import ParallelConfig

    paths = []
    for rank in range(2):
        parallel = ParallelConfig(data_parallel_size=2, data_parallel_size_local=2)
        parallel.data_parallel_index = rank
        parallel.reconfigure_for_independent_dp_rank()
        paths.append(board_path("engine", SimpleNamespace(parallel_config=parallel)))
    assert paths[0] != paths[1]


def test_a_chunk_that_was_due_in_a_step_of_the_device_is_made_up_for(tmp_path):
    """A small step runs as it was captured; the next one with a later chunk is sampled."""
    target, _ = monitor(tmp_path, every=3)
    two, first = (
        SealingChunks(np.array([0, 1]), np.array([1, 4])),
        SealingChunks([0], np.array([0])),
    )
    target.pass_over(two)
    assert not target.is_due
    target.pass_over(first)  # a chunk 0 is no sample
    assert not target.is_due
    target.pass_over(two)
    assert target.is_due
    assert target.choose(SealingChunks(np.array([0]), np.array([0]))) is None
    assert target.is_due
    assert target.choose(two).request.tolist() == [0]
    assert not target.is_due
