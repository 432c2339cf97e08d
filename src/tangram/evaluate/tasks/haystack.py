"""Texts made by this project in which facts are told at random depths among filler."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import product

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
_NEEDLE = "The access number of {key} is {number}."
_INTRODUCTION = (
    "Read the following text carefully. Access numbers are hidden in it, and I will ask you "
    "about them afterwards."
)


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


class NeedleTask(Task):
    """Numbers that belong to names; a subclass says how many there are, and how many are asked for.

    Attributes:
        numbers_per_key: numbers of a name.
    """

    numbers_per_key: int = 1
    max_answer_tokens = 128

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
            number_dialogue(
                random.Random(f"{self.name}/{sizes.seed}/{number}"),
                sizes,
                measure,
                self.name,
                keys=keys,
                asked=asked,
                numbers_per_key=self.numbers_per_key,
            )
            for number in range(sizes.conversations)
        ]

    def score(self, question: Question, answer: str) -> float:
        """Share of the numbers that the answer contains."""
        return share_contained(answer, question.expected)


def number_dialogue(
    rng: random.Random,
    sizes: Sizes,
    measure: Measure,
    task: str,
    *,
    keys: int,
    asked: int,
    numbers_per_key: int,
) -> Dialogue:
    """A conversation about numbers that belong to names.

    Args:
        rng: draws everything.
        sizes: of the conversation.
        measure: its length in the model's tokens.
        task: name of the task, for the error.
        keys: names that are told.
        asked: how many of them are asked for, each in its own turn.
        numbers_per_key: numbers of a name, each told on its own.
    """
    table: dict[str, list[str]] = {}
    all_numbers = iter(numbers(rng, keys * numbers_per_key))
    for name in names(rng, keys):
        table[name] = [next(all_numbers) for _ in range(numbers_per_key)]
    needles = [
        (rng.random(), _NEEDLE.format(key=key, number=number))
        for key, values in table.items()
        for number in values
    ]
    questions = tuple(_number_question(key, table[key]) for key in rng.sample(list(table), asked))
    filler = Sentences(rng)

    def build(units: int) -> Dialogue:
        text = " ".join(bury(needles, filler.first(units)))
        return Dialogue(f"{_INTRODUCTION}\n\n{text}", ACKNOWLEDGEMENT, questions)

    return build(fit_units(lambda units: measure(build(units)), sizes.limit_tokens, task))


def _number_question(key: str, values: list[str]) -> Question:
    if len(values) == 1:
        text = f"What is the access number of {key}? Answer with the number only."
    else:
        text = (
            f"What are all the access numbers of {key}? The text tells {len(values)} of them. "
            "Answer with the numbers only, separated by commas."
        )
    return Question(key, text, ", ".join(values), tuple(values))
