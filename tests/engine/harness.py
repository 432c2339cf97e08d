"""Running vLLM in this process for tests: short-lived engines, answers with log-probabilities.

The tests are the same on a CPU and on a GPU; what differs is in `DEVICE` and `TOLERANCE`. In
float32 answers are compared token for token. In half precision rounding depends on how a batch was
cut, because matrix products do, so two tokens that are all but equally likely may change places,
and two rows with all but equal scores as well: tests compare up to the first such tie, and hold
what an engine kept to the oracle's scores.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tangram.bundled import recall_model_path
from tangram.kernels.seal_decode import has_kernel
from tests.engine.kept import sealed_cache

MODEL = str(recall_model_path())
CACHE_BYTES = 160 << 20


@dataclass(frozen=True)
class Device:
    """What the engine tests do differently on one kind of device.

    Attributes:
        dtype: of engines, as vLLM spells it.
        has_kernels: whether kernels serve a step, where there is one for the scorer.
        head_size: of models that a test makes.
        schedule_scorers: those whose answers to the same tokens are compared between schedules.
        options: of every engine.
        stock: of engines without compression, further to those.
        graphs: of engines that decode much, so that all of it is captured.
        pace: time of a step over that on a CPU, for clients that leave in the middle of an answer.
    """

    dtype: str
    has_kernels: bool
    head_size: int
    schedule_scorers: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    stock: dict[str, Any] = field(default_factory=dict)
    graphs: dict[str, Any] = field(default_factory=dict)
    pace: float = 1.0


CPU = Device(
    dtype="float32", has_kernels=False, head_size=16, schedule_scorers=("key_diff", "snap_kv")
)
CUDA = Device(
    # Kernels take half types only, and of the two this one has three bits of mantissa more.
    dtype="float16",
    has_kernels=True,
    head_size=64,
    # What it keeps depends on positions alone: no rounding can tip a choice.
    schedule_scorers=("streaming_llm",),
    # Some builds of FlashAttention 3 leave float16 out, and end the process when asked for it.
    options=dict(
        gpu_memory_utilization=0.2,
        max_num_seqs=32,
        attention_config={"flash_attn_version": 2},
    ),
    stock=dict(attention_backend="TRITON_ATTN"),
    graphs=dict(
        enforce_eager=False,
        compilation_config={
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 2, 3, 4],
        },
    ),
    pace=0.3,
)
DEVICE = CUDA if torch.cuda.is_available() else CPU


@dataclass(frozen=True)
class Tolerance:
    """How far log-probabilities, in nats, and scores may be off.

    Attributes:
        worst: largest difference; tokens that are closer than that are a tie.
        most: what 99 of 100 differences stay below.
        score: error of a scorer's scores, as a share of the score.
    """

    worst: float
    most: float
    score: float


TOLERANCE = {
    "float32": Tolerance(worst=1e-3, most=1e-3, score=1e-5),
    # The CPU engine in float16 was off by 0.12 at worst, 0.023 for 99 of 100, and 0.002 in scores.
    # With as much noise again in every product, two runs were apart by 0.39 and 0.06.
    "float16": Tolerance(worst=0.5, most=0.1, score=0.01),
}
"""By the engine's type; against an oracle in float32, or another engine of that type."""


def few(cases: Iterable[Any], quick: Iterable[Any]) -> list[Any]:
    """Cases of a test, of which those not in `quick` are marked `thorough`.

    An engine takes longer to start on a GPU than a test of it takes, so that a run there is
    `-m "not thorough"`.
    """
    cases, quick = list(cases), list(quick)
    assert all(case in cases for case in quick), "a quick case is none of the cases"
    assert quick, "a test without a quick case"

    def values(case: Any) -> tuple:
        return case if isinstance(case, tuple) else (case,)

    return [
        pytest.param(*values(case), marks=() if case in quick else pytest.mark.thorough)
        for case in cases
    ]


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
    """An engine that is gone when the block ends; on a GPU its kernels are at work, or it fails.

    Args:
        compressed: `tangram.LLM`, or vLLM's own class.
        model: folder of the model.
        **options: keyword arguments of the class.
    """
    import vllm

    import tangram

    settings = dict(
        dtype=DEVICE.dtype,
        enforce_eager=True,
        max_model_len=4096,
        kv_cache_memory_bytes=CACHE_BYTES,
        disable_log_stats=False,
        **DEVICE.options,
        **(dict(compression_profile="none") if compressed else DEVICE.stock),
    )
    cls = tangram.LLM if compressed else vllm.LLM
    llm = cls(model, **{**settings, **options})
    try:
        if compressed:
            sealed = sealed_cache(llm)
            served = DEVICE.has_kernels and has_kernel(sealed.scorer.name)
            assert sealed.runner.is_device == served, sealed.scorer.name
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def generate(
    llm: Any,
    prompts: Sequence[list[int]],
    *,
    max_tokens: int = 8,
    prompt_logprobs: bool = False,
    adapters: Sequence[Any] | None = None,
) -> list[Answer]:
    """Greedy answers to prompts of token ids, given to the engine at once.

    `adapters` has each prompt's `LoRARequest`, or None.
    """
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=max_tokens,
        temperature=0,
        logprobs=5,
        prompt_logprobs=1 if prompt_logprobs else None,
        ignore_eos=True,
    )
    inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    outputs = llm.generate(
        inputs, parameters, use_tqdm=False, lora_request=list(adapters) if adapters else None
    )
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


