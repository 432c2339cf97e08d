"""Files in the formats of public benchmarks; the records here are made up for the tests."""

import json
import re

import pytest

from tangram.errors import ConfigurationError
from tangram.evaluate.tasks import Sizes, get_task

SIZES = Sizes(None, 2, 2, 1)

SCBENCH = {
    "id": 0,
    "context": '{"k1": "v-one", "k2": "v-two", "k3": "v-three"}',
    "multi_turns": [
        {"input": 'The value of "k1"?', "answer": "v-one"},
        {"input": 'The value of "k3"?', "answer": "v-three"},
        {"input": 'The value of "k2"?', "answer": "v-two"},
    ],
}
LONGMEMEVAL = {
    "question_id": "q1",
    "question_type": "single-session-user",
    "question": "What is my bicycle called?",
    "answer": "The Comet",
    "question_date": "2024/03/02 (Sat) 10:00",
    "haystack_dates": ["2024/02/01 (Thu) 09:00", "2024/02/03 (Sat) 09:30"],
    "haystack_session_ids": ["s1", "s2"],
    "haystack_sessions": [
        [
            {"role": "user", "content": "My bicycle is called The Comet.", "has_answer": True},
            {"role": "assistant", "content": "A good name."},
        ],
        [{"role": "user", "content": "What is the tallest hill here?"}],
    ],
    "answer_session_ids": ["s1"],
}
LOCOMO = {
    "sample_id": "talk-1",
    "conversation": {
        "speaker_a": "Ana",
        "speaker_b": "Bo",
        "session_2_date_time": "9:00 am on 3 May, 2024",
        "session_2": [{"speaker": "Bo", "dia_id": "D2:1", "text": "I sold the boat."}],
        "session_1_date_time": "8:00 am on 1 May, 2024",
        "session_1": [
            {"speaker": "Ana", "dia_id": "D1:1", "text": "Look!", "blip_caption": "a red boat"},
        ],
        "session_3_date_time": "9:00 am on 9 May, 2024",
    },
    "qa": [
        {"question": "When was the boat sold?", "answer": 2024, "evidence": [], "category": 2},
        {"question": "What did they own?", "answer": "boat, kite", "evidence": [], "category": 1},
        {"question": "Who flew?", "adversarial_answer": "Bo", "evidence": [], "category": 5},
        {"question": "Rich?", "answer": "likely no; he sold it", "evidence": [], "category": 3},
    ],
}


@pytest.fixture
def write(tmp_path):
    def write(name, *records, array=False):
        path = tmp_path / name
        lines = [json.dumps(record) for record in records]
        path.write_text("[\n" + ",\n".join(lines) + "\n]" if array else "\n".join(lines) + "\n")
        return path

    return write


def dialogues(name, path, sizes=SIZES):
    return get_task(f"{name}:{path}").dialogues(sizes, lambda dialogue: 0)


@pytest.mark.parametrize("array", [False, True])
def test_scbench_gives_the_first_records_and_questions(write, array):
    path = write("scbench_kv.jsonl", *[SCBENCH] * 3, array=array)
    found = dialogues("scbench", path)
    assert len(found) == 2
    assert SCBENCH["context"] in found[0].context
    assert [question.gold for question in found[0].questions] == ["v-one", "v-three"]
    assert 'The value of "k1"?' not in found[0].context
    task = get_task(f"scbench:{path}")
    assert task.max_answer_tokens == 150
    assert task.score(found[0].questions[0], "It is v-one.") == 1
    assert task.score(found[0].questions[0], "It is V-one.") == 0


def scbench_score(write, part, turn, answer):
    record = {"context": [4, 5] if part == "mf" else "text", "multi_turns": [turn]}
    path = write(f"scbench_{part}.jsonl", record)
    ((question,),) = [dialogue.questions for dialogue in dialogues("scbench", path)]
    return get_task(f"scbench:{path}").score(question, answer)


