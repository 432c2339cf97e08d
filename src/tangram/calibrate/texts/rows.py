"""Rows of a user's file or dataset, and the texts in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tangram.calibrate.texts.messages import Message, message_of, tools_of
from tangram.calibrate.texts.samples import Text
from tangram.errors import TextError

_CHATS = ("messages", "conversations", "conversation")
_PAIRS = (("prompt", "completion"), ("instruction", "output"))
FORMS = (
    '"messages", "conversations" or "conversation" (a list of messages), "prompt" and "completion" '
    '(texts or lists of messages), "instruction" and "output" (with "input", or without), "text", '
    'or one of these in "body"'
)
_READ = {*_CHATS, *(name for pair in _PAIRS for name in pair), "input", "text", "body"}


def text_of(row: Mapping[str, Any], where: str) -> Text:
    """The text in a row.

    Args:
        row: an object in one of the forms of `FORMS`, in which what is empty hides nothing;
            conversations may come with `system` and `tools`. What is null counts as left out,
            because a dataset gives every row the keys of all rows.
        where: its place, for errors.

    Raises:
        TextError: it has none of these, or not as expected; names the place.
    """
    row = _without_nulls(row)
    text = _text(row, where)
    if text is None and isinstance(row.get("body"), dict):  # a line of OpenAI's batches
        text = _text(row["body"], where)
    if text is None:
        raise TextError(where, f"expected {FORMS}, got the keys {', '.join(_keys(row)) or 'none'}")
    return _readable(text)


def _text(fields: Mapping[str, Any], where: str) -> Text | None:
    for name in _CHATS:
        if fields.get(name) and isinstance(fields[name], list):
            return _chat("chat", _said("user", fields[name], where), fields, where)
    for asked, answered in _PAIRS:
        if all(isinstance(fields.get(name), str | list) for name in (asked, answered)):
            question = _said("user", fields[asked], where)
            if asked == "instruction":
                _add_input(question, fields, where)
            messages = question + _said("assistant", fields[answered], where)
            return _chat("completion", messages, fields, where)
    plain = fields.get("text")
    return Text("text", plain=plain, where=where) if isinstance(plain, str) else None


def _said(role: str, said: str | list[Any], where: str) -> list[Message]:
    if isinstance(said, str):
        return [{"role": role, "content": said}]
    return [message_of(message, where) for message in said]


def _add_input(question: list[Message], fields: Mapping[str, Any], where: str) -> None:
    """Put what Alpaca's rows have as `input` below the instruction."""
    if fields.get("history"):
        raise TextError(
            where, '"history" beside "instruction" is not read: write all turns as "messages"'
        )
    if given := fields.get("input"):
        if not isinstance(given, str) or not question:
            raise TextError(
                where, f'"input" is to be a text after an instruction, got {given!r:.60}'
            )
        question[-1]["content"] += f"\n\n{given}"


def _chat(kind: str, messages: list[Message], fields: Mapping[str, Any], where: str) -> Text:
    if fields.get("system"):
        system = message_of({"role": "system", "content": fields["system"]}, where)
        if messages[:1] != [system]:
            messages = [system, *messages]
    tools = tools_of(fields.get("tools") or fields.get("functions"), where)
    return Text(kind, tuple(messages), tools=tools, where=where)


def _keys(row: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys of a row, with what those that are read hold instead."""
    found = []
    for key in sorted(row):
        value = row[key]
        if key == "body" and isinstance(value, dict):
            found += _keys(value, "body.")
        elif key in _READ:
            found.append(f"{prefix}{key} ({type(value).__name__ if value else 'empty'})")
        else:
            found.append(prefix + key)
    return found


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _readable(text: Text) -> Text:
    """The text, if a tokenizer can take it: JSON may spell halves of characters."""
    try:
        held = (text.plain, text.messages, text.tools)
        json.dumps(held, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(text.where, f"its text is no Unicode ({error.reason})") from error
    return text
