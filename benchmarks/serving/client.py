"""A client that plays conversations against an OpenAI server, streaming, and times every token.

Prompts are token ids (`TokenDialogue`, /v1/completions), for models without a tokenizer too, or
messages (`ChatDialogue`, /v1/chat/completions). Either way the next prompt holds the answer that
the server gave, so that its prefix cache can hit the answer as in any chat.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp

from benchmarks.serving.records import Record, Sample
from benchmarks.serving.workloads import Script
from tangram.conversations import vocabulary
from tangram.serving.scrape import totals

SAMPLE_INTERVAL_S = 0.5
REFUSALS = (429, 503)
"""Beside the 4xx that name a mistake: an honest server says so when it has too much to do."""


class Dialogue(Protocol):
    """A conversation in play."""

    path: str

    def ask(self, new_tokens: Sequence[int]) -> dict[str, Any]:
        """Adds a turn of the user; the body's fields that hold the history."""

    def take(self, token_ids: Sequence[int], text: str) -> None:
        """Adds the server's answer."""

    def count(self) -> int:
        """Tokens of the history, as far as the client knows."""


class TokenDialogue:
    """History as token ids."""

    path = "/v1/completions"

    def __init__(self) -> None:
        self.history: list[int] = []

    def ask(self, new_tokens: Sequence[int]) -> dict[str, Any]:
        """See `Dialogue`."""
        self.history.extend(new_tokens)
        return {"prompt": self.history}

    def take(self, token_ids: Sequence[int], text: str) -> None:
        """See `Dialogue`."""
        self.history.extend(token_ids)

    def count(self) -> int:
        """See `Dialogue`."""
        return len(self.history)


class ChatDialogue:
    """History as messages; a token id stands for a common word, about a token of real models."""

    path = "/v1/chat/completions"
    _words = sorted(filter(str.isalpha, vocabulary()))

    def __init__(self) -> None:
        self.messages: list[dict[str, str]] = []
        self._tokens = 0

    def ask(self, new_tokens: Sequence[int]) -> dict[str, Any]:
        """See `Dialogue`."""
        self._add("user", self.text_of(new_tokens), len(new_tokens))
        return {"messages": self.messages}

    def take(self, token_ids: Sequence[int], text: str) -> None:
        """See `Dialogue`."""
        self._add("assistant", text or self.text_of(token_ids), len(token_ids))

    def count(self) -> int:
        """See `Dialogue`."""
        return self._tokens

    @classmethod
    def text_of(cls, token_ids: Sequence[int]) -> str:
        """Words for token ids."""
        return " ".join(cls._words[token % len(cls._words)] for token in token_ids)

    def _add(self, role: str, content: str, tokens: int) -> None:
        self.messages.append({"role": role, "content": content})
        self._tokens += tokens


DIALOGUES: dict[str, Callable[[], Dialogue]] = {"tokens": TokenDialogue, "chat": ChatDialogue}


