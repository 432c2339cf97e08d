"""The conversations of the bundled recall model."""

from __future__ import annotations

from dataclasses import dataclass

from tangram.conversations import KEYS, is_right, make_conversation
from tangram.errors import ConfigurationError
from tangram.evaluate.tasks.base import Dialogue, Measure, Question, Sizes, Task

MAX_FACTS = 100


@dataclass(frozen=True)
class Recall(Task):
    """Codes told among other sentences; an answer is the code alone, right or wrong as a whole.

    The recall model answers every turn with a code, so the first turn ends with a question too.
    Its answer is given, as an acknowledgement is, and not scored. All facts are told in it.

    Attributes:
        tokens_per_fact: a conversation of n tokens tells about n / `tokens_per_fact` facts, at
            least one a question and at most 100.
    """

    name = "recall"
    tokens_per_fact: int = 80
    max_answer_tokens: int = 16

    def dialogues(self, sizes: Sizes, measure: Measure) -> list[Dialogue]:
        """See `Task.dialogues`; `seed` is that of `make_conversation` for the first one."""
        turns = sizes.questions + 1
        if turns > len(KEYS):
            raise ConfigurationError(
                f"--questions is {sizes.questions}: task {self.name} has at most {len(KEYS) - 1}"
            )
        facts = max(turns, min(sizes.limit_tokens // self.tokens_per_fact, MAX_FACTS))
        made = []
        for number in range(sizes.conversations):
            try:
                talk = make_conversation(
                    sizes.seed + number, sizes.limit_tokens, facts, turns, later_share=0
                )
            except ConfigurationError as error:
                raise ConfigurationError(
                    f"--context-tokens is {sizes.limit_tokens}: {error}"
                ) from error
            first, *later = talk.turns
            questions = tuple(
                Question(f"{number}/{turn}", asked.user, asked.answer, (asked.answer,))
                for turn, asked in enumerate(later)
            )
            dialogue = Dialogue(first.user, first.answer, questions)
            if measure(dialogue) != talk.context_tokens:
                raise ConfigurationError(
                    f"--tasks {self.name} is the task of the bundled recall model, and this "
                    "model's tokenizer and chat template are not the recall model's: leave it "
                    "out; niah_multikey asks other models for the same"
                )
            made.append(dialogue)
        return made

    def score(self, question: Question, answer: str) -> float:
        """1 for the code and nothing else."""
        return float(is_right(answer, question.expected[0]))
