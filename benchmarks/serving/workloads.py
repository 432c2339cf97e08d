"""Conversations that users have with a server: their turns, lengths and pauses, from a seed.

A conversation begins with a system prompt that others share, then a text of its own; each turn
brings new tokens of the user, and every turn's prompt is the whole history with the server's own
answers. docs/serving-benchmarks.md tells where the lengths come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

FIRST_TOKEN_ID = 10
"""Lower ids are special tokens in many vocabularies."""
_SYSTEM_STREAM, _CONVERSATION_STREAM, _ARRIVAL_STREAM = range(3)


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths in tokens, cut to bounds.

    Attributes:
        median: of the distribution before the cut.
        sigma: deviation of its logarithm; 0 always gives the median.
        low: least length.
        high: greatest length.
    """

    median: float
    sigma: float
    low: int
    high: int

    def draw(self, rng: np.random.Generator) -> int:
        """One length."""
        drawn = self.median * math.exp(self.sigma * rng.standard_normal())
        return int(min(max(round(drawn), self.low), self.high))

    def scaled(self, factor: float) -> Lengths:
        """All lengths times a factor, one token at least."""
        low = max(1, round(self.low * factor))
        high = max(low, round(self.high * factor))
        return replace(self, median=self.median * factor, low=low, high=high)


@dataclass(frozen=True)
class Workload:
    """What conversations look like.

    Attributes:
        name: of the workload.
        system_tokens: length of a system prompt.
        systems: different system prompts; conversations share them in turn.
        context: the text that the first turn brings (a document, a code base; 0 tokens for none).
        question: what the user, or a tool, adds each turn.
        answer: output tokens of a turn.
        turns: fewest and most turns, drawn uniformly.
        think_s: mean of the pause before each later turn, exponentially distributed.
        limit_tokens: a conversation ends before a turn that would pass it.
    """

    name: str
    system_tokens: int
    systems: int
    context: Lengths
    question: Lengths
    answer: Lengths
    turns: tuple[int, int]
    think_s: float
    limit_tokens: int

    def __post_init__(self) -> None:
        if self.limit_tokens < self.longest_first_turn:
            raise ValueError(
                f"workload {self.name}: a first turn takes up to {self.longest_first_turn} tokens, "
                f"above the limit of {self.limit_tokens}"
            )

    @property
    def longest_first_turn(self) -> int:
        """Tokens of the longest first turn, its answer included."""
        own = self.context.high + self.question.high + self.answer.high
        return self.system_tokens + own

    @property
    def mean_turns(self) -> float:
        """Turns of a conversation that no limit ends."""
        return sum(self.turns) / 2

    def scaled(self, factor: float) -> Workload:
        """The same conversations with all lengths times a factor, for small models and tests."""
        if factor == 1:
            return self
        system = round(self.system_tokens * factor)
        parts = {name: getattr(self, name).scaled(factor) for name in _PARTS}
        longest = system + sum(part.high for part in parts.values())
        limit = max(round(self.limit_tokens * factor), longest)
        return replace(self, system_tokens=system, limit_tokens=limit, **parts)


_PARTS = ("context", "question", "answer")
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            name="short",
            system_tokens=1_000,
            systems=4,
            context=Lengths(4_000, 0.7, 500, 12_000),
            question=Lengths(150, 0.8, 20, 600),
            answer=Lengths(300, 0.5, 32, 800),
            turns=(4, 8),
            think_s=5.0,
            limit_tokens=20_000,
        ),
        Workload(
            name="mid",
            system_tokens=1_000,
            systems=4,
            context=Lengths(40_000, 0.35, 20_000, 80_000),
            question=Lengths(150, 0.8, 20, 600),
            answer=Lengths(300, 0.5, 32, 800),
            turns=(4, 6),
            think_s=5.0,
            limit_tokens=100_000,
        ),
        Workload(
            name="long",
            system_tokens=1_000,
            systems=4,
            context=Lengths(108_000, 0.05, 100_000, 118_000),
            question=Lengths(150, 0.8, 20, 600),
            answer=Lengths(300, 0.5, 32, 800),
            turns=(4, 6),
            think_s=5.0,
            limit_tokens=130_000,
        ),
        Workload(
            name="agent",
            system_tokens=12_000,
            systems=2,
            context=Lengths(3_000, 0.6, 500, 12_000),
            question=Lengths(900, 1.0, 50, 6_000),
            answer=Lengths(200, 0.9, 20, 1_500),
            turns=(40, 40),
            think_s=1.0,
            limit_tokens=120_000,
        ),
    )
}


