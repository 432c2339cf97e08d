"""Files of LoCoMo: a conversation of two people over months, questions about it."""

from __future__ import annotations

import random
import re
from itertools import islice
from pathlib import Path

from tangram.errors import ConfigurationError
from tangram.evaluate.tasks.base import (
    ACKNOWLEDGEMENT,
    Dialogue,
    Measure,
    Question,
    Sizes,
    Task,
)
from tangram.evaluate.tasks.records import Record, read_records
from tangram.evaluate.tasks.scoring import listed_word_f1, word_f1

MULTI_HOP, TEMPORAL, OPEN_DOMAIN, SINGLE_HOP = 1, 2, 3, 4
SCORED = (MULTI_HOP, TEMPORAL, OPEN_DOMAIN, SINGLE_HOP)
"""Categories of questions that have an answer; 5, the adversarial one, has none."""

_SESSION = re.compile(r"session_(\d+)")


class LoCoMo(Task):
    """`locomo10.json` or another file of that form.

    Scores are the benchmark's: F1 of words, in category 1 for each part between commas, in
    category 3 without what follows a semicolon; but words are compared whole, not by their stems.
    Unanswerable questions (category 5), and records that have no others, are left out: a lost
    context answers them best.

    Source: LoCoMo (2402.17753).
    """

    name = "locomo"
    reads_file = True
    max_answer_tokens = 32

    def __init__(self, path: Path) -> None:
        self.path = path

    def dialogues(self, sizes: Sizes, measure: Measure) -> list[Dialogue]:
        """See `Task.dialogues`; the file's first scored records, questions drawn by the seed."""
        scored = (
            (record, asked)
            for record in read_records(self.path, "LoCoMo")
            if (asked := _scored(record))
        )
        return [
            _dialogue(record, asked, sizes, number)
            for number, (record, asked) in enumerate(islice(scored, sizes.conversations))
        ]

    def score(self, question: Question, answer: str) -> float:
        """F1 of words."""
        rule = listed_word_f1 if question.kind == str(MULTI_HOP) else word_f1
        return rule(answer, question.expected[0])


def _scored(record: Record) -> list[tuple[int, Record]]:
    """The questions that have an answer, with their places among all.

    Raises:
        ConfigurationError: there is no question at all.
    """
    questions = [
        (index, record.inner(one, f"qa {index}"))
        for index, one in enumerate(record.get("qa", list))
    ]
    if not questions:
        raise ConfigurationError(f"{record.where}: 'qa' has no question of categories 1 to 4")
    return [(index, one) for index, one in questions if one.get("category", int) in SCORED]


def _dialogue(
    record: Record, asked: list[tuple[int, Record]], sizes: Sizes, number: int
) -> Dialogue:
    talk = record.inner(record.get("conversation", dict), "'conversation'")
    people = talk.get("speaker_a", str), talk.get("speaker_b", str)
    parts = [
        f"This is a conversation of {people[0]} and {people[1]} over many days. I will ask you "
        "questions about it."
    ]
    numbers = sorted(int(found[1]) for name in talk.fields if (found := _SESSION.fullmatch(name)))
    for session in numbers:
        lines = [talk.get(f"session_{session}_date_time", str)]
        for turn in talk.get(f"session_{session}", list):
            said = talk.inner(turn, f"a turn of session_{session}")
            caption = said.fields.get("blip_caption")
            shown = f" [shows {caption}]" if caption else ""
            lines.append(f"{said.get('speaker', str)}: {said.get('text', str)}{shown}")
        parts.append("\n".join(lines))
    rng = random.Random(f"locomo/{sizes.seed}/{number}")
    chosen = sorted(rng.sample(range(len(asked)), min(sizes.questions, len(asked))))
    name = record.fields.get("sample_id", number)
    questions = tuple(_question(asked[place][1], f"{name}/{asked[place][0]}") for place in chosen)
    return Dialogue("\n\n".join(parts), ACKNOWLEDGEMENT, questions)


def _question(record: Record, name: str) -> Question:
    category = record.get("category", int)
    answer = record.answer(record.get("answer", str, int, float))
    if category == OPEN_DOMAIN:
        answer = record.answer(answer.split(";")[0].strip())
    text = (
        f"{record.get('question', str)} Answer with a short phrase, in words of the conversation "
        "where you can."
    )
    return Question(name, text, answer, (answer,), str(category))
