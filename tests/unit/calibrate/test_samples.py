"""Texts in tokens, and where later answers lie in them."""

import pytest

from tangram.calibrate.texts.samples import Encoder, Sample, Text, held_back, spread_lengths
from tangram.errors import ConfigurationError
from tests.unit.calibrate.tokenizers import CHATML, STRICT, THOUGHTFUL, Slow, by_bytes

TURNS = (("user", "hello"), ("assistant", "hi you"), ("user", "and?"), ("assistant", "nothing"))
MESSAGES = tuple({"role": role, "content": content} for role, content in TURNS)


def predicted(sample, tokenizer):
    """The text whose tokens come after the sample's later positions."""
    return tokenizer.decode([sample.token_ids[position + 1] for position in sample.later])


def test_a_conversation_is_in_the_models_own_format():
    tokenizer = by_bytes()
    sample = Encoder(tokenizer, 1000).encode(Text("chat", MESSAGES))
    expected = tokenizer.apply_chat_template(
        [dict(m) for m in MESSAGES], tokenize=True, return_dict=False
    )
    assert list(sample.token_ids) == expected
    assert predicted(sample, tokenizer) == "nothing<|im_end|>"
    assert sample.measured_positions() == sample.later


def test_an_only_answer_is_a_later_one():
    tokenizer = by_bytes()
    sample = Encoder(tokenizer, 1000).encode(Text("chat", MESSAGES[:2]))
    assert predicted(sample, tokenizer) == "hi you<|im_end|>"


def test_without_a_template_roles_are_written_out():
    tokenizer = by_bytes(chat_template=None)
    sample = Encoder(tokenizer, 1000).encode(Text("chat", MESSAGES))
    text = "User: hello\n\nAssistant: hi you\n\nUser: and?\n\nAssistant: nothing"
    assert tokenizer.decode(sample.token_ids) == text
    assert predicted(sample, tokenizer) == "nothing"


def test_a_tokenizer_without_offsets_will_do():
    sample = Encoder(Slow(), 1000).encode(Text("chat", MESSAGES))
    told = "".join(chr(sample.token_ids[position + 1]) for position in sample.later)
    assert told == "nothing"


def chat(*answers):
    """A conversation in which a question comes before every answer."""
    turns = [(("user", "and?"), ("assistant", answer)) for answer in answers]
    return Text("chat", tuple({"role": r, "content": c} for turn in turns for r, c in turn))


@pytest.mark.parametrize("thoughts", ["<think>hm</think>\n\n", "hm\n</think>"])
def test_answers_are_found_without_the_thoughts_that_a_template_drops(thoughts):
    tokenizer = by_bytes(THOUGHTFUL)
    text = chat(*(thoughts + answer for answer in ("one", "two", "three")))
    told = predicted(Encoder(tokenizer, 1000).encode(text), tokenizer)
    assert told == "two<|im_end|>three<|im_end|>"


def test_a_later_answer_counts_where_the_first_was_dropped():
    tokenizer = by_bytes(CHATML.replace("m.content", "m.content.replace('one', '')"))
    sample = Encoder(tokenizer, 1000).encode(chat("one", "two", "three"))
    assert predicted(sample, tokenizer) == "two<|im_end|>three<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, None], ids=["template", "none"])
@pytest.mark.parametrize("answer", ["s", "a", "User", "and?"])
def test_short_answers_are_not_found_in_what_stands_around_them(template, answer):
    tokenizer = by_bytes(template)
    sample = Encoder(tokenizer, 1000).encode(chat("one", answer, answer))
    end = "<|im_end|>" if template else "\n"
    assert predicted(sample, tokenizer) == answer + end + answer + (end if template else "")


def test_a_template_that_begins_with_a_user_alone_finds_later_answers():
    """It raises for the conversation before the first answer."""
    tokenizer = by_bytes("{{ messages[0].content }}" + CHATML)
    greeting = {"role": "assistant", "content": "welcome"}
    text = Text("chat", (greeting, *chat("one", "two").messages))
    told = predicted(Encoder(tokenizer, 1000).encode(text), tokenizer)
    assert told == "one<|im_end|>two<|im_end|>"


@pytest.mark.parametrize("tokenizer", [Slow(), by_bytes()], ids=["slow", "fast"])
def test_a_text_of_no_tokens_is_an_empty_sample(tokenizer):
    sample = Encoder(tokenizer, 9).encode(Text("text", plain=""))
    assert (sample.token_ids, sample.later) == ((), ())


def test_plain_text_counts_with_its_last_eighth():
    sample = Encoder(by_bytes(), 1000).encode(Text("text", plain="x" * 80))
    assert len(sample.token_ids) == 80 and sample.later == ()
    assert sample.measured_positions() == tuple(range(70, 80))


def test_answers_before_the_first_boundary_tell_nothing():
    sample = Sample("chat", tuple(range(80)), (5, 9, 40))
    assert sample.measured_positions(9) == (9, 40)
    assert sample.measured_positions(41) == tuple(range(70, 80))


def test_the_clock_is_not_in_the_samples():
    """A calibration that is taken up again on another day would begin anew."""
    tokenizer = by_bytes("{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}" + CHATML)
    sample = Encoder(tokenizer, 1000).encode(Text("chat", MESSAGES))
    assert tokenizer.decode(sample.token_ids).startswith("01 Jan 2025 00:00:00.000000")


def test_the_end_of_what_is_too_long_is_cut():
    whole = Encoder(by_bytes(), 1000).encode(Text("chat", MESSAGES))
    cut = Encoder(by_bytes(), whole.later[2] + 1).encode(Text("chat", MESSAGES))
    assert cut.token_ids == whole.token_ids[: whole.later[2] + 1]
    assert cut.later == whole.later[:2]


def test_a_template_that_refuses_names_the_place():
    system = ({"role": "system", "content": "be kind"}, *MESSAGES)
    with pytest.raises(ConfigurationError, match="line 7.*chat template.*no system.*system, user"):
        Encoder(by_bytes(STRICT), 99).encode(Text("chat", system, where="chats.jsonl, line 7"))


@pytest.mark.parametrize("count", [1, 2, 7, 50])
def test_lengths_are_spread_between_the_bounds(count):
    lengths = spread_lengths(count, 512, 4096)
    assert len(lengths) == count and lengths[0] == 4096
    assert all(512 <= length <= 4096 for length in lengths)
    assert len(set(lengths)) == count


@pytest.mark.parametrize(("count", "held"), [(4, 3), (6, 3), (15, 7), (20, 8), (50, 17)])
def test_enough_are_held_back_to_tell_budgets_apart(count, held):
    """Of three conversations one had the last word, which chose budgets that answered less."""
    numbers = held_back(count)
    assert len(set(numbers)) == len(numbers) == held
    assert min(numbers) >= 0 and max(numbers) < count


def test_too_few_to_hold_back_are_refused():
    with pytest.raises(ConfigurationError, match="--samples 4 or more, or --no-measure"):
        held_back(3)
