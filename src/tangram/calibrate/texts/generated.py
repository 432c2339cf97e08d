"""The built-in samples: conversations about notes, code and lists, drawn from a seed.

A conversation begins with material, goes on with questions about it, and has more material come
in between, so that later turns look back both far and near. Nothing is downloaded.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tangram.calibrate.texts import materials
from tangram.calibrate.texts.materials import fill
from tangram.calibrate.texts.phrases import ACKNOWLEDGEMENTS, ASIDES, MORE, OPENERS, REMARKS
from tangram.calibrate.texts.samples import Encoder, Sample, Text, spread_lengths
from tangram.errors import ConfigurationError

_PROSE = (materials.notes, materials.notes, materials.letter)
_CODE = (materials.python_module, materials.python_module, materials.settings)
_LISTS = (materials.table, materials.log, materials.agenda)
_RECORDS = (materials.records,)
_MATERIALS = {
    "dialogue": _PROSE,
    "records": _RECORDS,
    "code": _CODE,
    "table": _LISTS,
    "mixed": _PROSE + _CODE + _LISTS + 3 * _RECORDS,
}
KINDS = tuple(_MATERIALS)

_FIRST_SHARE = 0.6
_MESSAGE_TOKENS = 8
"""Allowance for what a chat template adds to a message."""


def make_text(seed: int, kind: str, num_tokens: int, count: Callable[[str], int]) -> Text:
    """A conversation drawn from `seed`; the same arguments always give the same one.

    Args:
        seed: any integer.
        kind: one of `KINDS`.
        num_tokens: length of the whole, about; its last exchange goes past it.
        count: tokens of a piece of text.
    """
    rng = random.Random(f"{kind} {seed}")
    open_questions: list[tuple[str, str]] = []

    def material() -> str:
        block = rng.choice(_MATERIALS[kind])(rng)
        open_questions.extend(block.questions)
        return block.text

    def question() -> tuple[str, str]:
        return open_questions.pop(rng.randrange(len(open_questions)))

    parts = [rng.choice(OPENERS[kind])]
    while not open_questions or sum(map(count, parts)) < _FIRST_SHARE * num_tokens:
        parts.append(material())
    exchanges = [("\n\n".join(parts), fill(rng, rng.choice(ACKNOWLEDGEMENTS)))]
    tokens = 0
    while True:
        tokens += sum(count(content) + _MESSAGE_TOKENS for content in exchanges[-1])
        if tokens >= num_tokens and len(exchanges) > 1:
            break
        if rng.random() < 0.1:
            exchanges.append((fill(rng, rng.choice(ASIDES)), fill(rng, rng.choice(REMARKS))))
        elif not open_questions or rng.random() < 0.25:
            told = f"{rng.choice(MORE)}\n\n{material()}"
            asked, answer = question()
            exchanges.append((f"{told}\n\n{asked}", answer))
        else:
            exchanges.append(question())
    messages = [
        {"role": role, "content": content}
        for exchange in exchanges
        for role, content in zip(("user", "assistant"), exchange, strict=True)
    ]
    return Text(kind, tuple(messages))


def builtin_samples(encoder: Encoder, count: int, least_tokens: int, seed: int) -> list[Sample]:
    """Samples of all kinds in turn, of lengths spread from the least to the encoder's most.

    Raises:
        ConfigurationError: the tokenizer has no tokens for such text.
    """
    samples = []
    for number, length in enumerate(spread_lengths(count, least_tokens, encoder.max_tokens)):
        kind = KINDS[number % len(KINDS)]
        # The last exchange goes past the length; the encoder cuts at its most.
        text = make_text(seed * 10**6 + number, kind, length, encoder.count)
        samples.append(encoder.encode(text))
    unknown = sum(map(encoder.count_unknown, samples))
    total = sum(len(sample.token_ids) for sample in samples)
    if unknown > 0.01 * total:
        raise ConfigurationError(
            f"the model's tokenizer does not know {unknown} of {total} tokens of the built-in "
            "samples, which are English, code and lists: give --data with texts of the model's own"
        )
    return samples