@dataclass
class Run:
    """Everything that the requests of a run share.

    Attributes:
        url: of the server.
        model: its name there.
        new_dialogue: makes an empty conversation.
        abort_share: share of the requests that the client leaves in the middle.
        seed: of who leaves when.
        records: of all requests, in the order in which they were due.
        samples: of the server's metrics.
        stop_s: from then on nothing is sent; set it to end a run.
    """

    url: str
    model: str
    new_dialogue: Callable[[], Dialogue] = TokenDialogue
    abort_share: float = 0.0
    seed: int = 0
    records: list[Record] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    stop_s: float = float("inf")

    def __post_init__(self) -> None:
        self._zero = time.perf_counter()
        self._session: aiohttp.ClientSession | None = None

    def now(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._zero

    async def __aenter__(self) -> Run:
        # No limit on connections, or waiting for one would hide the server's own queue; and one for
        # every request, because the server may close an idle one under a request just sent.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=None)
        )
        self._zero = time.perf_counter()
        return self

    async def __aexit__(self, *exception: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def sleep_until(self, moment_s: float) -> bool:
        """Wait for a moment of the run; False if the run stops before.

        A client that is late still sends what was due in time.
        """
        while (left := moment_s - self.now()) > 0:
            if moment_s >= self.stop_s:
                return False
            await asyncio.sleep(min(left, 0.25))
        return moment_s < self.stop_s

    async def play(self, script: Script, due_s: float) -> None:
        """Play a conversation from the turn at which it begins; a failed turn ends it."""
        dialogue = self.new_dialogue()
        draw = random.Random(self.seed << 32 | script.number)
        for turn in script.turns[: script.begins_at]:
            dialogue.ask(turn.new_tokens)
            dialogue.take(turn.made_up_answer, "")
        for index in range(script.begins_at, len(script.turns)):
            turn = script.turns[index]
            if index > script.begins_at:
                due_s = self.now() + turn.think_s
            if not await self.sleep_until(due_s):
                return
            record = Record(script.number, index, due_s)
            self.records.append(record)
            leave_after = None
            if draw.random() < self.abort_share:
                leave_after = draw.randrange(turn.answer_tokens)
            await self.request(record, dialogue, turn.new_tokens, turn.answer_tokens, leave_after)
            if record.outcome not in ("done", "aborted"):
                return

    async def request(
        self,
        record: Record,
        dialogue: Dialogue,
        new_tokens: Sequence[int],
        answer_tokens: int,
        leave_after: int | None = None,
    ) -> None:
        """Ask for one answer of a fixed length, and put what happened into the record.

        Args:
            record: which request this is.
            dialogue: its history; grows by the question and the answer.
            new_tokens: the question.
            answer_tokens: length of the answer.
            leave_after: hang up after so many tokens; 0: while waiting for the first.
        """
        body = dialogue.ask(new_tokens) | {
            "model": self.model,
            "max_tokens": answer_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        record.prompt_tokens = dialogue.count()
        data = json.dumps(body).encode()
        answer = _Answer(record)
        record.sent_s = self.now()
        try:
            # Hanging up at 0 is soon, but for a fast server not always before the first token.
            async with asyncio.timeout(0.05 if leave_after == 0 else None):
                await self._stream(dialogue.path, data, answer, leave_after)
        except TimeoutError as error:
            on_purpose = leave_after == 0
            record.outcome = "aborted" if on_purpose else "error"
            record.reason = "before the first token" if on_purpose else f"timed out: {error}"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            record.outcome, record.reason = "error", f"{type(error).__name__}: {error}"[:300]
        finally:
            record.end_s = self.now()
        if record.outcome == "done" and record.output_tokens != answer_tokens:
            record.outcome = "error"
            record.reason = f"{record.output_tokens} of {answer_tokens} tokens came"
        dialogue.take(answer.token_ids, answer.text)

    async def _stream(
        self, path: str, data: bytes, answer: _Answer, leave_after: int | None
    ) -> None:
        assert self._session is not None
        record = answer.record
        headers = {"Content-Type": "application/json"}
        async with self._session.post(self.url + path, data=data, headers=headers) as response:
            if response.status != 200:
                text = (await response.text())[:300]
                refused = 400 <= response.status < 500 or response.status in REFUSALS
                record.outcome = "refused" if refused else "error"
                record.reason = f"{response.status}: {text}"
                return
            rest = b""
            async for piece in response.content.iter_any():
                moment = self.now()  # before it is parsed: the first event repeats the whole prompt
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: "):
                        answer.read(line[6:], moment)
                if answer.ended:
                    return
                if leave_after is not None and leave_after <= record.output_tokens:
                    record.outcome, record.reason = "aborted", "in the middle of the answer"
                    response.close()
                    return
            record.outcome, record.reason = "error", "the stream ended without [DONE]"

    async def watch(self) -> None:
        """Sample the server's metrics until cancelled."""
        while True:
            try:
                found = totals(await self.get("/metrics"))
                self.samples.append(
                    Sample(
                        self.now(),
                        found["vllm:kv_cache_usage_perc"],
                        found["vllm:num_requests_running"],
                        found["vllm:num_requests_waiting"],
                    )
                )
            except (aiohttp.ClientError, OSError):
                pass  # a sample less; requests tell what is wrong
            await asyncio.sleep(SAMPLE_INTERVAL_S)

    async def get(self, path: str) -> str:
        """The body of a GET request."""
        assert self._session is not None
        async with self._session.get(self.url + path) as response:
            response.raise_for_status()
            return await response.text()


class _Answer:
    """An answer as it streams in."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.token_ids: list[int] = []
        self.text = ""
        self.ended = False

    def read(self, data: bytes, moment: float) -> None:
        """One event, and when it came; raises ValueError for one that tells of an error."""
        if data.strip() == b"[DONE]":
            self.ended = True
            self.record.outcome = "done"
            return
        event = json.loads(data)
        if "error" in event:
            raise ValueError(f"the server says {event['error']}")
        if usage := event.get("usage"):
            self.record.prompt_tokens = usage["prompt_tokens"]
            details = usage.get("prompt_tokens_details") or {}
            self.record.cached_tokens = details.get("cached_tokens")
        for choice in event.get("choices", ()):
            tokens = choice.get("token_ids") or []
            self.text += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            if tokens:
                if self.record.first_s is None:
                    self.record.first_s = moment
                self.record.add_tokens(moment, len(tokens))
                self.token_ids.extend(tokens)