def assert_same(
    got: Sequence[Answer], expected: Sequence[Answer], dtype: str = DEVICE.dtype
) -> None:
    """The same tokens, and log-probabilities within the tolerance.

    In half precision tokens are the same up to the first place where two are a tie; at least half
    of all tokens must come before.
    """
    assert len(got) == len(expected)
    differences, compared = [], 0
    for mine, theirs in zip(got, expected, strict=True):
        assert len(mine.tokens) == len(theirs.tokens)
        pairs = zip(mine.tokens, theirs.tokens, strict=True)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(mine.tokens))
        if same < len(mine.tokens):
            assert dtype != "float32", (mine.tokens, theirs.tokens)
            _assert_tie(mine, theirs, same, TOLERANCE[dtype].worst)
        differences += _differences(mine.logprobs[: same + 1], theirs.logprobs[: same + 1])
        compared += same
    assert_close(differences, dtype)
    assert compared >= sum(len(answer.tokens) for answer in expected) / 2, compared


def _assert_tie(mine: Answer, theirs: Answer, place: int, tolerance: float) -> None:
    """The first token that differs is one that either answer could have had."""
    a, b = mine.tokens[place], theirs.tokens[place]
    for entry, first, second in (
        (mine.logprobs[place], a, b),
        (theirs.logprobs[place], b, a),
    ):
        assert second in entry, (place, first, second, entry)
        assert entry[first] - entry[second] < tolerance, (place, first, second, entry)


def _differences(got: list[dict[int, float]], expected: list[dict[int, float]]) -> list[float]:
    assert len(got) == len(expected)
    differences = []
    for mine, theirs in zip(got, expected, strict=True):
        common = mine.keys() & theirs.keys()
        assert common, "no token in common"
        differences += [abs(mine[token] - theirs[token]) for token in common]
    return differences


def assert_close(differences: Sequence[float], dtype: str) -> None:
    """The worst difference, and 99 of 100 of them, are within the tolerance."""
    ordered, tolerance = sorted(differences), TOLERANCE[dtype]
    assert ordered[-1] < tolerance.worst, ordered[-5:]
    assert ordered[int(0.99 * (len(ordered) - 1))] < tolerance.most, ordered[-len(ordered) // 50 :]


def assert_follows(
    answer: Answer,
    prompt: list[int],
    logprobs: torch.Tensor,
    clear_until: int,
    dtype: str = DEVICE.dtype,
) -> None:
    """The answer's log-probabilities are those of an oracle, and its tokens the likeliest.

    Args:
        answer: what the engine gave for `prompt`; with `prompt_logprobs`, they are compared too.
        prompt: token ids.
        logprobs: [tokens, vocabulary], the oracle's for prompt + answer at every position.
        clear_until: positions from here on depend on a choice that float noise decides.
        dtype: of the engine.
    """
    entries = answer.prompt_logprobs + answer.logprobs
    first = len(prompt) - 1 - len(answer.prompt_logprobs)
    assert first in (0, len(prompt) - 1)
    differences = [
        abs(value - float(logprobs[position, token]))
        for position, entry in enumerate(entries, start=first)
        if position < clear_until
        for token, value in entry.items()
    ]
    if differences:
        assert_close(differences, dtype)
    for position, token in enumerate(answer.tokens, start=len(prompt) - 1):
        if position < clear_until:
            best = logprobs[position].max()
            assert float(best - logprobs[position, token]) < TOLERANCE[dtype].worst
