"""Samples: texts as token ids, and the positions at which later answers are generated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from tangram.calibrate.texts.messages import THOUGHTS, Message
from tangram.calibrate.texts.rendering import ChatRenderer, Render
from tangram.errors import ConfigurationError


@dataclass(frozen=True)
class Text:
    """What a sample is made from: a conversation, or plain text.

    Attributes:
        kind: what it is, in a word.
        messages: turns, in the form of `messages.Message`; empty for plain text.
        plain: the text, where it is no conversation.
        tools: that the assistant may call, in the form of `messages.tools_of`.
        where: file and line that it came from, for errors.
    """

    kind: str
    messages: tuple[Message, ...] = ()
    plain: str = ""
    tools: tuple[dict[str, Any], ...] = ()
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
    """From texts to samples, in the model's own chat format; see `ChatRenderer`.

    A model without a chat template gets the tokens that its tokenizer puts around any text.

    Args:
        tokenizer: of the transformers library.
        max_tokens: longer samples lose their end.
    """

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self._chat = ChatRenderer(tokenizer)
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
            TextError: the chat template does not take the conversation, or leaves something of it
                out; names its place.
        """
        rendered, spans, special = text.plain, [], True
        if text.messages:
            rendered, render = self._chat.whole(text.messages, text.tools, text.where)
            first, *others = _answer_spans(text.messages, rendered, render) or [None]
            spans = [span for span in others if span] or ([first] if first else [])
            special = not self._chat.has_template
        offsets_known = bool(getattr(self.tokenizer, "is_fast", False))
        encoded = self.tokenizer(
            rendered, add_special_tokens=special, return_offsets_mapping=offsets_known
        )
        ids = tuple(encoded["input_ids"])[: self.max_tokens]
        if offsets_known:
            ends = [end for _, end in encoded["offset_mapping"]][: self.max_tokens]
        else:
            # Good to a token or so, which is all that a weight needs.
            each = len(rendered) / max(1, len(encoded["input_ids"]))
            ends = [round((token + 1) * each) for token in range(len(ids))]
        return Sample(text.kind, ids, _positions_before(spans, ends))


def _answer_spans(
    messages: Sequence[Message], rendered: str, render: Render
) -> list[tuple[int, int] | None]:
    """[start, stop) of every assistant's message in the rendered text, None where it is not there.

    A message is looked for from where the text departs from that of a conversation which ends
    before it: what a template writes around messages may contain short ones. Tool calls end where
    the text departs from that of one which ends with them.
    """
    spans: list[tuple[int, int] | None] = []
    start = 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = max(start, _shared_with(rendered, render, messages[:number], True))
        begin, end = _find(message["content"], rendered, start) or (start, start)
        thoughts = message.get(THOUGHTS[0], "").strip()
        found = rendered.find(thoughts, start, begin)
        if thoughts and found >= 0:
            begin = found
        if "tool_calls" in message:
            shared = _shared_with(rendered, render, messages[: number + 1], False)
            end = max(end, len(rendered[:shared].rstrip()))
        spans.append((begin, end) if end > begin else None)
        start = max(start, end)
    return spans


def _shared_with(
    rendered: str, render: Render, messages: Sequence[Message], answer_next: bool
) -> int:
    """Characters that a text has in common with that of fewer messages of the conversation.

    Thoughts of their last turn, which the whole text may leave out, count as there or as not.
    """
    without = [{k: v for k, v in m.items() if k not in THOUGHTS} for m in messages]
    shared = [0]
    for some in (messages, without) if without != list(messages) else (messages,):
        try:
            shared.append(_shared(rendered, render(some, answer_next)))
        except Exception:  # templates raise what they like; after the last answer it is in any case
            pass
    return max(shared)


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


LEAST_HELD = 8
"""Samples kept for measuring, where half of all are as many."""


def held_back(count: int) -> list[int]:
    """Which of `count` samples are kept for measuring: a third, and 8 or half if that is more.

    Fewer do not tell budgets apart. Three at least, whatever the rest.

    Raises:
        ConfigurationError: too few to leave any for the statistics.
    """
    held = max(3, -(-count // 3), min(LEAST_HELD, count // 2))
    if count <= held:
        raise ConfigurationError(
            f"{count} samples are too few to hold {held} of them back for measuring: give more "
            f"texts and --samples {held + 1} or more, or --no-measure"
        )
    return [(2 * i + 1) * count // (2 * held) for i in range(held)]
