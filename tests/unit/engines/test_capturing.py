"""What calibration reads off the modules of a model."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from tangram.engines.capturing import _can_be_looked_into, _rope_frequencies, _weight

PLAIN = {"rope_type": "default", "rope_theta": 1e4}
YARN = PLAIN | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
LLAMA3 = PLAIN | {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip


def make_rope(parameters, neox=True):
    with set_current_vllm_config(VllmConfig()):
        return get_rope(64, 1024, is_neox_style=neox, rope_parameters=parameters,
                        dtype=torch.bfloat16)  # fmt: skip


@pytest.mark.parametrize("parameters", [PLAIN, YARN, LLAMA3], ids=lambda p: p["rope_type"])
def test_frequencies_are_those_before_the_table_is_rounded(parameters):
    rope = make_rope(parameters)
    assert rope.cos_sin_cache.dtype == torch.bfloat16
    found = _rope_frequencies(SimpleNamespace(rotary_emb=rope))
    if parameters is YARN:
        expected = rope._compute_inv_freq(rope.scaling_factor)
    else:
        expected = rope._compute_inv_freq(rope.base)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=0)


def test_without_one_angle_a_pair_there_are_no_frequencies():
    long_rope = SimpleNamespace(short_factor=[1.0], long_short_cos_sin_cache=torch.ones(2, 4))
    for rope in (None, make_rope(PLAIN, neox=False), long_rope):
        assert _rope_frequencies(SimpleNamespace(rotary_emb=rope)) is None
    assert _rope_frequencies(SimpleNamespace()) is None


def test_a_table_that_cannot_be_made_anew_is_taken_as_it_is():
    table = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.8, 0.6, 0.6, 0.8]])
    rope = SimpleNamespace(is_neox_style=True, cos_sin_cache=table)
    found = _rope_frequencies(SimpleNamespace(rotary_emb=rope))
    torch.testing.assert_close(found, torch.atan2(table[1, 2:], table[1, :2]).double())


class Packed(nn.Module):
    """As vLLM's linear layers are: a packed weight, a bias, and a tuple for an answer."""

    input_size, params_dtype, skip_bias_add = 3, torch.float32, False

    def __init__(self):
        super().__init__()
        self.qweight = nn.Parameter(torch.arange(6, dtype=torch.int32), requires_grad=False)
        self.bias = nn.Parameter(torch.tensor([0.5, -3.0]), requires_grad=False)

    def forward(self, inputs):
        assert inputs.dtype == self.params_dtype
        out = inputs @ self.qweight.float().view(2, 3).T
        return (out, self.bias) if self.skip_bias_add else (out + self.bias, None)


def test_a_packed_weight_is_found_without_the_bias():
    linear = Packed()
    assert _weight(linear).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert linear.skip_bias_add is False


def test_decoders_are_known_by_the_names_of_what_they_take():
    class Decoder:
        self_attn = SimpleNamespace(o_proj=None)

        def forward(self, positions, hidden_states): ...

    class Other(Decoder):
        def forward(self, positions, x): ...

    assert _can_be_looked_into(Decoder()) and not _can_be_looked_into(Other())
    assert not _can_be_looked_into(SimpleNamespace(forward=Decoder().forward))
