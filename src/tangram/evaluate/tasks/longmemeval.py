"""Files of LongMemEval: a history of chat sessions, one question about it."""

from __future__ import annotations

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
from tangram.evaluate.tasks.scoring import normalised_contained

UNSCORED_TYPES = ("single-session-preference",)
"""Question types whose answer is a rubric."""

_ALSO = re.compile(
    r"(?P<first>.+)\.\s+(?P<other>[^.]+?)(?:\s*\([^()]*\))?\s+(?:is|are) also acceptable\.?"
)
_INTRODUCTION = (
    "These are our past chat sessions, each with its date. I will ask you a question that they "
    "answer."
)


class LongMemEval(Task):
    """`longmemeval_oracle.json`, `longmemeval_s.json` or another file of that form.

    The benchmark has a language model judge the answers. Here an answer counts as right if it
    contains the expected one, which is stricter; rubrics, which cannot be found in an answer, and
    unanswerable questions (`_abs`), which a lost context answers best, are left out.

    Source: LongMemEval (2410.10813).
    """

    name = "longmemeval"
    reads_file = True
    max_answer_tokens = 128

    def __init__(self, path: Path) -> None:
        self.path = path

    def dialogues(self, sizes: Sizes, measure: Measure) -> list[Dialogue]:
        """See `Task.dialogues`; the file's first scored records, one question each."""
        records = (
            record
            for record in read_records(self.path, "LongMemEval")
            if record.get("question_type", str) not in UNSCORED_TYPES
            and not record.get("question_id", str).endswith("_abs")
        )
        return [_dialogue(record) for record in islice(records, sizes.conversations)]

    def score(self, question: Question, answer: str) -> float:
        """1 if the answer contains the expected one, case, articles and punctuation aside."""
        return normalised_contained(answer, question.expected)


def _dialogue(record: Record) -> Dialogue:
    sessions = record.get("haystack_sessions", list)
    dates = record.get("haystack_dates", list)
    if len(sessions) != len(dates):
        raise ConfigurationError(
            f"{record.where}: {len(sessions)} haystack_sessions and {len(dates)} haystack_dates"
        )
    parts = [_INTRODUCTION]
    for number, (date, session) in enumerate(zip(dates, sessions, strict=True), start=1):
        lines = [f"Session {number}, {date}"]
        for message in session if isinstance(session, list) else [session]:
            said = record.inner(message, f"a message of session {number}")
            lines.append(f"{said.get('role', str)}: {said.get('content', str)}")
        parts.append("\n".join(lines))
    answer = record.answer(record.get("answer", str, int, float))
    text = (
        f"Today is {record.get('question_date', str)}. {record.get('question', str)} "
        "Answer in a few words."
    )
    expected = tuple(map(record.answer, _accepted(answer)))
    question = Question(record.get("question_id", str), text, expected[0], expected)
    return Dialogue("\n\n".join(parts), ACKNOWLEDGEMENT, (question,))


def _accepted(answer: str) -> tuple[str, ...]:
    """`7 days. 8 days (including the last day) is also acceptable.` is two answers."""
    others: list[str] = []
    while found := _ALSO.fullmatch(answer.strip()):
        answer, others = found["first"], [found["other"], *others]
    return answer, *others
