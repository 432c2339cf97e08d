"""Running vLLM in this process for tests: short-lived engines, answers with log-probabilities."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tangram.bundled import recall_model_path

MODEL = str(recall_model_path())
CACHE_BYTES = 160 << 20
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Answer:
    """What an engine answered.

    Attributes:
        tokens: token ids.
        logprobs: for every token, log-probabilities by token id: of itself and of the best ones.
        prompt_logprobs: the same for the prompt's tokens from the second on, when asked for.
        cached_tokens: tokens of the prompt that came from the prefix cache.
    """

    tokens: list[int]
    logprobs: list[dict[int, float]]
    prompt_logprobs: list[dict[int, float]]
    cached_tokens: int


@contextmanager
def engine(*, compressed: bool = True, model: str = MODEL, **options: Any) -> Iterator[Any]:
    """An engine that is gone when the block ends.

    Args:
        compressed: `tangram.LLM`, or vLLM's own class.
        model: folder of the model.
        **options: keyword arguments of the class.
    """
    import vllm

    import tangram

    settings = dict(
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        kv_cache_memory_bytes=CACHE_BYTES,
        disable_log_stats=False,
    )
    cls = tangram.LLM if compressed else vllm.LLM
    llm = cls(model, **{**settings, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def generate(
    llm: Any, prompts: Sequence[list[int]], *, max_tokens: int = 8, prompt_logprobs: bool = False
) -> list[Answer]:
    """Greedy answers to prompts of token ids, given to the engine at once."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=max_tokens,
        temperature=0,
        logprobs=5,
        prompt_logprobs=1 if prompt_logprobs else None,
        ignore_eos=True,
    )
    inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    outputs = llm.generate(inputs, parameters, use_tqdm=False)
    return [_answer(output) for output in outputs]


def _answer(output: Any) -> Answer:
    def plain(entries: Any) -> list[dict[int, float]]:
        return [{token: value.logprob for token, value in entry.items()} for entry in entries]

    completion = output.outputs[0]
    return Answer(
        tokens=list(completion.token_ids),
        logprobs=plain(completion.logprobs),
        prompt_logprobs=plain((output.prompt_logprobs or [None])[1:]),
        cached_tokens=output.num_cached_tokens or 0,
    )


def assert_same(got: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """The same tokens, and log-probabilities within the tolerance."""
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.tokens == theirs.tokens
        _assert_close(mine.logprobs, theirs.logprobs)


def _assert_close(got: list[dict[int, float]], expected: list[dict[int, float]]) -> None:
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        common = mine.keys() & theirs.keys()
        assert common, "no token in common"
        worst = max(abs(mine[token] - theirs[token]) for token in common)
        assert worst < TOLERANCE, worst


def assert_follows(
    answer: Answer, prompt: list[int], logprobs: torch.Tensor, clear_until: int
) -> None:
    """The answer's log-probabilities are those of an oracle, and its tokens the likeliest.

    Args:
        answer: what the engine gave for `prompt`, with `prompt_logprobs`.
        prompt: token ids.
        logprobs: [tokens, vocabulary], the oracle's for prompt + answer at every position.
        clear_until: positions from here on depend on a choice that float noise decides.
    """
    entries = answer.prompt_logprobs + answer.logprobs
    assert len(entries) == len(prompt) + len(answer.tokens) - 1
    for position, entry in enumerate(entries[:clear_until]):
        for token, value in entry.items():
            difference = abs(value - float(logprobs[position, token]))
            assert difference < TOLERANCE, (position, token, value, difference)
    for position, token in enumerate(answer.tokens, start=len(prompt) - 1):
        if position < clear_until:
            best = logprobs[position].max()
            assert float(best - logprobs[position, token]) < TOLERANCE
