"""What the metadata's builder has the kernels prepare."""

from types import SimpleNamespace

import pytest
import torch

from tangram.kernels.extend import MAX_STEP_TOKENS
from tangram.vllm_plugin.worker.backend import CompressedMetadataBuilder
from tangram.vllm_plugin.worker.runners.host import HostRunner
from tangram.vllm_plugin.worker.storage import SealedCache
from tests.kernels.inputs import make_geometry


class Kernels:
    """Notes what it is asked for."""

    is_device = True

    def __init__(self):
        self.asked = []

    def cut(self, host):
        self.asked.append("cut")

    def warm_up(self, sealed, ring):
        self.asked.append(("warm_up", sealed, ring))


def make_builder(kernels, cuts, drift=None, keeps_step=False):
    builder = object.__new__(CompressedMetadataBuilder)
    builder._cuts, builder._ring = cuts, "the ring"
    builder._sealed = object.__new__(SealedCache)
    builder._sealed.__dict__.update(
        runner=kernels, drift=drift, geometry=make_geometry([[1]]), _keeps_step=keeps_step
    )
    return builder


def make_step(*counts, after=None):
    """A step of requests that compute so many tokens, all they have if nothing else is said."""
    starts = torch.tensor([0, *counts]).cumsum(0)
    lengths = torch.tensor(counts if after is None else after)
    return SimpleNamespace(
        max_query_len=max(counts),
        num_actual_tokens=sum(counts),
        num_reqs=len(counts),
        block_table_tensor=torch.zeros(len(counts), 2),
        slot_mapping=torch.zeros(sum(counts)),
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
    )


STEP = make_step(1, 1, 1)


class Drift:
    """Says when it is due, and notes what it is told."""

    def __init__(self, is_due):
        self.is_due, self.passed, self.chosen_of = is_due, [], []

    def pass_over(self, sealing):
        self.passed.append(sealing.chunk.tolist())

    def choose(self, sealing):
        self.chosen_of.append(sealing.chunk.tolist())


@pytest.mark.parametrize(
    ("tokens", "on_device"),
    [(2, True), (MAX_STEP_TOKENS, True), (MAX_STEP_TOKENS + 1, False)],
)
def test_the_host_cuts_large_steps_alone(tokens, on_device):
    kernels = Kernels()
    metadata = make_builder(kernels, cuts=True).build(0, make_step(tokens))
    assert (metadata.host is None) == on_device and not metadata.is_decode
    assert ("cut" in kernels.asked) != on_device


def test_a_chunk_that_is_due_to_be_sampled_has_the_host_cut_a_small_step():
    step = make_step(70, 1, after=(200, 64))  # of chunks of 64 tokens
    for is_due in (False, True):
        drift = Drift(is_due)
        metadata = make_builder(Kernels(), cuts=True, drift=drift).build(0, step)
        assert (metadata.host is not None) == is_due
        assert (drift.chosen_of if is_due else drift.passed) == [[2, 0]]
        assert not (drift.passed if is_due else drift.chosen_of)


def test_decode_steps_are_never_the_hosts_on_a_device():
    drift = Drift(is_due=True)
    metadata = make_builder(Kernels(), cuts=True, drift=drift).build(0, STEP)
    assert metadata.host is None and metadata.is_decode and not drift.chosen_of


def test_kernels_are_warm_before_a_decode_step_can_be_captured():
    kernels = Kernels()
    builder = make_builder(kernels, cuts=True)
    assert builder.build(0, STEP).host is None
    assert kernels.asked == [("warm_up", builder._sealed, "the ring")]


@pytest.mark.parametrize("kernels", [Kernels(), HostRunner()])
def test_the_builders_of_other_groups_and_of_a_cpu_warm_nothing(kernels):
    builder = make_builder(kernels, cuts=False)
    assert builder.build(0, STEP).host is None
    assert isinstance(kernels, HostRunner) or kernels.asked == []


def test_what_is_captured_is_the_devices_and_counts_for_nothing():
    """Else a graph would hold tiles of the host's, which are gone at its replay."""
    drift, step = Drift(is_due=True), make_step(70, after=(200,))
    metadata = make_builder(Kernels(), cuts=True, drift=drift).build_for_cudagraph_capture(step)
    assert metadata.host is None and not drift.passed and not drift.chosen_of


def test_ranks_that_keep_step_sample_larger_steps_alone():
    for tokens, is_host in ((70, False), (MAX_STEP_TOKENS + 1, True)):
        drift, step = Drift(is_due=True), make_step(tokens, after=(1000,))
        builder = make_builder(Kernels(), cuts=True, drift=drift, keeps_step=True)
        assert (builder.build(0, step).host is not None) == is_host
        assert not builder._sealed.samples_next