@pytest.mark.parametrize(
    ("part", "answer", "reply", "score"),
    [
        ("vt", ["AAA", "BBB"], "bbb", 0.5),
        ("qa_eng", "Miss Daw", "it was miss daw", 1),
        ("many_shot", "(B)", "(B)", 1),
        ("many_shot", "(B)", "(C)", 0),
        ("many_shot", "A", "(B) 03/04/2001", 0),
        ("many_shot", "A", "(B) a sailor", 0),
        ("many_shot", "A", "The answer is (A)", 1),
        ("many_shot", "A", "A Tuesday, so (C)", 0),
        ("many_shot", "A", "A.", 1),
        ("many_shot", "A", "a day", 0),
        ("many_shot", ["A", "blue"], "Blue", 1),
        ("mf", 12, "The largest is 12.", 1),
        ("mf", 12, "12.5", 1),
        ("mf", 12.5, "12.5", 1),
        ("mf", 12.5, "12", 0),
        ("mf", -3, "-3", 1),
        ("mf", 3, "-3", 0),
        ("mf", 3, "x-3", 1),
        ("mf", 12, "120", 0),
        ("mf", 12, "none", 0),
        ("qa_chn", "北京", "北京。", 1),
        ("qa_chn", "北京", "北海", 0.5),
        ("prefix_suffix", "ab1cd", "ab1cd", 1),
    ],
)
def test_scbench_scores(write, part, answer, reply, score):
    turn = {"input": "Which?", "answer": answer}
    assert scbench_score(write, part, turn, reply) == pytest.approx(score)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("B", 1),
        ("B. two", 1),
        ("A", 0),
        ("two", 1),
        ("The correct answer is B", 1),
        ("the answer is: A, not B", 0),
        ("Because of it", 0),
        ("", 0),
        ("two.", 1),
        ("Two", 1),
        ("The answer is two.", 1),
        ("The answer is two, not A", 1),
        ("The answer is twofold, so A", 0),
        ("A man named Tom did it, so the answer is B.", 1),
        ("The correct answer is **B**, not A", 1),
        ("(B) two", 1),
        ("**A**", 0),
    ],
)
def test_scbench_choices(write, reply, score):
    turn = {"input": "Which?", "answer": "two", "options": ["one", "two", "three", "four"]}
    assert scbench_score(write, "choice_eng", turn, reply) == score


def test_an_article_is_no_choice(write):
    turn = {"input": "Which?", "answer": "x", "options": ["x", "sailor"]}
    assert scbench_score(write, "choice_eng", turn, "The answer is a sailor.") == 0
    assert scbench_score(write, "choice_eng", {**turn, "answer": "sailor"}, "A sailor") == 1


@pytest.mark.parametrize("answer", ["two", "B", ["two", "B"], ["B", "two"]])
def test_a_choice_may_be_published_as_its_letter(write, answer):
    turn = {"input": "Which?", "answer": answer, "options": ["one", "two", "three"]}
    path = write("scbench_choice_eng.jsonl", {"context": "book", "multi_turns": [turn]})
    (question,) = dialogues("scbench", path)[0].questions
    assert (question.gold, question.expected) == ("B", ("B", "two"))


def test_a_choice_that_is_no_option_is_told(write):
    turn = {"input": "Which?", "answer": "D", "options": ["one", "two", "three"]}
    path = write("scbench_choice_eng.jsonl", {"context": "book", "multi_turns": [turn]})
    with pytest.raises(ConfigurationError, match="neither one of up to 4 'options' nor its letter"):
        dialogues("scbench", path)


def test_scbench_shows_the_options(write):
    turn = {"input": "Which?", "answer": "two", "options": ["one", "two"]}
    path = write("scbench_choice_eng.jsonl", {"context": "book", "multi_turns": [turn]})
    assert dialogues("scbench", path)[0].questions[0].text == "Which?\nA. one\nB. two"


def test_longmemeval_tells_the_sessions_in_order(write):
    path = write("longmemeval_oracle.json", LONGMEMEVAL, array=True)
    (dialogue,) = dialogues("longmemeval", path)
    (question,) = dialogue.questions
    text = dialogue.context
    assert text.index("2024/02/01") < text.index("The Comet") < text.index("2024/02/03")
    assert "user: What is the tallest hill here?" in text
    assert "What is my bicycle called?" not in text
    assert "2024/03/02" in question.text and question.name == "q1"
    task = get_task(f"longmemeval:{path}")
    assert task.score(question, "Your bicycle is called comet!") == 1
    assert task.score(question, "Your bicycle is called Cometa.") == 0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            "7 days. 8 days (including the last day) is also acceptable.",
            ("7 days", "8 days"),
        ),
        ("7. 8 is also acceptable. Nine days are also acceptable", ("7", "8", "Nine days")),
        ("Dr. Smith. He is also kind.", ("Dr. Smith. He is also kind.",)),
        (3.5, ("3.5",)),
    ],
)
def test_longmemeval_takes_each_of_several_answers(write, answer, expected):
    path = write("longmemeval_oracle.json", {**LONGMEMEVAL, "answer": answer}, array=True)
    (question,) = dialogues("longmemeval", path)[0].questions
    assert question.expected == expected and question.gold == expected[0]
    task = get_task(f"longmemeval:{path}")
    assert [task.score(question, f"It took {text}.") for text in expected] == [1] * len(expected)
    assert task.score(question, "It took 17 days.") == 0


