"""On a GPU a decode step is one CUDA graph: the same kernels and shapes, so the same bits."""

import pytest

from tests.engine.harness import CUDA, MODEL, engine, few, generate
from tests.engine.prompts import conversation_prompt, noise

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("scorer", few(["snap_kv", "expected_attention"], ["snap_kv"]))
def test_graphs_give_the_answers_of_eager_steps(scorer):
    """Every batch size has a graph of its own size, so that no product is of another shape."""
    prompts = [conversation_prompt(1, 300), noise(2, 63), noise(3, 64), noise(4, 130)]
    options = dict(compression_ratio=0.25, compression_chunk_size=64, compression_scorer=scorer)
    if scorer == "expected_attention":
        options["compression_profile"] = f"{MODEL}/expected_attention.profile"
    with engine(**options) as llm:
        eager = generate(llm, prompts, max_tokens=200)
    assert CUDA.graphs["compilation_config"]["cudagraph_capture_sizes"] == [1, 2, 3, 4]
    with engine(**options, **CUDA.graphs) as llm:
        captured = generate(llm, prompts, max_tokens=200)
    assert [answer.tokens for answer in captured] == [answer.tokens for answer in eager]
    assert [answer.logprobs for answer in captured] == [answer.logprobs for answer in eager]
