"""Texts of the user's own: JSON lines, plain text, and rows of a dataset."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tangram.calibrate.texts.samples import Encoder, Sample, Text
from tangram.errors import ConfigurationError, TextError

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_ROWS_A_SAMPLE = 40
"""Rows of a dataset that are read at most for every sample that is asked for."""
FORMS = '"messages", "conversations", "text", or "prompt" and "completion"'


def text_of(row: Mapping[str, Any], where: str) -> Text:
    """The text in a row.

    Args:
        row: an object with `messages` (`role`, `content`), `conversations` (`from`, `value`),
            `prompt` and `completion`, or `text`; what is null counts as left out, because a
            dataset gives every row the keys of all rows.
        where: its place, for errors.

    Raises:
        TextError: it has none of these, or not as expected; names the place.
    """
    row = _without_nulls(row)
    if "messages" in row or "conversations" in row:
        name = "messages" if "messages" in row else "conversations"
        messages = row[name]
        if not isinstance(messages, list) or not messages:
            raise TextError(where, f'"{name}" is to be a list of messages, got {messages!r:.60}')
        spoken = tuple(_message(message, where) for message in messages)
        return _readable(Text("chat", spoken, where=where))
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        turns = (("user", row["prompt"]), ("assistant", row["completion"]))
        messages = tuple({"role": role, "content": content} for role, content in turns)
        return _readable(Text("completion", messages, where=where))
    if isinstance(row.get("text"), str):
        return _readable(Text("text", plain=row["text"], where=where))
    raise TextError(where, f"expected {FORMS}, got the keys {', '.join(sorted(row)) or 'none'}")


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise TextError(where, f"a message is to be an object, got {message!r:.60}")
    message = _without_nulls(message)
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list):  # parts, of which the text is what a language model reads
        content = "".join(str(p.get("text") or "") for p in content if isinstance(p, Mapping))
    if not isinstance(role, str) or not isinstance(content, str):
        raise TextError(
            where,
            'a message needs a text under "role" and "content", or "from" and "value", got '
            f"{', '.join(map(str, message)) or 'nothing'}",
        )
    return {"role": _SHAREGPT_ROLES.get(role, role), "content": content}


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None}


def _readable(text: Text) -> Text:
    """The text, if a tokenizer can take it: JSON may spell halves of characters."""
    try:
        for part in (text.plain, *(part for message in text.messages for part in message.values())):
            part.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(text.where, f"its text is no Unicode ({error.reason})") from error
    return text


def read_json_lines(path: Path) -> list[Text]:
    """The texts of a file with one JSON object a line; empty lines are passed over.

    Raises:
        ConfigurationError: it cannot be read, or has a line that is none; names file and line.
    """
    texts = []
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TextError(where, f"no JSON object ({error})") from error
        if not isinstance(row, dict):
            raise TextError(where, f"expected a JSON object, got {type(row).__name__}")
        texts.append(text_of(row, where))
    return texts


def read_plain(path: Path, encoder: Encoder) -> list[Text]:
    """Pieces of a text file: paragraphs (parted by empty lines) as long as they fit a sample."""
    pieces: list[list[str]] = [[]]
    tokens = 0
    for paragraph in re.split(r"\n[ \t\r]*\n", _read(path)):
        if not paragraph.strip():
            continue
        length = encoder.count(paragraph) + 1
        if pieces[-1] and tokens + length > encoder.max_tokens:
            pieces.append([])
            tokens = 0
        pieces[-1].append(paragraph)
        tokens += length
    return [
        Text("text", plain="\n\n".join(piece), where=f"{path}, piece {number}")
        for number, piece in enumerate(pieces, start=1)
        if piece
    ]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"--data {path} cannot be read as UTF-8 text: {error}; give a .jsonl or .txt file, "
            "hf:NAME, or bundled"
        ) from error


def draw(
    texts: Sequence[Text], encoder: Encoder, count: int, more_than: int, seed: int
) -> list[Sample]:
    """Samples of texts drawn without replacement, those that are long enough.

    Args:
        texts: to draw from.
        encoder: makes samples.
        count: at most as many samples.
        more_than: tokens; shorter texts say nothing about what is kept.
        seed: of the order.
    """
    order = list(texts)
    random.Random(seed).shuffle(order)
    return _long_ones(map(encoder.encode, order), count, more_than)


def draw_rows(
    name: str,
    load: Callable[..., Any],
    encoder: Encoder,
    count: int,
    more_than: int,
    seed: int,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Sample]:
    """Samples of a Hugging Face dataset, read as a stream and shuffled on the way.

    A row that no sample can be made of is skipped: it is not the user's to mend.

    Args:
        name: `NAME`, or `NAME:SPLIT`; the split is `train` otherwise.
        load: `datasets.load_dataset`.
        encoder: makes samples.
        count: at most as many samples.
        more_than: tokens; shorter texts are passed over.
        seed: of the order.
        tell: called with a line about rows that were skipped, if there were any.

    Raises:
        ConfigurationError: there is no such dataset, or rows were skipped and none is left; names
            the first of them.
    """
    faults: list[str] = []

    def encoded() -> Iterator[Sample]:
        for number, row in enumerate(_rows(name, load, _ROWS_A_SAMPLE * count, seed), start=1):
            try:
                text = text_of(row, f"hf:{name}, row {number} of the shuffled stream")
                sample = encoder.encode(text)
            except TextError as error:
                faults.append(error.fault)
            else:
                yield sample

    samples = _long_ones(encoded(), count, more_than)
    if faults:
        line = f"rows skipped, as no sample can be made of them: {len(faults)}; first {faults[0]}"
        if not samples:
            raise ConfigurationError(
                f"--data hf:{name}: no row has a text of more than {more_than} tokens; {line}: "
                "give another dataset or split, or a file"
            )
        tell(line)
    return samples


def _rows(name: str, load: Callable[..., Any], most: int, seed: int) -> Iterator[Mapping[str, Any]]:
    dataset, _, split = name.partition(":")
    try:
        rows = load(dataset, split=split or "train", streaming=True)
        yield from islice(rows.shuffle(seed=seed, buffer_size=1000), most)
    except Exception as error:  # offline, gated, unknown, a bad split: the library has many
        reason = str(error).strip().split("\n")[0]
        raise ConfigurationError(
            f"--data hf:{name} could not be read ({type(error).__name__}: {reason}): check the "
            "name, the split, the network and the access token, or give a file"
        ) from error


def _long_ones(samples: Iterable[Sample], count: int, more_than: int) -> list[Sample]:
    return list(islice((s for s in samples if len(s.token_ids) > more_than), count))
