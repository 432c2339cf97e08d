"""Texts made by this project in which facts are told at random depths among filler."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

from tangram.conversations import FILLER, KEYS, SLOTS
from tangram.errors import ConfigurationError
from tangram.evaluate.tasks.base import (
    ACKNOWLEDGEMENT,
    Dialogue,
    Measure,
    Question,
    Sizes,
    Task,
    fit_units,
)
from tangram.evaluate.tasks.scoring import share_contained

NUMBER_DIGITS = 7
MAX_NAMES = len(SLOTS["adjective"]) * len(KEYS)

_SLOT = re.compile(r"\{(\w+)\}")


class Units(Protocol):
    """Filler in units that are taken in order."""

    def first(self, count: int) -> Sequence[str]:
        """The first units, the same for every count; fewer where there are no more."""


Filler = Callable[[random.Random], Units]
"""Draws the filler of a conversation."""


class Sentences:
    """Filler without end: the first n sentences are the same for every n."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._made: list[str] = []

    def first(self, count: int) -> list[str]:
        """That many sentences."""
        while len(self._made) < count:
            pattern = self._rng.choice(FILLER)
            text = _SLOT.sub(lambda slot: self._rng.choice(SLOTS[slot[1]]), pattern)
            self._made.append(text.capitalize())
        return self._made[:count]


def names(rng: random.Random, count: int) -> list[str]:
    """Names that differ, each an adjective and a noun with a hyphen; `MAX_NAMES` at most."""
    pairs = [f"{adjective}-{noun}" for adjective, noun in product(SLOTS["adjective"], KEYS)]
    return rng.sample(pairs, count)


def numbers(rng: random.Random, count: int) -> list[str]:
    """Numbers of 7 digits that differ."""
    lowest = 10 ** (NUMBER_DIGITS - 1)
    return [str(number) for number in rng.sample(range(lowest, 10 * lowest), count)]


def bury(needles: Sequence[tuple[float, str]], sentences: Sequence[str]) -> list[str]:
    """The sentences with the needles among them.

    Args:
        needles: pairs of a depth, from 0 to 1, and a text; those of one depth keep their order.
        sentences: filler.
    """
    parts = [(index / max(len(sentences), 1), text) for index, text in enumerate(sentences)]
    return [text for _, text in sorted([*needles, *parts], key=lambda part: part[0])]


@dataclass(frozen=True)
class Wording:
    """How values that belong to names are told and asked for.

    Attributes:
        kind: what the values are.
        introduction: what the context begins with.
        told: patterns with `{key}` and `{value}`; every value is told by one of them.
        asked: patterns with `{key}`, which ask for the only value of a name.
        asked_all: patterns with `{key}` and `{count}`, which ask for all of several.
        keys: draws so many names that differ.
        values: draws so many values, none of which is part of another.
    """

    kind: str
    introduction: str
    told: tuple[str, ...]
    asked: tuple[str, ...]
    asked_all: tuple[str, ...]
    keys: Callable[[random.Random, int], list[str]]
    values: Callable[[random.Random, int], list[str]]


ACCESS_NUMBERS = Wording(
    kind="access number",
    introduction=(
        "Read the following text carefully. Access numbers are hidden in it, and I will ask you "
        "about them afterwards."
    ),
    told=("The access number of {key} is {value}.",),
    asked=("What is the access number of {key}? Answer with the number only.",),
    asked_all=(
        "What are all the access numbers of {key}? The text tells {count} of them. "
        "Answer with the numbers only, separated by commas.",
    ),
    keys=names,
    values=numbers,
)


@dataclass(frozen=True)
class NeedleTask(Task):
    """Values that belong to names; a subclass says how many there are, and how many are asked for.

    Attributes:
        numbers_per_key: values of a name.
        wordings: that conversations take in turn.
        filler: what the values are told among.
    """

    max_answer_tokens = 128

    numbers_per_key: int = 1
    wordings: tuple[Wording, ...] = (ACCESS_NUMBERS,)
    filler: Filler = Sentences

    def counts(self, questions: int) -> tuple[int, int]:
        """(names that are told, names that are asked for) where so many questions are wanted."""
        raise NotImplementedError

    def dialogues(self, sizes: Sizes, measure: Measure) -> list[Dialogue]:
        """See `Task.dialogues`."""
        keys, asked = self.counts(sizes.questions)
        if keys > MAX_NAMES:
            raise ConfigurationError(
                f"--questions is {sizes.questions}: task {self.name} has names for "
                f"{MAX_NAMES * sizes.questions // keys}; ask fewer"
            )
        return [
            self._dialogue(number, sizes, measure, keys, asked)
            for number in range(sizes.conversations)
        ]

    def _dialogue(
        self, number: int, sizes: Sizes, measure: Measure, keys: int, asked: int
    ) -> Dialogue:
        """A conversation that tells of `keys` names and asks for some, each in its own turn."""
        seed = f"{self.name}/{sizes.seed}/{number}"
        rng, words = random.Random(seed), random.Random(f"{seed}/words")
        wording = self.wordings[number % len(self.wordings)]
        table: dict[str, list[str]] = {}
        values = iter(wording.values(rng, keys * self.numbers_per_key))
        for name in wording.keys(rng, keys):
            table[name] = [next(values) for _ in range(self.numbers_per_key)]
        needles = [
            (rng.random(), words.choice(wording.told).format(key=key, value=value))
            for key, of_key in table.items()
            for value in of_key
        ]
        questions = tuple(
            _question(words, wording, key, table[key]) for key in rng.sample(list(table), asked)
        )
        filler = self.filler(rng)

        def build(units: int) -> Dialogue:
            text = " ".join(bury(needles, filler.first(units)))
            return Dialogue(f"{wording.introduction}\n\n{text}", ACKNOWLEDGEMENT, questions)

        return build(fit_units(lambda units: measure(build(units)), sizes.limit_tokens, self.name))

    def score(self, question: Question, answer: str) -> float:
        """Share of the values that the answer contains."""
        return share_contained(answer, question.expected)


def _question(rng: random.Random, wording: Wording, key: str, values: list[str]) -> Question:
    patterns = wording.asked if len(values) == 1 else wording.asked_all
    text = rng.choice(patterns).format(key=key, count=len(values))
    return Question(key, text, ", ".join(values), tuple(values), wording.kind)
