"""Checkpoints of the recall model with quantised linear layers, made for a test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.engine.harness import MODEL

GROUP = 64
"""Inputs that share a scale, in 4 bits."""
_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Which of eight columns lies where in AWQ's words, the lowest bits first."""


def int8(weight: Tensor) -> dict[str, Tensor]:
    """A scale for each output; inputs are quantised as they come."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def gptq(weight: Tensor) -> dict[str, Tensor]:
    """4 bits around 8, eight inputs a word."""
    values, scales = _four_bits(weight)
    inputs, outputs = values.shape
    # GPTQ's files hold the zero points less one.
    zeros = torch.full((inputs // GROUP, outputs), 7, dtype=torch.int64)
    return {
        "qweight": _packed(values.T).T.contiguous(),
        "qzeros": _packed(zeros),
        "scales": scales,
        "g_idx": torch.arange(inputs, dtype=torch.int32) // GROUP,
    }


def awq(weight: Tensor) -> dict[str, Tensor]:
    """4 bits around 8, eight outputs a word."""
    values, scales = _four_bits(weight)
    zeros = torch.full((values.shape[0] // GROUP, values.shape[1]), 8, dtype=torch.int64)

    def ordered(matrix: Tensor) -> Tensor:
        return _packed(matrix.unflatten(1, (-1, 8))[:, :, _AWQ_ORDER].flatten(1))

    return {"qweight": ordered(values), "qzeros": ordered(zeros), "scales": scales}


def _four_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[inputs, outputs] of 0 ... 15, and scales [inputs / GROUP, outputs]."""
    groups = weight.T.unflatten(0, (-1, GROUP))
    scales = groups.abs().amax(dim=1) / 7
    values = (groups / scales[:, None]).round().clamp(-8, 7) + 8
    return values.flatten(0, 1).to(torch.int64), scales


def _packed(values: Tensor) -> Tensor:
    """Eight columns a word, the first in the lowest bits."""
    words = (values.unflatten(1, (-1, 8)) << (4 * torch.arange(8))).sum(dim=2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


_INT8 = dict(num_bits=8, type="int", symmetric=True)
FORMATS: dict[str, tuple[Callable[[Tensor], dict[str, Tensor]], dict[str, Any]]] = {
    "int8": (
        int8,
        dict(
            quant_method="compressed-tensors",
            format="int-quantized",
            ignore=["lm_head"],
            config_groups={
                "group_0": dict(
                    targets=["Linear"],
                    weights=dict(**_INT8, strategy="channel", dynamic=False),
                    input_activations=dict(**_INT8, strategy="token", dynamic=True),
                )
            },
        ),
    ),
    "gptq": (
        gptq,
        dict(quant_method="gptq", bits=4, group_size=GROUP, desc_act=False, sym=True),
    ),
    "awq": (
        awq,
        dict(quant_method="awq", bits=4, group_size=GROUP, zero_point=True, version="gemm"),
    ),
}
"""How a linear layer's weight [outputs, inputs] is written, and what config.json says of it."""


def write_model(folder: Path, name: str) -> str:
    """The folder, with the recall model in one of `FORMATS`."""
    quantise, config = FORMATS[name]
    for file in Path(MODEL).iterdir():
        if file.suffix in (".json", ".jinja"):
            (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
    weights = {}
    for key, weight in load_file(Path(MODEL) / "model.safetensors").items():
        layer, _, kind = key.rpartition(".")
        if layer.endswith("_proj") and kind == "weight":
            weights |= {f"{layer}.{part}": t for part, t in quantise(weight.float()).items()}
        else:
            weights[key] = weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)
