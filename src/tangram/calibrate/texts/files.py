"""Texts of the user's own: JSON lines, plain text, and rows of a dataset."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tangram.calibrate.texts.rows import text_of
from tangram.calibrate.texts.samples import Encoder, Sample, Text
from tangram.errors import ConfigurationError, TextError
from tangram.json_values import NotJSONError, json_values

_ROWS_A_SAMPLE = 40
"""Rows of a dataset that are read at most for every sample that is asked for."""


def read_json_lines(path: Path) -> list[Text]:
    """The texts of a file with one JSON object a line, or one array of them.

    Raises:
        ConfigurationError: it cannot be read, or has a line that is none; names file and line.
    """
    texts = []
    try:
        for number, row in json_values(_read(path)):
            where = f"{path}, line {number}"
            if not isinstance(row, dict):
                raise TextError(where, f"expected a JSON object, got {type(row).__name__}")
            texts.append(text_of(row, where))
    except NotJSONError as error:
        raise TextError(f"{path}, line {error.line}", f"no JSON object ({error})") from error
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
