"""Rows of files as they are found: what is read of each, and what is said of the others."""

import json
from pathlib import Path

import pytest

from tangram.calibrate.texts.files import draw_rows, read_json_lines
from tangram.calibrate.texts.rows import text_of
from tangram.calibrate.texts.samples import Encoder
from tangram.errors import TextError
from tests.unit.calibrate.templates import AGENT, CALLS_ALONE, JSON_ARGUMENTS, KNOWN_ROLES
from tests.unit.calibrate.tokenizers import CHATML, by_bytes

DATA = Path(__file__).resolve().parents[2] / "data" / "texts"


def texts(name):
    return read_json_lines(DATA / f"{name}.jsonl")


def lines(name):
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


def written(text, template):
    """(the sample's text, what its later answers are predicted to be)."""
    tokenizer = by_bytes(template)
    sample = Encoder(tokenizer, 10**6).encode(text)
    later = tokenizer.decode([sample.token_ids[position + 1] for position in sample.later])
    return tokenizer.decode(sample.token_ids), later


def chat(*messages, **more):
    return text_of({"messages": list(messages), **more}, "chats.jsonl, line 7")


USER = {"role": "user", "content": "Who reads the names aloud?"}
SAID = {"role": "assistant", "content": "The keeper does."}


def called(arguments='{"port": "north"}', **more):
    function = {"name": "tide_table", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"function": function}], **more}


@pytest.mark.parametrize("number", range(len(lines("names_of_roles"))))
def test_roles_go_by_many_names(number):
    """Templates that know three roles passed over the others, and the run went on without them."""
    text = texts("names_of_roles")[number]
    assert [m["role"] for m in text.messages] == ["user", "assistant"] * 2
    whole, later = written(text, KNOWN_ROLES)
    for turn in lines("names_of_roles")[number]["conversations"]:
        assert turn["value"] in whole
    assert later == text.messages[3]["content"] + "<|im_end|>"


@pytest.mark.parametrize(
    ("names", "role"),
    [
        (("system", "System", "developer"), "system"),
        (("tool", "function", "observation", "ipython", " Observation"), "tool"),
        (("User", "HUMAN"), "user"),
        (("narrator",), "narrator"),
    ],
)
def test_roles_are_known_in_any_case(names, role):
    for name in names:
        (message,) = chat({"role": name, "content": "At noon."}).messages
        assert message == {"role": role, "content": "At noon."}


@pytest.mark.parametrize(
    ("role", "left_out"), [("narrator", "message 2 .role narrator."), ("observation", "role tool")]
)
def test_a_message_that_the_template_passes_over_is_told(role, left_out):
    text = chat(USER, {"role": role, "content": "Fog."}, SAID)
    with pytest.raises(TextError, match=f"^chats.jsonl, line 7: .*leaves out .*{left_out}"):
        written(text, KNOWN_ROLES)
    assert "Fog." in written(text, CHATML)[0]


def test_rows_of_a_dataset_with_such_a_message_are_counted():
    class Rows(list):
        def shuffle(self, seed, buffer_size):
            return iter(self)

    good = {"messages": [USER, SAID]}
    lost = {"messages": [USER, {"role": "narrator", "content": "Fog."}, SAID]}
    rows, told = Rows([good, lost, good, lost]), []
    drawn = draw_rows(
        "org/x", lambda *a, **k: rows, Encoder(by_bytes(KNOWN_ROLES), 999), 9, 1, 0, told.append
    )
    assert len(drawn) == 2
    (line,) = told
    assert ": 2; first hf:org/x, row 2 of" in line and "narrator" in line


def test_an_empty_message_may_be_passed_over():
    text = chat({"role": "narrator", "content": " \n"}, USER, SAID)
    assert written(text, KNOWN_ROLES)[1] == "The keeper does.<|im_end|>"


def test_what_a_template_trims_or_escapes_is_there():
    text = chat(USER, {"role": "tool", "content": '  {"fog":\n"none"} \n'}, SAID)
    assert '\\"fog\\":\\n' in written(text, AGENT)[0]


@pytest.mark.parametrize("number", range(len(lines("forms"))))
def test_forms_are_read(number):
    text = texts("forms")[number]
    assert [m["role"] for m in text.messages] == ["user", "assistant"]
    asked, answered = (m["content"] for m in text.messages)
    assert "blue book before noon." in asked and "Who writes the numbers, and when?" in asked
    assert answered == "The keeper writes them into a blue book before noon."