@dataclass(frozen=True)
class Turn:
    """One turn.

    Attributes:
        new_tokens: ids that the turn adds to the history before the server answers.
        answer_tokens: length of the answer.
        think_s: pause before it, after the last answer; 0 for the first.
        made_up_answer: ids that stand for the answer where the turn is past when play begins.
    """

    new_tokens: Sequence[int]
    answer_tokens: int
    think_s: float
    made_up_answer: Sequence[int]


@dataclass(frozen=True)
class Script:
    """A conversation before it is played.

    Attributes:
        number: of the conversation; with the seed it decides everything.
        turns: all of them; the first one's new tokens begin with the system prompt.
        begins_at: turn at which play begins. Those before count as answered by made-up tokens, so
            that users who start together are not all at the same turn.
    """

    number: int
    turns: tuple[Turn, ...]
    begins_at: int = 0


def make_script(
    workload: Workload, seed: int, number: int, vocab_size: int, *, joined: bool = False
) -> Script:
    """A conversation of a workload.

    Args:
        workload: whose lengths it has.
        seed: of the run.
        number: of the conversation; the same seed and number give the same one.
        vocab_size: token ids are below it.
        joined: whether play begins at a turn that is drawn, instead of the first.
    """
    rng = np.random.default_rng([_CONVERSATION_STREAM, seed, number])
    which = number % workload.systems
    system = _tokens(
        np.random.default_rng([_SYSTEM_STREAM, seed, which]), workload.system_tokens, vocab_size
    )
    turns: list[Turn] = []
    history = 0
    for index in range(int(rng.integers(workload.turns[0], workload.turns[1] + 1))):
        new = workload.question.draw(rng) + (0 if index else workload.context.draw(rng))
        answer = workload.answer.draw(rng)
        think_s = float(rng.exponential(workload.think_s)) if workload.think_s else 0.0
        history += new + answer + (0 if index else len(system))
        if history > workload.limit_tokens:
            break
        own = _tokens(rng, new, vocab_size)
        made_up = _tokens(rng, answer, vocab_size)
        turns.append(
            Turn(own if index else system + own, answer, think_s if index else 0.0, made_up)
        )
    begins_at = int(rng.integers(len(turns))) if joined else 0
    return Script(number, tuple(turns), begins_at)


def arrivals(rate_per_s: float, until_s: float, seed: int) -> list[float]:
    """Times at which conversations arrive: a Poisson process, whatever the server does.

    Args:
        rate_per_s: conversations a second.
        until_s: no arrival is later.
        seed: of the run.
    """
    rng = np.random.default_rng([_ARRIVAL_STREAM, seed])
    times: list[float] = []
    now = float(rng.exponential(1 / rate_per_s))
    while now <= until_s:
        times.append(now)
        now += float(rng.exponential(1 / rate_per_s))
    return times


def already_there(workload: Workload, rate_per_s: float) -> int:
    """Conversations that an open loop finds under way: as many as think at any time."""
    return round(rate_per_s * workload.think_s * (workload.mean_turns - 1))


def open_loop(
    workload: Workload, rate_per_s: float, until_s: float, seed: int
) -> list[tuple[float, bool]]:
    """(when its first turn is due, whether it was under way before) of every conversation.

    By number: those that are there at the start, spread over a pause, and then all that arrive.
    """
    there = already_there(workload, rate_per_s)
    spread_s = workload.think_s / max(1, there)
    found = [(number * spread_s, True) for number in range(there)]
    return found + [(moment, False) for moment in arrivals(rate_per_s, until_s, seed)]


def _tokens(rng: np.random.Generator, count: int, vocab_size: int) -> list[int]:
    found: list[int] = rng.integers(FIRST_TOKEN_ID, vocab_size, count).tolist()
    return found
