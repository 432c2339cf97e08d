"""Conversations in a model's chat format, as token ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tangram.errors import ConfigurationError
from tangram.evaluate.tasks.base import Dialogue, Message
from tangram.templates import fixed_clock

# Arguments of `apply_chat_template` that are no variables of the template.
_NO_VARIABLES = (
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation",
    "max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict",
    "return_tensors", "self", "tokenize", "tokenizer_kwargs", "truncation",
)  # fmt: skip


class ChatFormat:
    """A tokenizer with its chat template.

    Args:
        tokenizer: of transformers.
        model: its name, for errors.
        template_options: further variables of the template, such as `enable_thinking`. Without
            a `strftime_now` of theirs, today is always `tangram.templates.TODAY`.

    Raises:
        ConfigurationError: the tokenizer has no chat template, or an option is no variable.
    """

    def __init__(
        self, tokenizer: Any, model: str, template_options: Mapping[str, Any] | None = None
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigurationError(
                f"the tokenizer of {model} has no chat template, and the tasks are chats: give "
                "--chat-template FILE, or a model that was tuned for chat"
            )
        self._tokenizer = tokenizer
        self._model = model
        self._options = {**fixed_clock(tokenizer), **(template_options or {})}
        refused = [name for name in _NO_VARIABLES if name in self._options]
        if refused:
            raise ConfigurationError(
                f"--chat-template-options: {', '.join(refused)} is no variable of a template but "
                "for the evaluation to set; leave it out"
            )

    @classmethod
    def load(
        cls,
        model: str,
        *,
        template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> ChatFormat:
        """The chat format of a model.

        Args:
            model: folder or name.
            template: a chat template to be used instead of the model's.
            template_options: further variables of the template.
            **options: further keyword arguments of `AutoTokenizer.from_pretrained`.

        Raises:
            ConfigurationError: there is no tokenizer to be had.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(model, **options)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ConfigurationError(
                f"{model} has no tokenizer that can be loaded ({reason}): give a model with one, "
                "or --engine tokenizer=NAME"
            ) from error
        if template is not None:
            tokenizer.chat_template = template
        return cls(tokenizer, model, template_options)

    def tokens(self, messages: Iterable[Message], *, ask: bool) -> list[int]:
        """Token ids of messages.

        Args:
            messages: a chat history.
            ask: whether the assistant's answer is to follow.

        Raises:
            ConfigurationError: the chat template does not take them.
        """
        try:
            return list(
                self._tokenizer.apply_chat_template(
                    list(messages),
                    add_generation_prompt=ask,
                    tokenize=True,
                    return_dict=False,
                    **self._options,
                )
            )
        except Exception as error:  # a template is a program: 1/0 is a ZeroDivisionError
            raise ConfigurationError(
                f"the chat template of {self._model} does not take the task's turns "
                f"({type(error).__name__}: {error}): give another --chat-template FILE, or other "
                "--chat-template-options"
            ) from error

    def measure(self, dialogue: Dialogue) -> int:
        """Tokens of a finished conversation."""
        return len(self.tokens(dialogue.whole(), ask=False))

    def prompts(self, dialogue: Dialogue) -> list[list[int]]:
        """What is sent: the context alone, then the history up to each question.

        The first prompt is what the opening and the first question's history have in common, so
        that it is a prefix of the next whatever the template puts after an assistant's message.
        """
        asked = [
            self.tokens(dialogue.messages(turn), ask=True)
            for turn in range(len(dialogue.questions))
        ]
        opening = self.tokens(dialogue.opening(), ask=False)
        common = 0
        for mine, theirs in zip(opening, asked[0], strict=False):
            if mine != theirs:
                break
            common += 1
        return [opening[:common], *asked]

    def check_representable(self, dialogue: Dialogue, task: str) -> None:
        """Raise ConfigurationError if the tokenizer cannot give a conversation's text back."""
        texts = [message["content"] for message in dialogue.whole()]
        unknown = getattr(self._tokenizer, "unk_token_id", None)
        for text in texts:
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            back = self._tokenizer.decode(ids, skip_special_tokens=False)
            # What a tokenizer makes of other alphabets (normal forms) is its own business.
            changed = text.isascii() and "".join(back.split()) != "".join(text.split())
            if changed or (unknown is not None and unknown in ids):
                raise ConfigurationError(
                    f"--tasks {task}: the tokenizer of {self._model} cannot represent the task's "
                    "text, so the model cannot answer it: leave the task out (the bundled "
                    "recall model plays only the task recall)"
                )
