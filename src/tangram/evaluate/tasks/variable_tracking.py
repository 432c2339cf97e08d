"""Variables that take their value from one another, far apart."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass

from tangram.evaluate.tasks.base import (
    ACKNOWLEDGEMENT,
    Dialogue,
    Measure,
    Question,
    Sizes,
    Task,
    fit_units,
)
from tangram.evaluate.tasks.haystack import Filler, Sentences, bury, numbers
from tangram.evaluate.tasks.scoring import share_contained

NAME_LETTERS = 5


def variables(rng: random.Random, count: int) -> list[str]:
    """Names that differ, of capital letters."""
    made: dict[str, None] = {}
    while len(made) < count:
        made["".join(rng.choices(string.ascii_uppercase, k=NAME_LETTERS))] = None
    return list(made)


@dataclass(frozen=True)
class ChainWording:
    """How chains are told and asked for.

    Attributes:
        kind: what the chains are of.
        introduction: what the context begins with.
        first: pattern with `{name}` and `{value}`, a chain's first line.
        link: pattern with `{name}` and `{source}`, the name that it takes its value from.
        asked: patterns with `{value}` and `{count}`, which ask for the names of a chain.
        names: draws so many names, none of which is part of another.
        values: draws so many values that differ.
    """

    kind: str
    introduction: str
    first: str
    link: str
    asked: tuple[str, ...]
    names: Callable[[random.Random, int], list[str]]
    values: Callable[[random.Random, int], list[str]] = numbers


VARIABLES = ChainWording(
    kind="variable",
    introduction=(
        "Read the following text carefully. Variables are set in it, and I will ask you about "
        "their values afterwards."
    ),
    first="VAR {name} = {value}.",
    link="VAR {name} = VAR {source}.",
    asked=(
        "Which variables have the value {value}, be it through other variables? There are "
        "{count}. Answer with their names only, separated by commas.",
    ),
    names=variables,
)


@dataclass(frozen=True)
class VariableTracking(Task):
    """A chain sets a variable to a number, a second to the first, and so on: who has the number?

    Every question asks for the chain of one number. The lines of a chain stand in order, with
    filler and lines of the other chains between them.

    Source: after RULER's variable tracking (2404.06654), with this project's own texts.

    Attributes:
        hops: variables of a chain after its first.
        wordings: that conversations take in turn.
        filler: what the lines stand among.
    """

    name = "variable_tracking"
    hops: int = 4
    max_answer_tokens: int = 64
    wordings: tuple[ChainWording, ...] = (VARIABLES,)
    filler: Filler = Sentences

    def dialogues(self, sizes: Sizes, measure: Measure) -> list[Dialogue]:
        """See `Task.dialogues`."""
        return [self._dialogue(number, sizes, measure) for number in range(sizes.conversations)]

    def _dialogue(self, number: int, sizes: Sizes, measure: Measure) -> Dialogue:
        seed = f"{self.name}/{sizes.seed}/{number}"
        rng, words = random.Random(seed), random.Random(f"{seed}/words")
        wording = self.wordings[number % len(self.wordings)]
        names = iter(wording.names(rng, sizes.questions * (self.hops + 1)))
        lines: list[tuple[float, str]] = []
        questions = []
        for value in wording.values(rng, sizes.questions):
            chain = [next(names) for _ in range(self.hops + 1)]
            depths = sorted(rng.random() for _ in chain)
            told = [wording.first.format(name=chain[0], value=value)] + [
                wording.link.format(name=name, source=source)
                for source, name in zip(chain, chain[1:], strict=False)
            ]
            lines += zip(depths, told, strict=True)
            text = words.choice(wording.asked).format(value=value, count=len(chain))
            questions.append(Question(value, text, ", ".join(chain), tuple(chain), wording.kind))
        filler = self.filler(rng)

        def build(units: int) -> Dialogue:
            text = " ".join(bury(lines, filler.first(units)))
            return Dialogue(f"{wording.introduction}\n\n{text}", ACKNOWLEDGEMENT, tuple(questions))

        units = fit_units(lambda units: measure(build(units)), sizes.limit_tokens, self.name)
        return build(units)

    def score(self, question: Question, answer: str) -> float:
        """Share of the chain's variables that the answer contains."""
        return share_contained(answer, question.expected)
