"""Quantised weights: keys and values are what they are, however the layers before made them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tangram.conversations import is_right, make_conversation
from tests.engine.harness import MODEL, Answer, assert_same, engine, generate
from tests.engine.prompts import conversation_prompt, noise, tokenizer

SEEDS = range(4)
CONTEXT_TOKENS = 400
DTYPE = "float16"
_INT8 = dict(num_bits=8, type="int", symmetric=True)
INT8_LAYERS = dict(
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
)


def write_model(folder: Path) -> str:
    """The folder, with the recall model's linear layers in int8, a scale for each output."""
    for file in Path(MODEL).iterdir():
        if file.suffix in (".json", ".jinja"):
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": INT8_LAYERS}))
    weights = load_file(Path(MODEL) / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        weight = weights[name].float()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        weights[name] = (weight / scale).round().to(torch.int8)
        weights[f"{name}_scale"] = scale
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def num_right(answers: list[Answer]) -> int:
    """Of the conversations of SEEDS, which come first."""
    found = 0
    for seed, answer in zip(SEEDS, answers, strict=False):
        turn = make_conversation(seed, context_tokens=CONTEXT_TOKENS, facts=6, turns=1).turns[0]
        end = (*answer.tokens, tokenizer().eos_token_id).index(tokenizer().eos_token_id)
        found += is_right(tokenizer().decode(answer.tokens[:end]), turn.answer)
    return found


def test_answers_are_those_of_vllm_and_right_at_half_the_cache(tmp_path):
    model = write_model(tmp_path)
    prompts = [conversation_prompt(seed, CONTEXT_TOKENS) for seed in SEEDS] + [noise(1, 300)]
    with engine(compressed=False, model=model, dtype=DTYPE) as llm:
        assert llm.llm_engine.vllm_config.model_config.quantization is not None
        stock = generate(llm, prompts)
    assert num_right(stock) >= 3
    options = dict(model=model, dtype=DTYPE, compression_chunk_size=128)
    with engine(compression_ratio=1.0, **options) as llm:
        assert_same(generate(llm, prompts), stock, DTYPE)
    with engine(compression_ratio=0.5, **options) as llm:
        half, again = generate(llm, prompts), generate(llm, prompts)
    assert num_right(half) >= 3
    assert all(answer.cached_tokens >= 256 for answer in again)
    assert_same(again, half, DTYPE)
