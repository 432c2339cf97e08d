"""What `tangram calibrate` reads: the built-in samples, or texts of the user's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tangram.calibrate.texts.files import draw, draw_rows, read_json_lines, read_plain
from tangram.calibrate.texts.generated import builtin_samples
from tangram.calibrate.texts.samples import Encoder, Sample, Text, spread_lengths
from tangram.conversations import Conversation, make_conversation
from tangram.errors import ConfigurationError

BUNDLED = "bundled"
HUB = "hf:"
_FIRST_RECALL_SEED = 2_000_000
"""Training and evaluation of the recall model use other seeds."""


def load_tokenizer(model: str, **options: Any) -> Any:
    """The model's tokenizer.

    Args:
        model: folder or name.
        **options: of `AutoTokenizer.from_pretrained`.

    Raises:
        ConfigurationError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model, **options)
    except Exception as error:  # missing files, offline, gated, remote code: it has many
        reason = str(error).strip().split("\n")[0]
        raise ConfigurationError(
            f"the tokenizer of {model} cannot be loaded ({type(error).__name__}: {reason}): "
            "calibration reads texts, so put the tokenizer's files into the model's folder, or "
            'name another with --engine-args \'{"tokenizer": "..."}\''
        ) from error


def load_samples(
    data: str,
    tokenizer: Any,
    *,
    count: int,
    max_tokens: int,
    chunk_size_tokens: int,
    seed: int,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[list[Sample], str]:
    """Samples longer than a chunk, at most `count`, and what they are in words.

    Args:
        data: `bundled`, `hf:NAME[:SPLIT]`, or a .jsonl, .json or .txt file.
        tokenizer: of the model.
        count: samples that are wanted.
        max_tokens: longest sample; longer ones lose their end.
        chunk_size_tokens: C.
        seed: of what is drawn.
        tell: called with a line about what was skipped of the data, if anything was.

    Raises:
        ConfigurationError: data that cannot be read, or none of it long enough.
    """
    encoder = Encoder(tokenizer, max_tokens)
    if data == BUNDLED:
        least = min(max(2 * chunk_size_tokens, max_tokens // 4), max_tokens)
        if speaks_recall(encoder):
            made, what = recall_samples(encoder, count, least, seed), "recall conversations"
        else:
            made, what = builtin_samples(encoder, count, least, seed), "built-in samples"
        samples = [sample for sample in made if len(sample.token_ids) > chunk_size_tokens]
        if not samples:
            raise ConfigurationError(
                f"with --max-tokens {max_tokens} no built-in sample has more than the "
                f"{chunk_size_tokens} tokens of a chunk (--compression-chunk-size): give more "
                "--max-tokens, or a smaller chunk"
            )
        return samples, f"{what}, seed {seed}"
    if data.startswith(HUB):
        load = _datasets().load_dataset
        name = data.removeprefix(HUB)
        samples = draw_rows(name, load, encoder, count, chunk_size_tokens, seed, tell)
    else:
        path = Path(data)
        if path.suffix not in (".jsonl", ".json", ".txt"):
            raise ConfigurationError(
                f"--data {data}: give a .jsonl, .json or .txt file, hf:NAME[:SPLIT], or {BUNDLED}"
            )
        texts = read_plain(path, encoder) if path.suffix == ".txt" else read_json_lines(path)
        samples = draw(texts, encoder, count, chunk_size_tokens, seed)
    if not samples:
        raise ConfigurationError(
            f"--data {data}: no text has more than {chunk_size_tokens} tokens, so nothing of any "
            "would be compressed: give longer texts, or a smaller --compression-chunk-size"
        )
    return samples, f"{data}, seed {seed}"


def speaks_recall(encoder: Encoder) -> bool:
    """Whether the tokenizer is the recall model's.

    Its words are those of recall conversations, one token each, as `Conversation.context_tokens`
    counts; whatever else there is it spells in bytes, which its model never saw.
    """
    conversation = make_conversation(0, context_tokens=400, facts=8, turns=4)
    whole = Encoder(encoder.tokenizer, conversation.context_tokens + 1)
    sample = whole.encode(_recall_text(conversation))
    return len(sample.token_ids) == conversation.context_tokens


def recall_samples(encoder: Encoder, count: int, least_tokens: int, seed: int) -> list[Sample]:
    """Conversations of the recall model's own, of lengths spread up to the encoder's most."""
    samples = []
    for number, length in enumerate(spread_lengths(count, least_tokens, encoder.max_tokens)):
        facts = max(1, length // 75)
        talk = make_conversation(
            _FIRST_RECALL_SEED + seed * 10_000 + number, length, facts, min(10, facts)
        )
        samples.append(encoder.encode(_recall_text(talk)))
    return samples


def _recall_text(conversation: Conversation) -> Text:
    last = len(conversation.turns) - 1
    answer = {"role": "assistant", "content": conversation.turns[last].answer}
    return Text("recall", (*conversation.messages(last), answer))


def _datasets() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigurationError(
            "--data hf:... needs the datasets library, which is not installed: "
            "pip install datasets, or give a .jsonl or .txt file"
        ) from error
