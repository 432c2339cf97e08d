"""Quantised weights: keys and values are what they are, however the layers before made them."""

import pytest

from tangram.conversations import is_right, make_conversation
from tests.engine.harness import assert_same, engine, few, generate
from tests.engine.prompts import conversation_prompt, noise, tokenizer
from tests.engine.quantised import FORMATS, write_model


@pytest.mark.parametrize("name", few(FORMATS, ["gptq"]))
def test_answers_are_those_of_vllm_and_right_at_half_the_cache(tmp_path, name):
    model = write_model(tmp_path, name)
    prompts = [conversation_prompt(seed, context_tokens=400) for seed in range(4)] + [noise(1, 300)]
    with engine(compressed=False, model=model) as llm:
        assert llm.llm_engine.vllm_config.model_config.quantization is not None
        stock = generate(llm, prompts)
    with engine(model=model, compression_ratio=1.0, compression_chunk_size=128) as llm:
        # Inputs that are quantised too turn rounding noise into steps of their own.
        assert_same(generate(llm, prompts), stock, "float16" if name == "int8" else "float32")
    with engine(model=model, compression_ratio=0.5, compression_chunk_size=128) as llm:
        half = generate(llm, prompts)
        again = generate(llm, prompts)
    assert all(answer.cached_tokens >= 256 for answer in again)
    right = [
        is_right(
            tokenizer().decode(answer.tokens, skip_special_tokens=True),
            make_conversation(seed, context_tokens=400, facts=6, turns=1).turns[0].answer,
        )
        for seed, answer in enumerate(half[:4])
    ]
    assert sum(right) >= 3
