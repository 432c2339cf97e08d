"""Files of SCBench: one long context, several questions about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from tangram.evaluate.tasks.scoring import (
    any_contained,
    character_f1,
    chosen_letter,
    first_number,
    letter_or_contained,
    share_contained,
)

LETTERS = "ABCD"


@dataclass(frozen=True)
class _Subset:
    """How a part of the benchmark is asked and scored."""

    introduction: str
    max_answer_tokens: int
    score: Callable[[str, Sequence[str]], float]


def _exactly_contained(answer: str, expected: Sequence[str]) -> float:
    return float(expected[0] in answer)


_JSON = "Here is a JSON object. I will ask you for the values of some of its keys."
_BOOK = "Read this book. I will ask you questions about it; answer them very briefly."

SUBSETS: Mapping[str, _Subset] = {
    "kv": _Subset(_JSON, 150, _exactly_contained),
    "prefix_suffix": _Subset("", 150, _exactly_contained),
    "vt": _Subset("", 30, share_contained),
    "qa_eng": _Subset(_BOOK, 40, any_contained),
    "qa_chn": _Subset(_BOOK, 40, character_f1),
    "choice_eng": _Subset(
        "Read this book. I will ask you questions about it; answer with the letter of the right "
        "option.",
        40,
        lambda answer, expected: chosen_letter(answer, *expected),
    ),
    "many_shot": _Subset("", 10, letter_or_contained),
    "mf": _Subset("Here is a list of numbers. I will ask you about it.", 5, first_number),
}
"""The parts whose scores are functions of the answer's text, by the name in the file's name."""


class SCBench(Task):
    """A file of the benchmark, named as it is there: `scbench_kv.jsonl`, `scbench_mf.jsonl` ...

    Records hold `context` and `multi_turns`, a list of `input` and `answer` (and `options`). The
    scores are those of the benchmark, but that a letter in a word or an article is no answer, and
    that a number has a sign. Of parts that need a summary's or a function's similarity (summary,
    repoqa, and the mixed ones) there are none here, and they are refused.

    Source: SCBench (2412.10319).
    """

    name = "scbench"
    reads_file = True

    def __init__(self, path: Path) -> None:
        stem = path.stem.removeprefix("scbench_")
        if "summary" in stem or "repoqa" in stem:
            raise ConfigurationError(
                f"--tasks scbench:{path}: this part is scored by the similarity of texts or of "
                f"functions, which is not supported; take one of {', '.join(SUBSETS)}"
            )
        part = max((name for name in SUBSETS if stem.startswith(name)), key=len, default=None)
        if part is None:
            raise ConfigurationError(
                f"--tasks scbench:{path}: the file's name tells which part of SCBench it is, and "
                f"this one tells none; name it scbench_PART.jsonl with one of {', '.join(SUBSETS)}"
            )
        self.path = path
        self.part = part
        self.max_answer_tokens = SUBSETS[part].max_answer_tokens

    def dialogues(self, sizes: Sizes, measure: Measure) -> list[Dialogue]:
        """See `Task.dialogues`; the file's first records and the first questions of each."""
        records = read_records(self.path, f"SCBench ({self.part})")
        return [
            self._dialogue(record, sizes.questions)
            for record in islice(records, sizes.conversations)
        ]

    def _dialogue(self, record: Record, questions: int) -> Dialogue:
        context = record.get("context", str, list)
        introduction = SUBSETS[self.part].introduction
        turns = record.get("multi_turns", list)[:questions]
        if not turns:
            raise ConfigurationError(f"{record.where}: 'multi_turns' is empty: it has no question")
        asked = [
            self._question(record.inner(turn, f"question {number}"), f"{record.where}/{number}")
            for number, turn in enumerate(turns)
        ]
        text = f"{introduction}\n\n{context}" if introduction else str(context)
        return Dialogue(text, ACKNOWLEDGEMENT, tuple(asked))

    def _question(self, turn: Record, name: str) -> Question:
        text = turn.get("input", str)
        found = turn.get("answer", str, int, float, list)
        answers = [turn.answer(one) for one in (found if isinstance(found, list) else [found])]
        if not answers:
            raise ConfigurationError(f"{turn.where}: 'answer' is an empty list")
        if self.part == "choice_eng":
            options = [turn.answer(one, "an option") for one in turn.get("options", list)]
            letter, option = _right_option(turn, answers[0], options)
            listed = zip(LETTERS, options, strict=False)
            text = "\n".join([text, *(f"{mark}. {one}" for mark, one in listed)])
            return Question(name, text, letter, (letter, option))
        if self.part == "mf" and not _is_number(answers[0]):
            raise ConfigurationError(f"{turn.where}: 'answer' is {answers[0]!r}, not a number")
        return Question(name, text, ", ".join(answers), tuple(answers))

    def score(self, question: Question, answer: str) -> float:
        """The benchmark's score for this part, stricter where the class says so."""
        return SUBSETS[self.part].score(answer, question.expected)


def _right_option(turn: Record, answer: str, options: Sequence[str]) -> tuple[str, str]:
    """(letter, text) of the option that is the answer, which is published as the one or the other.

    Raises:
        ConfigurationError: it is none of the options.
    """
    letters = LETTERS[: len(options)]
    if len(options) <= len(LETTERS):
        if answer in options:
            return letters[options.index(answer)], answer
        if len(answer) == 1 and answer in letters:
            return answer, options[letters.index(answer)]
    raise ConfigurationError(
        f"{turn.where}: 'answer' is neither one of up to {len(LETTERS)} 'options' nor its letter"
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
