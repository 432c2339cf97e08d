"""Playing conversations against a client that stands for a server."""

import threading
import time
from types import SimpleNamespace

import pytest

from tangram.conversations import make_conversation
from tangram.serving.played import MAX_ANSWER_TOKENS, hold_all, play

CONVERSATIONS = [make_conversation(seed, 300, 6, 3) for seed in range(5)]


class Client:
    """Answers as `answer` says, and keeps what it was asked."""

    def __init__(self, answer):
        self.answer = answer
        self.requests = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.chat = SimpleNamespace(completions=self)

    def create(self, **request):
        with self.lock:
            self.requests.append(request)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            time.sleep(0.005)
            message = SimpleNamespace(content=self.answer(request["messages"]))
        finally:
            with self.lock:
                self.at_once -= 1
        usage = SimpleNamespace(prompt_tokens=len(request["messages"]))
        return SimpleNamespace(choices=[SimpleNamespace(message=message)], usage=usage)


def right_answer(messages):
    for conversation in CONVERSATIONS:
        for turn, exchange in enumerate(conversation.turns):
            if exchange.user == messages[-1]["content"] and 2 * turn + 1 == len(messages):
                return f" {exchange.answer}\n"
    raise AssertionError(messages[-1])


def test_every_turn_sends_the_whole_history_and_the_right_answers_count():
    client, seen = Client(right_answer), []
    replies = play(client, "recall", CONVERSATIONS, concurrency=3, on_reply=seen.append)
    assert [(r.conversation, r.turn) for r in replies] == [
        (c, t) for c in range(5) for t in (0, 1, 2)
    ]
    assert all(reply.right and reply.seconds > 0 for reply in replies)
    assert [reply.prompt_tokens for reply in replies] == [1, 3, 5] * 5
    assert sorted(seen, key=lambda r: (r.conversation, r.turn)) == replies
    assert 1 < client.most_at_once <= 3
    assert all(
        (r["temperature"], r["max_tokens"], r["model"]) == (0, MAX_ANSWER_TOKENS, "recall")
        for r in client.requests
    )


def test_a_wrong_answer_counts_and_stays_in_the_history():
    client = Client(lambda messages: "nonsense")
    replies = play(client, "recall", CONVERSATIONS[:1], concurrency=1)
    assert not any(reply.right for reply in replies)
    assert {m["content"] for m in client.requests[-1]["messages"] if m["role"] == "assistant"} == {
        "nonsense"
    }


def test_an_empty_answer_is_wrong():
    assert not play(Client(lambda messages: None), "m", CONVERSATIONS[:1], concurrency=1)[0].right


def test_a_request_that_fails_ends_the_play():
    def fail(messages):
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        play(Client(fail), "m", CONVERSATIONS, concurrency=2)


def test_holding_opens_all_conversations_at_once_with_their_whole_history():
    client = Client(right_answer)
    replies = play(client, "m", CONVERSATIONS, concurrency=2)
    client = Client(lambda messages: time.sleep(0.2))
    hold_all(client, "m", CONVERSATIONS, replies, tokens=7)
    assert client.most_at_once == len(CONVERSATIONS) == len(client.requests)
    for request in client.requests:
        assert request["max_tokens"] == request["extra_body"]["min_tokens"] == 7
        assert len(request["messages"]) == 5
