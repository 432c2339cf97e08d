"""Conversations in a model's own chat format, and proof that nothing of them was left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tangram.calibrate.texts.messages import Message
from tangram.errors import TextError
from tangram.templates import fixed_clock

Tools = Sequence[dict[str, Any]]
Render = Callable[[Sequence[Message], bool], str]
"""(messages, whether an answer is to follow) -> the text."""

_NAMED_AT_ONCE = 3


class ChatRenderer:
    """Writes conversations with a tokenizer's chat template.

    Without one a conversation is written as "User: ..." and "Assistant: ..." in paragraphs of their
    own.

    Args:
        tokenizer: of the transformers library.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._clock = fixed_clock(tokenizer)
        self.has_template = bool(getattr(tokenizer, "chat_template", None))

    def whole(self, messages: Sequence[Message], tools: Tools, where: str) -> tuple[str, Render]:
        """A conversation's text, and what writes parts of the conversation in the same way.

        Args:
            messages: in the form of `messages.message_of`.
            tools: in the form of `messages.tools_of`.
            where: the conversation's place, for errors.

        Raises:
            TextError: the chat template does not take the conversation, or leaves something of it
                out, other than thoughts, of which many templates keep the last turn's alone.
        """
        reasons = []
        for spell in (list, _with_json_arguments):
            try:
                rendered = self._render(tools, spell, messages, False)
                self._refuse_gaps(messages, tools, spell, where)
            except TextError:
                raise
            except Exception as error:  # templates raise what they like
                reasons.append(error)
            else:
                return rendered, partial(self._render, tools, spell)
        said = str(reasons[0]).strip().split("\n")[0]
        roles = ", ".join(message["role"] for message in messages[:8])
        raise TextError(
            where,
            f"the model's chat template does not take this conversation ({said}), whose roles are "
            f"{roles}",
        ) from reasons[0]

    def _render(
        self,
        tools: Tools,
        spell: Callable[[Sequence[Message]], list[Message]],
        messages: Sequence[Message],
        answer_next: bool,
    ) -> str:
        if not self.has_template:
            return _written_out(messages, answer_next)
        given = {"tools": list(tools)} if tools else {}
        return str(
            self._tokenizer.apply_chat_template(
                spell(messages),
                tokenize=False,
                add_generation_prompt=answer_next,
                **given,
                **self._clock,
            )
        )

    def _refuse_gaps(
        self,
        messages: Sequence[Message],
        tools: Tools,
        spell: Callable[[Sequence[Message]], list[Message]],
        where: str,
    ) -> None:
        """Raise TextError if the text lacks a message, a tool call or the tools.

        Each is given a word of its own, and that is looked for: a template trims what it writes,
        escapes it, or moves it, and short messages stand in every text.
        """
        marks = _Marks()
        marked = [marks.message(number, m) for number, m in enumerate(messages, start=1)]
        rendered = self._render([marks.tool(tool) for tool in tools], spell, marked, False)
        lost = list(
            dict.fromkeys(what for mark, what in marks.given.items() if mark not in rendered)
        )
        if lost:
            listed = ", ".join(lost[:_NAMED_AT_ONCE])
            more = f" and {len(lost) - _NAMED_AT_ONCE} more" if lost[_NAMED_AT_ONCE:] else ""
            by = (
                "the model's chat template" if self.has_template else "a text without chat template"
            )
            raise TextError(where, f"{by} leaves out {listed}{more}")


class _Marks:
    """Words that stand for parts of a conversation, and what each stands for."""

    def __init__(self) -> None:
        self.given: dict[str, str] = {}

    def message(self, number: int, message: Message) -> Message:
        """The message with words instead of what it says."""
        what = f"message {number} (role {message['role']})"
        marked = {**message, "content": self._mark(message["content"].strip(), what)}
        if "tool_calls" in message:
            marked["tool_calls"] = [self._call(call, what) for call in message["tool_calls"]]
        return marked

    def tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        """The tool with a word for its name."""
        what = 'the tools (drop "tools" to calibrate without any)'
        name = self._mark(tool["function"]["name"], what)
        return {**tool, "function": {**tool["function"], "name": name}}

    def _call(self, call: dict[str, Any], message: str) -> dict[str, Any]:
        function = call["function"]
        what = f"the call of {function['name']} in {message}"
        called = {
            "name": self._mark(function["name"], what),
            "arguments": {n: self._mark(value, what) for n, value in function["arguments"].items()},
        }
        return {**call, "function": called}

    def _mark(self, value: Any, what: str) -> Any:
        """A word, or the value where it is empty."""
        if value in ("", [], {}):
            return value
        mark = f"mark{len(self.given)}end"
        self.given[mark] = what
        return mark


def _with_json_arguments(messages: Sequence[Message]) -> list[Message]:
    """The messages with arguments of tool calls as OpenAI spells them, for older templates."""
    return [
        {**message, "tool_calls": [_with_json(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _with_json(call: dict[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _written_out(messages: Sequence[Message], answer_next: bool) -> str:
    paragraphs = [f"{m['role'].capitalize()}: {m['content']}" for m in messages]
    return "\n\n".join([*paragraphs, *(["Assistant: "] if answer_next else [])])
