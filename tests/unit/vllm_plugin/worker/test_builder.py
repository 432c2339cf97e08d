"""What the metadata's builder has the kernels prepare."""

from types import SimpleNamespace

import pytest
import torch

from tangram.vllm_plugin.worker.backend import CompressedMetadataBuilder
from tangram.vllm_plugin.worker.runners.host import HostRunner


class Kernels:
    """Notes what it is asked for."""

    is_device = True

    def __init__(self):
        self.asked = []

    def warm_up(self, sealed, ring):
        self.asked.append(("warm_up", sealed, ring))

    def prepare_decode(self, batch_size):
        self.asked.append(("prepare_decode", batch_size))


def make_builder(kernels, cuts):
    builder = object.__new__(CompressedMetadataBuilder)
    builder._cuts, builder._ring = cuts, "the ring"
    builder._sealed = SimpleNamespace(runner=kernels)
    return builder


STEP = SimpleNamespace(
    max_query_len=1,
    num_actual_tokens=3,
    block_table_tensor=torch.zeros(3, 2),
    slot_mapping=torch.zeros(3),
    query_start_loc=torch.arange(4),
    seq_lens=torch.ones(3),
)


def test_kernels_are_warm_before_a_decode_step_can_be_captured():
    kernels = Kernels()
    builder = make_builder(kernels, cuts=True)
    assert builder.build(0, STEP).host is None
    assert kernels.asked == [
        ("warm_up", builder._sealed, "the ring"),
        ("prepare_decode", 3),
    ]


@pytest.mark.parametrize("kernels", [Kernels(), HostRunner()])
def test_the_builders_of_other_groups_and_of_a_cpu_warm_nothing(kernels):
    builder = make_builder(kernels, cuts=False)
    assert builder.build(0, STEP).host is None
    assert isinstance(kernels, HostRunner) or kernels.asked == []
