"""Texts of the user's own: what is understood, and what is said of what is not."""

import json

import pytest

from tangram.calibrate.texts import files as texts
from tangram.calibrate.texts.samples import Encoder, Text
from tangram.errors import ConfigurationError
from tests.unit.calibrate.tokenizers import STRICT, by_bytes

CHAT = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*CHAT], "id": 1},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": "a", "completion": "b"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, CHAT[1]]},
        {"messages": [{"role": "user", "content": [{"text": None}, {"text": "a"}]}, CHAT[1]]},
        {
            "messages": None,
            "conversations": [
                {"from": "human", "value": "a", "role": None, "content": None},
                {"role": "assistant", "content": "b", "from": None},
            ],
        },
    ],
    ids=["openai", "sharegpt", "prompt", "parts", "parts without text", "nulls"],
)
def test_conversations_are_understood(row):
    text = texts.text_of(row, "here")
    assert text.messages == CHAT and text.where == "here"


def test_plain_text_is_understood():
    assert texts.text_of({"text": "abc"}, "here") == Text("text", plain="abc", where="here")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "no JSON object"),
        ("[1]", "got list"),
        ('{"answer": 1}', "got the keys answer"),
        ('{"messages": []}', "list of messages"),
        ('{"messages": ["hi"]}', "a message is to be an object"),
        ('{"messages": [{"role": "user"}]}', '"role" and "content"'),
        ('{"text": "half \\ud83d"}', "no Unicode"),
        ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "no Unicode"),
        ('{"prompt": "a", "completion": "\\ude00"}', "no Unicode"),
        pytest.param("[" * 100_000, "no JSON object", id="nested deeply"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n\n" + line + "\n")
    with pytest.raises(ConfigurationError) as error:
        texts.read_json_lines(path)
    assert f"{path}, line 3" in str(error.value) and words in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    for name in ("missing.jsonl", "bytes.jsonl"):
        with pytest.raises(ConfigurationError, match=f"--data .*{name}"):
            texts.read_json_lines(tmp_path / name)


def test_paragraphs_are_joined_as_long_as_they_fit(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(["x" * 30] * 5 + ["y" * 300]))
    found = texts.read_plain(path, Encoder(by_bytes(), 100))
    assert [len(text.plain) for text in found] == [94, 62, 300]
    assert found[1].where == f"{path}, piece 2"


def test_paragraphs_are_parted_by_lines_that_look_empty(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeffone\n \t\ntwo\r\n\r\nthree".encode())
    found = texts.read_plain(path, Encoder(by_bytes(), 1))
    assert [text.plain.strip() for text in found] == ["one", "two", "three"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes('\ufeff{"text": "x"}'.encode())
    (text,) = texts.read_json_lines(path)
    assert text.plain == "x"


def test_texts_are_drawn_by_the_seed_and_short_ones_are_passed_over():
    encoder = Encoder(by_bytes(), 100)
    given = [Text("text", plain=chr(97 + i) * (20 if i % 2 else 60)) for i in range(20)]
    drawn = texts.draw(given, encoder, 6, 40, seed=1)
    assert len(drawn) == 6 and all(len(sample.token_ids) == 60 for sample in drawn)
    assert len({sample.token_ids for sample in drawn}) == 6
    assert drawn == texts.draw(given, encoder, 6, 40, seed=1)
    assert drawn != texts.draw(given, encoder, 6, 40, seed=2)
    assert len(texts.draw(given, encoder, 50, 40, seed=1)) == 10


class Rows(list):
    """What `datasets.load_dataset(..., streaming=True)` gives."""

    def shuffle(self, seed, buffer_size):
        return iter(self[seed:] + self[:seed])


def test_rows_of_a_dataset_are_drawn():
    asked = []

    def load(name, split, streaming):
        asked.append((name, split, streaming))
        return Rows({"text": letter * 50} for letter in "abcd")

    encoder = Encoder(by_bytes(), 100)
    drawn = texts.draw_rows("org/chats:test", load, encoder, 2, 40, seed=3)
    assert [by_bytes().decode(sample.token_ids)[0] for sample in drawn] == ["d", "a"]
    texts.draw_rows("org/chats", load, encoder, 2, 40, seed=3)
    assert asked == [("org/chats", "test", True), ("org/chats", "train", True)]


def strict_chat(role):
    """A row that the strict template takes, or not."""
    return {"messages": [{"role": role, "content": "a" * 50}, CHAT[1]]}


def test_rows_that_no_sample_can_be_made_of_are_skipped_and_told():
    """A conversation that the chat template refused ended the run, and so did a row of no text."""
    rows = Rows([strict_chat("system"), strict_chat("user"), {"label": 1}, {"text": "b" * 50}])
    told = []
    drawn = texts.draw_rows(
        "org/x", lambda *a, **k: rows, Encoder(by_bytes(STRICT), 99), 9, 40, 0, told.append
    )
    assert [sample.kind for sample in drawn] == ["chat", "text"]
    (line,) = told
    assert ": 2; first hf:org/x, row 1 of" in line and "chat template" in line and "system" in line
    assert "mend" not in line and "\n" not in line


def test_nothing_is_told_where_no_row_was_skipped():
    rows = Rows([{"text": "short"}, {"text": "a" * 50}, {"label": 1}])
    drawn = texts.draw_rows(
        "org/x", lambda *a, **k: rows, Encoder(by_bytes(), 99), 1, 40, 0, pytest.fail
    )
    assert len(drawn) == 1


def test_where_no_row_is_left_the_first_that_was_skipped_is_named():
    rows = Rows([{"text": "short"}, strict_chat("system"), strict_chat("system")])
    with pytest.raises(ConfigurationError, match="--data hf:org/x: .*: 2; first hf:org/x, row 2 "):
        texts.draw_rows(
            "org/x", lambda *a, **k: rows, Encoder(by_bytes(STRICT), 99), 9, 40, 0, pytest.fail
        )


def test_a_dataset_that_fails_or_holds_no_text_is_named():
    def gone(name, split, streaming):
        raise OSError("offline")

    with pytest.raises(ConfigurationError, match="hf:org/x could not be read .OSError: offline"):
        texts.draw_rows("org/x", gone, Encoder(by_bytes(), 100), 2, 40, seed=0)
    rows = Rows([{"text": "a"}, {"label": 1}])
    with pytest.raises(ConfigurationError, match="hf:org/x, row 2 .*keys label"):
        texts.draw_rows("org/x", lambda *a, **k: rows, Encoder(by_bytes(), 100), 2, 40, seed=0)


def test_a_folder_of_mixed_rows_is_read_with_the_library(tmp_path):
    """The library gives every row the keys of all rows, with nulls where a row lacks them."""
    datasets = pytest.importorskip("datasets", reason="hf:NAME needs the datasets library")
    spoken = [{"from": "human", "value": "c" * 50}, {"from": "gpt", "value": "d"}]
    rows = [
        {"text": "a" * 50},
        {"messages": [{"role": "user", "content": "b" * 50}, CHAT[1]]},
        {"conversations": spoken},
        {"prompt": "e" * 50, "completion": "f"},
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows * 5)))
    encoder = Encoder(by_bytes(), 100)
    load = datasets.load_dataset
    drawn = texts.draw_rows(f"{tmp_path}:test", load, encoder, 20, 40, seed=0)
    assert sorted(sample.kind for sample in drawn) == [
        *["chat"] * 10, *["completion"] * 5, *["text"] * 5,
    ]  # fmt: skip
    assert drawn == texts.draw_rows(f"{tmp_path}:test", load, encoder, 20, 40, seed=0)
    with pytest.raises(ConfigurationError, match="Bad split: train"):
        texts.draw_rows(str(tmp_path), load, encoder, 20, 40, seed=0)