def test_a_file_may_be_one_array(tmp_path):
    path = tmp_path / "chats.json"
    path.write_text(json.dumps(lines("forms"), indent=1))
    found = read_json_lines(path)
    assert [t.messages for t in found] == [t.messages for t in texts("forms")]
    assert found[0].where == f"{path}, line 2"
    path.write_text('[\n{"text": "a"},\n{"note": "b"}\n]')
    with pytest.raises(TextError, match=f"{path}, line 3: expected"):
        read_json_lines(path)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"id": 1, "messages": []}, ["got the keys id, messages (empty)"]),
        ({"messages": "hello", "note": "x"}, ["messages (str)", "note"]),
        ({"prompt": "Who?"}, ['"prompt" and "completion"', "got the keys prompt (str)"]),
        ({"question": "Who?", "answer": "He."}, ["got the keys answer, question", '"instruction"']),
        ({"body": {"input": "Who?", "model": "m"}}, ["got the keys body.input (str), body.model"]),
        ({"instruction": "Go on.", "output": "Yes.", "history": [["a", "b"]]}, ['"history"']),
        ({"instruction": "Go on.", "output": "Yes.", "input": 3}, ['"input"', "got 3"]),
        ({"messages": [{"role": "user", "content": 3}]}, ["role (str), content (int)"]),
        ({"messages": [USER], "tools": "tide_table"}, ['"tools"', "'tide_table'"]),
        ({"messages": [USER], "tools": [{"type": "web_search"}]}, ['"tools"', '"name"']),
    ],
)  # fmt: skip
def test_what_is_not_read_is_named(row, said):
    with pytest.raises(TextError) as caught:
        text_of(row, "here")
    assert all(words in str(caught.value) for words in ["here: ", *said]), caught.value


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([{"type": "text", "text": {"value": "At noon."}}], "is to be a text.*'value'"),
        ([{"type": "text", "text": ["At noon."]}], "is to be a text"),
        (["At noon.", 12], "is to be a text.*12"),
        ([{"type": "tool_use", "name": "tide_table", "input": {}}], "tool_use"),
        ([{"type": "image_url", "image_url": {"url": "x"}}], "no part of a message has a text"),
    ],
)
def test_a_part_that_would_be_lost_is_told(parts, said):
    with pytest.raises(TextError, match=said):
        chat(USER, {"role": "assistant", "content": parts})


@pytest.mark.parametrize("template", [AGENT, JSON_ARGUMENTS], ids=["objects", "json"])
@pytest.mark.parametrize("number", range(len(lines("agents"))))
def test_agents_are_written_whole(number, template):
    text = texts("agents")[number]
    whole, later = written(text, template)
    if text.tools:
        assert "High and low water of a port" in whole and len(text.tools) == 1
        assert (
            '{"name": "tide_table", "arguments": {"port": "north harbour", "day": "Friday"}}'
            in whole
        )
        assert r"\"high\": \"16:10\"" in whole  # what the tool answered, as JSON writes texts
    for said in text.messages:
        assert said["role"] == "tool" or said["content"] in whole
    assert later.endswith("Only before noon.<|im_end|>")
    assert "High water is at ten past four" in later or not text.tools


def test_calls_belong_to_the_answer():
    text = chat(USER, SAID, USER, called(content="Wait."), {"role": "tool", "content": "3"}, SAID)
    call = '{"name": "tide_table", "arguments": {"port": "north"}}'
    whole, later = written(text, AGENT)
    assert later == (
        f"Wait.<tool_call>\n{call}\n</tool_call><|im_end|>\nThe keeper does.<|im_end|>"
    )
    silent = chat(USER, SAID, USER, called(), {"role": "tool", "content": "3"}, SAID)
    assert written(silent, AGENT)[1] == later.removeprefix("Wait.")


def test_thoughts_may_be_left_out_of_earlier_turns():
    """The text departs at the first of them from that of a conversation that ends there."""
    first, second = ({"reasoning_content": said} for said in ("Fog, hm.", "Noon, hm."))
    text = chat(
        USER, SAID | first, USER, called() | first, {"role": "tool", "content": "3"}, SAID | first,
        USER, called() | second, {"role": "tool", "content": "4"}, SAID | second,
    )  # fmt: skip
    whole, later = written(text, AGENT)
    assert whole.count("Fog, hm.") == 0 and whole.count("Noon, hm.") == 2
    assert later.count("<tool_call>") == 2 and later.count("Noon, hm.") == 2
    assert later.count("The keeper does.<|im_end|>") == 2


@pytest.mark.parametrize(
    ("template", "message", "left_out"),
    [
        (KNOWN_ROLES, called(), "template leaves out the call of tide_table in message 2 .role as"),
        (CHATML, called(content="Wait."), "template leaves out the call of tide_table"),
        (None, called(), "a text without chat template leaves out the call of tide_table"),
        (CALLS_ALONE, called(content="Wait."), "template leaves out message 2 .role assistant."),
    ],
)
def test_a_call_that_is_not_written_is_told(template, message, left_out):
    with pytest.raises(TextError, match=f"line 7: .*{left_out}"):
        written(chat(USER, message), template)


def test_tools_that_are_not_written_are_told():
    tools = [{"name": "tide_table"}]
    with pytest.raises(TextError, match='leaves out the tools .drop "tools" to calibrate without'):
        written(chat(USER, SAID, tools=tools), CHATML)
    assert written(chat(USER, SAID, tools=[]), CHATML)[1] == "The keeper does.<|im_end|>"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (called("port north"), '"arguments" of the tool call tide_table .* .port north.'),
        (called("[1]"), "arguments"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}, '"name"'),
        ({"role": "assistant", "tool_calls": ["tide_table"]}, '"name", got .tide_table.'),
        ({"role": "assistant", "tool_calls": {"name": "x"}}, '"tool_calls" is to be a list'),
        ({"role": "assistant", "reasoning_content": ["hm"]}, '"reasoning_content" is to be a text'),
        ({"role": "user", "name": "Ana"}, "a message needs a text"),
    ],
)
def test_a_message_of_an_agent_that_would_be_lost_is_told(message, said):
    with pytest.raises(TextError, match=said):
        chat(USER, message)


@pytest.mark.parametrize("arguments", ["", "{}", None, {}])
def test_a_call_may_have_no_arguments(arguments):
    assert '"arguments": {}' in written(chat(USER, called(arguments)), AGENT)[0]


def test_nulls_of_other_rows_are_left_out_at_any_depth():
    """A dataset gives every tool the parameters of all."""
    text = chat(USER, called({"port": "north", "day": None}, content=None))
    assert '"arguments": {"port": "north"}' in written(text, AGENT)[0]
