"""Messages and tools as datasets spell them, in the one form that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tangram.errors import TextError

Message = dict[str, Any]
"""`role` and `content`, both texts; of an agent's also `tool_calls`, whose `arguments` are objects,
`tool_call_id` and `name`; and what was thought as `reasoning_content` and `reasoning`."""

THOUGHTS = ("reasoning_content", "reasoning")

_OTHER_NAMES = {
    "user": ("human", "prompter", "instruction", "customer"),
    "assistant": (
        "gpt", "chatgpt", "bing", "bard", "ai", "claude", "llm", "agent", "bot", "chatbot", "model",
    ),
    "system": ("developer",),
    "tool": ("function", "observation", "ipython"),
}  # fmt: skip
_ROLES = {name: role for role, others in _OTHER_NAMES.items() for name in (role, *others)}
_MEDIA = ("image", "audio", "video")


def role_of(name: str) -> str:
    """The role that chat templates know under one of its names, in any case; others as they are."""
    return _ROLES.get(name.strip().lower(), name)


def message_of(message: Any, where: str) -> Message:
    """A message in the form that chat templates take.

    Args:
        message: an object with `role` and `content`, or `from` and `value`, without nulls.
        where: the row's place, for errors.

    Raises:
        TextError: it is none, or a part of it would be lost; names the place.
    """
    if not isinstance(message, Mapping):
        raise TextError(where, f"a message is to be an object, got {message!r:.60}")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    more = _agents_part(message, where)
    if content is None and more.keys() & {"tool_calls", *THOUGHTS}:
        content = ""
    if isinstance(content, list):
        content = _joined(content, where)
    if not isinstance(role, str) or not isinstance(content, str):
        raise TextError(
            where,
            'a message needs a text under "role" and "content", or "from" and "value", got '
            + (", ".join(f"{key} ({type(message[key]).__name__})" for key in message) or "nothing"),
        )
    return {"role": role_of(role), "content": content, **more}


def tools_of(tools: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Tools in the form that chat templates take.

    Args:
        tools: a list of functions, bare or as `{"type": "function", "function": ...}`, or its JSON.
        where: the row's place, for errors.

    Raises:
        TextError: they are none, or one has no name; names the place.
    """
    tools = _parsed(tools) or []
    if isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools):
        whole = tuple(
            dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)}
            for tool in tools
        )
        if all(_is_named(tool["function"]) for tool in whole):
            return whole
    raise TextError(
        where, f'"tools" are to be a list of functions with a "name" each, got {tools!r:.60}'
    )


def _agents_part(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a message holds beside its role and content."""
    calls = _parsed(message.get("tool_calls"))
    if not calls and "function_call" in message:
        calls = [message["function_call"]]
    found: dict[str, Any] = {}
    if calls:
        if not isinstance(calls, list):
            raise TextError(where, f'"tool_calls" is to be a list, got {calls!r:.60}')
        found["tool_calls"] = [_tool_call(call, where) for call in calls]
    for name in ("tool_call_id", "name"):
        if isinstance(message.get(name), str):
            found[name] = message[name]
    thoughts = next((message[name] for name in THOUGHTS if message.get(name)), None)
    if thoughts is not None:
        if not isinstance(thoughts, str):
            raise TextError(where, f'"{THOUGHTS[0]}" is to be a text, got {thoughts!r:.60}')
        found |= dict.fromkeys(THOUGHTS, thoughts)
    return found


def _tool_call(given: Any, where: str) -> dict[str, Any]:
    """A tool call whose arguments, JSON as OpenAI has them, are an object, as templates want."""
    call = given if isinstance(given, Mapping) else {}
    function = call.get("function", call)
    if not _is_named(function):
        raise TextError(where, f'a tool call needs a function with a "name", got {given!r:.60}')
    arguments = _parsed(function.get("arguments")) or {}
    if not isinstance(arguments, Mapping):
        raise TextError(
            where,
            f'"arguments" of the tool call {function["name"]} are to be a JSON object, got '
            f"{arguments!r:.60}",
        )
    named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    called = {"name": function["name"], "arguments": dict(arguments)}
    return {**named, "type": "function", "function": called}


def _is_named(function: Any) -> bool:
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def _parsed(value: Any) -> Any:
    """What a text of JSON says; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value


def _joined(parts: Sequence[Any], where: str) -> str:
    texts = [_text_of(part, where) for part in parts]
    if parts and not any(texts):
        raise TextError(where, "no part of a message has a text")
    return "".join(texts)


def _text_of(part: Any, where: str) -> str:
    """The text of a part of a message; pictures and sounds, and parts that say nothing, have none.

    Raises:
        TextError: it holds something else, which would be lost.
    """
    if isinstance(part, Mapping):
        text = part.get("text", part.get("content"))
        kind = str(part.get("type", ""))
        if text is None and (set(part) <= {"type"} or any(word in kind for word in _MEDIA)):
            return ""
    else:
        text = part
    if isinstance(text, str):
        return text
    raise TextError(
        where,
        'a part of a message is to be a text, or an object with one under "text" or "content", got '
        f"{part!r:.60}",
    )
