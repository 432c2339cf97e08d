"""Prompts of the tests: conversations of the recall model, as token ids, and plain noise."""

from __future__ import annotations

import functools
import random
from typing import Any

from tangram.conversations import make_conversation
from tests.engine.harness import MODEL


@functools.cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


def render(messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a chat with the generation prompt."""
    return tokenizer().apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )


def chat(seed: int, context_tokens: int, turns: int = 1) -> list[dict[str, str]]:
    """Messages of a conversation that ends with a question not yet answered."""
    conversation = make_conversation(seed, context_tokens=context_tokens, facts=6, turns=turns)
    messages = []
    for turn in conversation.turns:
        messages.append({"role": "user", "content": turn.user})
        messages.append({"role": "assistant", "content": turn.answer})
    return messages[:-1]


def conversation_prompt(seed: int, context_tokens: int, turns: int = 1) -> list[int]:
    """The same as token ids."""
    return render(chat(seed, context_tokens, turns))


def noise(seed: int, length: int) -> list[int]:
    """Random tokens: nothing in them repeats by design."""
    vocabulary = len(tokenizer())
    generator = random.Random(seed)
    return [generator.randrange(vocabulary) for _ in range(length)]
