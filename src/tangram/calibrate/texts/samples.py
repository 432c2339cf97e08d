"""Samples: texts as token ids, and the positions at which later answers are generated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from tangram.errors import ConfigurationError, TextError
from tangram.templates import fixed_clock

Messages = Sequence[dict[str, str]]
Render = Callable[[Messages, bool], str]
"""(messages, whether an answer is to follow) -> the text."""


@dataclass(frozen=True)
class Text:
    """What a sample is made from: a conversation, or plain text.

    Attributes:
        kind: what it is, in a word.
        messages: turns with `role` and `content`; empty for plain text.
        plain: the text, where it is no conversation.
        where: file and line that it came from, for errors.
    """

    kind: str
    messages: tuple[dict[str, str], ...] = ()
    plain: str = ""
    where: str = "the built-in samples"


@dataclass(frozen=True)
class Sample:
    """A text in tokens.

    Attributes:
        kind: of the text.
        token_ids: the text.
        later: positions, rising, whose next token belongs to a later answer or ends it: to an
            assistant's message after the first, or to the only one. Empty for plain text.
    """

    kind: str
    token_ids: tuple[int, ...]
    later: tuple[int, ...]

    def measured_positions(self, first: int = 0) -> tuple[int, ...]:
        """Positions whose next-token distributions tell what was lost.

        The later answers', or the last eighth's of a text without any.

        Args:
            first: that counts; what comes before the first boundary sees everything.
        """
        tokens = len(self.token_ids)
        later = tuple(position for position in self.later if position >= first)
        return later or tuple(range(tokens - max(1, tokens // 8), tokens))


class Encoder:
    """From texts to samples, in the model's own chat format.

    Without a chat template a conversation is written as "User: ..." and "Assistant: ..." in
    paragraphs of their own, with the tokens that the tokenizer puts around any text.

    Args:
        tokenizer: of the transformers library.
        max_tokens: longer samples lose their end.
    """

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self._clock = fixed_clock(tokenizer)
        self.max_tokens = max_tokens

    def count(self, text: str) -> int:
        """Tokens of a piece of text, without those around a whole one."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def count_unknown(self, sample: Sample) -> int:
        """Tokens that stand for text that the tokenizer has none for."""
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        return 0 if unknown is None else sample.token_ids.count(unknown)

    def encode(self, text: Text) -> Sample:
        """The sample of a text.

        Raises:
            TextError: the chat template does not take the conversation; names its place.
        """
        templated = bool(text.messages) and bool(getattr(self.tokenizer, "chat_template", None))
        render = self._templated if templated else _written_out
        rendered = self._whole(text, render) if text.messages else text.plain
        offsets_known = bool(getattr(self.tokenizer, "is_fast", False))
        encoded = self.tokenizer(
            rendered, add_special_tokens=not templated, return_offsets_mapping=offsets_known
        )
        ids = tuple(encoded["input_ids"])[: self.max_tokens]
        if offsets_known:
            ends = [end for _, end in encoded["offset_mapping"]][: self.max_tokens]
        else:
            # Good to a token or so, which is all that a weight needs.
            each = len(rendered) / max(1, len(encoded["input_ids"]))
            ends = [round((token + 1) * each) for token in range(len(ids))]
        first, *others = _answer_spans(text.messages, rendered, render) or [None]
        spans = [span for span in others if span] or ([first] if first else [])
        return Sample(text.kind, ids, _positions_before(spans, ends))

    def _templated(self, messages: Messages, answer_next: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=answer_next,
                **self._clock,
            )
        )

    def _whole(self, text: Text, render: Render) -> str:
        try:
            return render(text.messages, False)
        except Exception as error:  # templates raise what they like
            reason = str(error).strip().split("\n")[0]
            roles = ", ".join(message["role"] for message in text.messages[:8])
            raise TextError(
                text.where,
                f"the model's chat template does not take this conversation ({reason}), whose "
                f"roles are {roles}",
            ) from error


def _written_out(messages: Messages, answer_next: bool) -> str:
    paragraphs = [f"{m['role'].capitalize()}: {m['content']}" for m in messages]
    return "\n\n".join([*paragraphs, *(["Assistant: "] if answer_next else [])])


def _answer_spans(
    messages: Messages, rendered: str, render: Render
) -> list[tuple[int, int] | None]:
    """[start, stop) of every assistant's message in the rendered text, None where it is not there.

    A message is looked for from where the text departs from that of a conversation which ends
    before it: what a template writes around messages may contain short ones.
    """
    spans: list[tuple[int, int] | None] = []
    start = 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            start = max(start, _shared(rendered, render(messages[:number], True)))
        except Exception:  # templates raise what they like; after the last answer it is in any case
            pass
        spans.append(_find(message["content"], rendered, start))
        start = (spans[-1] or (0, start))[1]
    return spans


def _shared(one: str, other: str) -> int:
    """Characters until two texts differ."""
    if one.startswith(other):
        return len(other)
    return next(i for i, pair in enumerate(zip_longest(one, other)) if pair[0] != pair[1])


def _find(content: str, rendered: str, start: int) -> tuple[int, int] | None:
    """Where a message is, or what comes after its thoughts, which a template may drop."""
    for piece in (content.strip(), content.rpartition("</think>")[2].strip()):
        found = rendered.find(piece, start)
        if piece and found >= 0:
            return found, found + len(piece)
    return None


def _positions_before(spans: Iterable[tuple[int, int]], ends: Sequence[int]) -> tuple[int, ...]:
    """Positions whose next token is of one of the spans (of characters), or comes right after."""
    positions: set[int] = set()
    rest = iter(spans)
    span = next(rest, None)
    for token, end in enumerate(ends):
        while span is not None and end > span[1]:
            span = next(rest, None)
        if span is None:
            break
        if end > span[0]:
            positions |= {token - 1, token}
    return tuple(sorted(positions & set(range(len(ends) - 1))))


def spread_lengths(count: int, least: int, most: int) -> list[int]:
    """Lengths of `count` samples between two bounds, evenly spread, in a mixed order."""
    golden = (5**0.5 - 1) / 2
    return [round(most - (most - least) * (number * golden % 1.0)) for number in range(count)]


def held_back(count: int) -> list[int]:
    """Which of `count` samples are kept for measuring: every fifth, at least three.

    Raises:
        ConfigurationError: too few to leave any for the statistics.
    """
    held = max(3, count // 5)
    if count <= held:
        raise ConfigurationError(
            f"{count} samples are too few to hold {held} of them back for measuring: give more "
            f"texts and --samples {held + 1} or more, or --no-measure"
        )
    return [(2 * i + 1) * count // (2 * held) for i in range(held)]
