"""Seeded requests whose prompt takes several steps."""

import pytest

from tests.engine.harness import DEVICE, engine
from tests.engine.prompts import noise

PROMPTS = [noise(1, 300), noise(2, 40), noise(3, 170)]


def sampled(max_num_batched_tokens):
    """Token ids of answers to prompts that are given at once, and of the first by itself after."""
    from vllm import SamplingParams

    seeds = (7, 8, None)
    parameters = [
        SamplingParams(max_tokens=12, temperature=2.0, seed=seed, ignore_eos=True) for seed in seeds
    ]
    options = dict(compression_ratio=0.25, compression_chunk_size=64, enable_prefix_caching=False)
    with engine(max_num_batched_tokens=max_num_batched_tokens, **options) as llm:
        inputs = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        together = llm.generate(inputs, parameters, use_tqdm=False)
        (alone,) = llm.generate(inputs[:1], parameters[:1], use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in (*together, alone)]


@pytest.mark.skipif(DEVICE.has_kernels, reason="only a CPU's generator cannot be wound back")
def test_a_seed_gives_the_same_answer_however_its_prompt_was_cut():
    cut, whole = sampled(100), sampled(4096)
    assert [len(answer) for answer in cut] == [12] * 4
    assert cut[:2] == whole[:2]
    assert cut[3] == cut[0] == whole[3]