@pytest.mark.parametrize(
    ("answer", "reply", "score"),
    [
        ("The", "", 0),
        ("The", "The", 1),
        ("$3.50", "You spent $350.", 0),
        ("$3.50", "You spent $3.50.", 1),
        ("1,200", "1200 of them", 1),
        ("7:30 am", "at 7:30 am.", 1),
        ("7:30 am", "at 730 am.", 0),
    ],
)
def test_longmemeval_compares_words(write, answer, reply, score):
    path = write("longmemeval_oracle.json", {**LONGMEMEVAL, "answer": answer}, array=True)
    (question,) = dialogues("longmemeval", path)[0].questions
    assert get_task(f"longmemeval:{path}").score(question, reply) == score


def test_longmemeval_leaves_out_what_only_a_judge_can_score(write):
    rubric = {**LONGMEMEVAL, "question_type": "single-session-preference"}
    unanswerable = {**LONGMEMEVAL, "question_id": "q9_abs"}
    path = write("longmemeval.json", rubric, unanswerable, LONGMEMEVAL, array=True)
    (dialogue,) = dialogues("longmemeval", path)
    assert dialogue.questions[0].name == "q1"


def test_locomo_tells_the_sessions_by_number(write):
    path = write("locomo10.json", LOCOMO, array=True)
    (dialogue,) = dialogues("locomo", path, Sizes(None, 1, 9, 1))
    text = dialogue.context
    assert text.index("Ana: Look! [shows a red boat]") < text.index("Bo: I sold the boat.")
    assert [question.name for question in dialogue.questions] == [
        "talk-1/0", "talk-1/1", "talk-1/3",
    ]  # fmt: skip
    when, what, rich = dialogue.questions
    task = get_task(f"locomo:{path}")
    assert task.score(when, "In 2024.") == pytest.approx(2 / 3)
    assert task.score(what, "the boat, a kite") == 1
    assert task.score(what, "a kite") == 0.5
    assert rich.gold == "likely no"
    assert task.score(rich, "Likely no!") == 1


def test_locomo_draws_its_questions_by_the_seed(write):
    qa = [{**LOCOMO["qa"][0], "question": f"q {number}?"} for number in range(50)]
    path = write("locomo.json", {**LOCOMO, "qa": qa}, array=True)

    def drawn(seed):
        return [q.name for q in dialogues("locomo", path, Sizes(None, 1, 5, seed))[0].questions]

    assert len(drawn(1)) == 5
    assert drawn(1) == drawn(1) != drawn(2)


def test_a_locomo_record_of_unanswerable_questions_alone_is_left_out(write):
    unanswerable = {**LOCOMO, "sample_id": "talk-0", "qa": [LOCOMO["qa"][2]]}
    path = write("locomo.json", unanswerable, LOCOMO, array=True)
    (dialogue,) = dialogues("locomo", path, Sizes(None, 1, 9, 1))
    assert dialogue.questions[0].name == "talk-1/0"
    alone = write("alone.json", unanswerable, array=True)
    assert dialogues("locomo", alone) == []


def scbench(answer, **more):
    return {
        **SCBENCH,
        "multi_turns": [{"input": "Where do the boats lie?", "answer": answer} | more],
    }


