"""Next-token distributions of whole texts, read off an engine, and how far two of them diverge.

A distribution is kept as the final hidden state from which the model computes it: a few thousand
numbers instead of a vocabulary. Log-probabilities exist for a few positions at a time only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import vllm
from torch import Tensor, nn

from tangram.engines.gathering import Gathering
from tangram.engines.llm import LLM as CompressedLLM
from tangram.engines.process import free_memory, in_this_process
from tangram.engines.swapping import swap_budgets
from tangram.errors import UnsupportedError
from tangram.geometry import HeadGroups

MAX_TEXTS = 64
"""Texts that the engine runs together, at most."""
POSITIONS_AT_ONCE = 128
"""Positions whose log-probabilities over the vocabulary are in memory together."""


class ReadingEngine:
    """An engine in this process that reads whole texts and tells its next-token distributions.

    Every text is computed whole in one step, many in a step as far as they fit, and nothing is
    taken from a prefix cache.

    Args:
        model: folder or name of the model.
        lengths: tokens of the texts that it will read.
        compression: keyword arguments of `tangram.LLM` about compression, or None for stock vLLM
            with full KV.
        tokens_at_once: tokens of a step; the longest text's if that is more.
        **options: further keyword arguments of `vllm.LLM`.
    """

    def __init__(
        self,
        model: str,
        lengths: Sequence[int],
        *,
        compression: Mapping[str, Any] | None,
        tokens_at_once: int,
        **options: Any,
    ) -> None:
        longest = max(lengths) + 1
        self._tokens_at_once = max(longest, tokens_at_once)
        make: Any = vllm.LLM if compression is None else CompressedLLM
        with in_this_process():
            self._llm = make(
                model,
                **{
                    "max_model_len": longest,
                    "max_num_seqs": min(len(lengths), MAX_TEXTS),
                    **options,
                    "max_num_batched_tokens": self._tokens_at_once,
                    "enable_prefix_caching": False,
                    "enforce_eager": True,
                    **(compression or {}),
                },
            )
        self._model: Any = self._llm.apply_model(lambda module: module)[0]

    def swap_budgets(self, head_groups: HeadGroups) -> None:
        """Read with other budgets from now on; see `swap.swap_budgets`."""
        swap_budgets(self._llm, head_groups)

    def states(
        self, samples: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """The model's final hidden states at chosen positions of texts.

        Args:
            samples: token ids of each text.
            positions: positions of each text whose states are wanted.

        Returns:
            For each text [positions, hidden], on the engine's device, in its dtype.

        Raises:
            UnsupportedError: a model that does not give one final state for every token.
        """
        gathering = Gathering(samples, positions)

        def after_model(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or kwargs.get("input_ids") is None:
                raise UnsupportedError(
                    f"{type(module).__name__} does not give one final state for every token: "
                    "budgets cannot be measured for it; choose another --compression-level"
                )
            tokens = kwargs["input_ids"].tolist()
            position = kwargs["positions"].reshape(-1, len(tokens))[0].tolist()
            gathering.add(tokens, position, output)

        handle = self._model.register_forward_hook(after_model, with_kwargs=True)
        try:
            for step in self._steps(gathering.texts):
                self._llm.generate(
                    [{"prompt_token_ids": list(text)} for text in step],
                    vllm.SamplingParams(max_tokens=1, temperature=0, detokenize=False),
                    use_tqdm=False,
                )
        finally:
            handle.remove()
        return gathering.states()

    def _steps(self, texts: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Texts in their order, as many at a time as one step computes without cutting any."""
        step: list[tuple[int, ...]] = []
        for text in texts:
            if step and sum(map(len, step)) + len(text) > self._tokens_at_once:
                yield step
                step = []
            step.append(text)
        yield step

    @torch.no_grad()
    def divergence(self, full: Tensor, other: Tensor) -> float:
        """Mean over positions of KL(full || other) of the next token's distributions, in nats.

        Args:
            full: [positions, hidden], final states of the reference; any device.
            other: [positions, hidden], of the model in this engine.
        """
        total = 0.0
        for logits in self._logits(full, other):
            p, q = (part.log_softmax(dim=-1) for part in logits)
            # Logits of -inf are so in both, and count for nothing.
            terms = torch.where(p.isneginf(), 0.0, p.exp() * (p - q))
            total += float(terms.sum())
        # Rounding can leave equal distributions a little below 0.
        return max(total, 0.0) / len(full)

    @torch.no_grad()
    def agreement(self, full: Tensor, other: Tensor) -> float:
        """Share of positions whose likeliest next token is the same; arguments as `divergence`."""
        same = 0
        for p, q in self._logits(full, other):
            same += int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
        return same / len(full)

    def _logits(self, full: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Float32 logits of both, a few positions at a time."""
        for mine, theirs in zip(
            full.split(POSITIONS_AT_ONCE), other.split(POSITIONS_AT_ONCE), strict=True
        ):
            p, q = (
                self._model.compute_logits(states.to(other.device)).float()
                for states in (mine, theirs)
            )
            yield p, q

    def close(self) -> None:
        """Give the engine's memory back."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._model, self._llm
        free_memory()
