"""Playing conversations against an OpenAI server, as chat clients do: every turn sends it all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from tangram.conversations import Conversation, is_right

if TYPE_CHECKING:
    from openai import OpenAI

MAX_ANSWER_TOKENS = 16

T = TypeVar("T")


@dataclass(frozen=True)
class Reply:
    """One turn that was played.

    Attributes:
        conversation: its number.
        turn: the turn's number in it.
        expected: the right answer.
        answer: what came.
        right: whether they are the same.
        prompt_tokens: tokens of the history that was sent.
        seconds: from the request to the whole answer.
    """

    conversation: int
    turn: int
    expected: str
    answer: str
    right: bool
    prompt_tokens: int
    seconds: float


def client_of(url: str) -> OpenAI:
    """A client of the server; it retries nothing, so that a failure is seen."""
    import openai

    # The server is local: a proxy of the environment has no part in it.
    http = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300, http_client=http
    )


def play(
    client: OpenAI,
    model: str,
    conversations: Sequence[Conversation],
    *,
    concurrency: int,
    on_reply: Callable[[Reply], None] = lambda reply: None,
) -> list[Reply]:
    """Play all conversations, several at a time, each turn after the other, greedily.

    The history holds the answers that came, right or wrong.

    Raises:
        openai.OpenAIError: a request failed; the rest is not played.
    """

    def one(number: int) -> list[Reply]:
        replies: list[Reply] = []
        for turn in range(len(conversations[number].turns)):
            replies.append(_ask(client, model, conversations[number], number, replies))
            on_reply(replies[turn])
        return replies

    groups = _at_once(one, len(conversations), concurrency)
    return [reply for replies in groups for reply in replies]


def hold_all(
    client: OpenAI,
    model: str,
    conversations: Sequence[Conversation],
    replies: Sequence[Reply],
    *,
    tokens: int,
) -> None:
    """Have all conversations open at once for a while: a long answer to each one's history."""
    forced: dict[str, Any] = {"min_tokens": tokens, "ignore_eos": True}

    def one(number: int) -> None:
        answers = [r.answer for r in replies if r.conversation == number]
        messages = conversations[number].messages(len(answers) - 1, answers[:-1])
        _complete(client, model, messages, tokens, forced)

    _at_once(one, len(conversations), len(conversations))


def _at_once(work: Callable[[int], T], count: int, concurrency: int) -> list[T]:
    """`work` of 0, 1 ... count - 1 in threads; the first error, or Ctrl-C, does not wait for them.

    Their requests fail when the caller ends the server.
    """
    pool = ThreadPoolExecutor(concurrency)
    try:
        return list(pool.map(work, range(count)))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _ask(
    client: OpenAI, model: str, conversation: Conversation, number: int, past: Sequence[Reply]
) -> Reply:
    turn = len(past)
    expected = conversation.turns[turn].answer
    messages = conversation.messages(turn, [reply.answer for reply in past])
    start = time.perf_counter()
    answer, prompt_tokens = _complete(client, model, messages, MAX_ANSWER_TOKENS)
    seconds = time.perf_counter() - start
    right = is_right(answer, expected)
    return Reply(number, turn, expected, answer, right, prompt_tokens, seconds)


def _complete(
    client: OpenAI,
    model: str,
    messages: Sequence[Any],
    max_tokens: int,
    extra_body: dict[str, Any] | None = None,
) -> tuple[str, int]:
    completion = client.chat.completions.create(
        model=model,
        messages=list(messages),
        max_tokens=max_tokens,
        temperature=0,
        extra_body=extra_body,
    )
    usage = completion.usage
    return completion.choices[0].message.content or "", usage.prompt_tokens if usage else 0