@pytest.mark.parametrize(
    ("spec", "file", "record", "said"),
    [
        ("scbench", "scbench_kv.jsonl", scbench(""), "'answer' is blank, so that any reply"),
        ("scbench", "scbench_kv.jsonl", scbench(" \n"), "'answer' is blank"),
        ("scbench", "scbench_kv.jsonl", scbench([]), "'answer' is an empty list"),
        ("scbench", "scbench_kv.jsonl", scbench([None]), "'answer' is null, neither a text nor"),
        ("scbench", "scbench_qa_eng.jsonl", scbench(["", "in the harbour"]), "'answer' is blank"),
        ("scbench", "scbench_vt.jsonl", scbench(["XKJWA", ""]), "'answer' is blank"),
        ("scbench", "scbench_many_shot.jsonl", scbench(["A", ""]), "'answer' is blank"),
        ("scbench", "scbench_vt.jsonl", scbench([True]), "'answer' is true, neither"),
        ("scbench", "scbench_vt.jsonl", scbench([["XKJWA"]]), "'answer' is [\"XKJWA\"], neither"),
        (
            "scbench",
            "scbench_choice_eng.jsonl",
            scbench("B", options=["one", ""]),
            "an option is bl",
        ),
        (
            "scbench",
            "scbench_choice_eng.jsonl",
            scbench("A", options=["one", None]),
            "option is null",
        ),
        ("longmemeval", "l.json", {**LONGMEMEVAL, "answer": " "}, "'answer' is blank"),
        ("locomo", "l.json", {**LOCOMO, "qa": [{**LOCOMO["qa"][1], "answer": ""}]}, "blank"),
        ("locomo", "l.json", {**LOCOMO, "qa": [{**LOCOMO["qa"][3], "answer": "; he"}]}, "blank"),
    ],
)
def test_an_answer_that_any_reply_satisfies_is_told_with_its_line(write, spec, file, record, said):
    path = write(file, record)
    with pytest.raises(ConfigurationError, match=re.escape(said)) as caught:
        dialogues(spec, path)
    assert f"{path}, line 1" in str(caught.value)


def without(record, name):
    return {key: value for key, value in record.items() if key != name}


@pytest.mark.parametrize(
    ("spec", "file", "record", "said"),
    [
        ("scbench", "scbench_kv.jsonl", LOCOMO, "a field 'context' of type str or list"),
        ("scbench", "scbench_kv.jsonl", {**SCBENCH, "multi_turns": "x"}, "'multi_turns' of type"),
        ("scbench", "scbench_kv.jsonl", {**SCBENCH, "multi_turns": ["x"]}, "question 0 of SCBench"),
        ("scbench", "scbench_kv.jsonl", {**SCBENCH, "multi_turns": []}, "it has no question"),
        ("scbench", "scbench_mf.jsonl", SCBENCH, "'v-one', not a number"),
        ("longmemeval", "l.json", without(LONGMEMEVAL, "haystack_dates"), "'haystack_dates'"),
        ("longmemeval", "l.json", {**LONGMEMEVAL, "haystack_dates": []}, "0 haystack_dates"),
        ("locomo", "l.json", without(LOCOMO, "qa"), "'qa' of type list, found none"),
        ("locomo", "l.json", {**LOCOMO, "qa": []}, "no question of categories"),
        ("locomo", "l.json", "text", "a JSON object, found str"),
    ],
)
@pytest.mark.parametrize("array", [False, True])
def test_another_format_is_told_with_its_line(write, spec, file, record, said, array):
    good = {"scbench": SCBENCH, "longmemeval": LONGMEMEVAL, "locomo": LOCOMO}[spec]
    first = [] if file == "scbench_mf.jsonl" else [good]
    path = write(file, *first, record, array=array)
    line = len(first) + 1 + array
    with pytest.raises(ConfigurationError, match=re.escape(said)) as caught:
        dialogues(spec, path, Sizes(None, 9, 9, 1))
    assert f"{path}, line {line}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"a": 1}\n{"a": ', 2),
        ('[\n{"a": 1},\n\n{"a" 2}]', 4),
        ("[1", 1),
        ("[{}", 1),
        ('[{"a": 1}]\n\n[{"a": 2}]\n', 3),
    ],
)
def test_a_broken_file_is_told_with_its_line(tmp_path, text, line):
    from tangram.evaluate.tasks.records import read_records

    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=f"line {line}: (not JSON|expected a record)"):
        list(read_records(path, "a benchmark"))


@pytest.mark.parametrize(
    ("name", "said"),
    [("kv.json", None), ("scbench_summary.jsonl", "similarity"), ("data.jsonl", "tells none")],
)
def test_the_part_of_scbench_is_told_by_the_name(write, name, said):
    path = write(name, SCBENCH)
    if said is None:
        assert get_task(f"scbench:{path}").part == "kv"
    else:
        with pytest.raises(ConfigurationError, match=said):
            get_task(f"scbench:{path}")
