"""Needles in several wordings: answerable from the text, drawn from a seed, unlike calibration."""

import argparse
import json
import re

import pytest

from benchmarks.accuracy.needles import TASKS, add_needles, describe_model, make_scripts, make_tasks
from benchmarks.accuracy.wordings import CHAINS, FACTS
from tangram.calibrate.texts import phrases
from tangram.errors import ConfigurationError
from tangram.evaluate.chat import ChatFormat
from tangram.evaluate.tasks import Sizes
from tests.unit.evaluate.conftest import byte_tokenizer

SIZES = Sizes(context_tokens=9000, conversations=5, questions=3, seed=3)


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(byte_tokenizer(), "bytes")


def told(wording, context):
    """key -> values, read from the text by the patterns alone."""
    table = {}
    for pattern in wording.told:
        regex = re.escape(pattern.strip()).replace(r"\{key\}", r"(?P<key>[\w-]+)")
        regex = regex.replace(r"\{value\}", r"(?P<value>[\w-]+)")
        for match in re.finditer(regex, context):
            table.setdefault(match["key"], []).append(match["value"])
    return table


def solve_chain(wording, context, value):
    def found(pattern, **names):
        regex = re.escape(pattern.strip())
        for name in names:
            regex = regex.replace(rf"\{{{name}\}}", rf"(?P<{name}>\w+)")
        return [match.groupdict() for match in re.finditer(regex, context)]

    holders = [m["name"] for m in found(wording.first, name=1, value=1) if m["value"] == value]
    links = found(wording.link, name=1, source=1)
    for name in holders:
        holders += [m["name"] for m in links if m["source"] == name]
    return holders


@pytest.mark.parametrize("filler", ["builtin", "python-manual"])
@pytest.mark.parametrize("name", ["multikey", "multivalue"])
def test_the_text_alone_tells_every_value_in_every_wording(name, filler, chat):
    task = make_tasks([name], filler)[name]
    dialogues = task.dialogues(SIZES, chat.measure)
    assert [d.questions[0].kind for d in dialogues] == [wording.kind for wording in FACTS]
    for wording, dialogue in zip(FACTS, dialogues, strict=True):
        table = told(wording, dialogue.context)
        assert len(table) == (12 if name == "multikey" else 3)
        for question in dialogue.questions:
            assert sorted(table[question.name]) == sorted(question.expected)
            assert question.name in question.text and question.text not in dialogue.context
            assert task.score(question, f"It is {' and '.join(table[question.name])}.") == 1
            others = [v for key, found in table.items() if key != question.name for v in found]
            assert task.score(question, " ".join(others)) == 0
        assert 0.9 * SIZES.context_tokens < chat.measure(dialogue) <= SIZES.context_tokens


def test_the_text_alone_tells_every_chain(chat):
    task = make_tasks(["variable_tracking"], "builtin")["variable_tracking"]
    for wording, dialogue in zip(CHAINS, task.dialogues(SIZES, chat.measure), strict=False):
        for question in dialogue.questions:
            chain = solve_chain(wording, dialogue.context, question.name)
            assert len(chain) == 5 and sorted(chain) == sorted(question.expected)
            assert question.kind == wording.kind and question.name in question.text


def test_wordings_differ_within_a_conversation_and_no_value_is_part_of_another(chat):
    asked = set()
    for seed in range(4):
        sizes = Sizes(9000, len(FACTS), 3, seed)
        for wording, dialogue in zip(
            FACTS, make_tasks(["multikey"], "builtin")["multikey"].dialogues(sizes, chat.measure),
            strict=True,
        ):  # fmt: skip
            asked |= {q.text.replace(q.name, "{key}") for q in dialogue.questions}
            values = [v for found in told(wording, dialogue.context).values() for v in found]
            assert len({len(value) for value in values}) == 1 and len(set(values)) == len(values)
    assert asked == {pattern for wording in FACTS for pattern in wording.asked}


def test_no_wording_is_a_fact_of_the_calibration_samples():
    def bare(pattern):
        return re.sub(r"\{\w+\}", "", pattern).split()

    theirs = [bare(part) for told, asked, answer in phrases.FACTS for part in (told, *asked)]
    for wording in FACTS:
        for pattern in (*wording.told, *wording.asked, *wording.asked_all):
            assert bare(pattern) not in theirs


def options(*argv):
    parser = argparse.ArgumentParser()
    add_needles(parser, seeds=5, questions=960)
    return parser.parse_args(argv)


def test_as_many_questions_as_asked_for_over_all_seeds(chat):
    args = options("--tasks", "multikey", "--context-tokens", "4000", "--seeds", "3",
                   "--questions", "20", "--questions-per-conversation", "2")  # fmt: skip
    scripts = make_scripts(args, chat)
    assert [script.sizes.seed for script in scripts] == [1, 2, 3]
    assert [script.num_questions for script in scripts] == [8, 8, 8]
    assert len({script.digest for script in scripts}) == 3
    assert [s.digest for s in make_scripts(args, chat)] == [s.digest for s in scripts]
    default = options()
    assert (default.seeds, default.questions, default.context_tokens) == (5, 960, [4096, 16384])
    assert default.tasks == list(TASKS)


def test_filler_that_is_too_short_is_named(chat, tmp_path):
    (tmp_path / "a.txt").write_text("One sentence of a real text, and another one. " * 20)
    task = make_tasks(["multikey"], str(tmp_path))["multikey"]
    with pytest.raises(ConfigurationError, match="no more filler"):
        task.dialogues(SIZES, chat.measure)


def test_a_model_is_known_by_its_weights(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    nameless = describe_model("hub/name", {"a": 1})
    assert nameless["model"] == "hub/name" and nameless["sha256_of"] == "config"
    assert nameless != describe_model("hub/name", {"a": 2})
    (folder / "model.safetensors").write_bytes(b"one")
    found = describe_model(str(folder), {"a": 1})
    assert (found["model"], found["sha256_of"]) == ("m", "weights")
    (folder / "model.safetensors").write_bytes(b"two")
    assert describe_model(str(folder), {"a": 1})["sha256"] != found["sha256"]
    assert json.dumps(found)
