"""Whether FlashAttention is taken, and what is made sure of before."""

import pytest
import torch

from tangram.vllm_plugin.worker.runners.flash import PROBE_TOLERANCE, find_flash_attention, probe
from tests.kernels.inputs import make_geometry
from tests.kernels.paged_attention import paged_attention

LAYOUT = make_geometry([[1, 3]], queries_per_kv_head=4, head_size=128)
CPU = torch.device("cpu")


def test_there_is_none_without_a_gpu():
    assert find_flash_attention(LAYOUT, torch.bfloat16, CPU) is None


def test_there_is_none_for_a_layout_whose_rows_begin_in_the_middle_of_a_page():
    layout = make_geometry([[1, 3]], window_size_tokens=21)
    assert find_flash_attention(layout, torch.bfloat16, torch.device("cuda")) is None


def test_there_is_none_where_vllm_was_told_to_take_another_version():
    assert find_flash_attention(LAYOUT, torch.bfloat16, torch.device("cuda"), version=2) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_probe_agrees_with_the_contract(dtype):
    assert probe(paged_attention, LAYOUT, dtype, CPU) < PROBE_TOLERANCE


def _base_two(**arguments):
    out, lse = paged_attention(**arguments)
    return out, lse * 1.4426950408889634


def _transposed(**arguments):
    out, lse = paged_attention(**arguments)
    return out, lse.T.reshape(lse.shape)


def _first_page_only(**arguments):
    arguments["block_table"] = arguments["block_table"][:, :1].expand(-1, 2).contiguous()
    return paged_attention(**arguments)


def _nothing(**arguments):
    out, lse = paged_attention(**arguments)
    return out.fill_(torch.nan), lse


@pytest.mark.parametrize("wrong", [_base_two, _transposed, _first_page_only, _nothing])
def test_a_probe_finds_what_does_not(wrong):
    assert not probe(wrong, LAYOUT, torch.bfloat16, CPU) < PROBE_TOLERANCE
