"""The built-in samples: always the same, varied, and true to themselves."""

import re

import pytest

from tangram.calibrate.texts.generated import KINDS, builtin_samples, make_text
from tangram.calibrate.texts.samples import Encoder
from tangram.errors import ConfigurationError
from tests.unit.calibrate.tokenizers import by_bytes, by_words


def count(text: str) -> int:
    return len(text) // 4


def words_of(text) -> list[str]:
    return re.findall(r"\w+", " ".join(message["content"] for message in text.messages))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_text_and_another_another(kind):
    assert make_text(3, kind, 1000, count) == make_text(3, kind, 1000, count)
    assert make_text(3, kind, 1000, count) != make_text(4, kind, 1000, count)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [300, 3000])
def test_turns_alternate_and_the_length_is_as_asked(kind, num_tokens):
    for seed in range(5):
        text = make_text(seed, kind, num_tokens, count)
        roles = [message["role"] for message in text.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and len(roles) >= 4
        assert all(message["content"].strip() for message in text.messages)
        tokens = sum(count(message["content"]) + 8 for message in text.messages)
        assert num_tokens <= tokens < num_tokens + 1500


@pytest.mark.parametrize("kind", KINDS)
def test_answers_tell_what_was_told(kind):
    """Every figure of an answer, and every code, stands in an earlier message of the user."""
    figures = 0
    for seed in range(8):
        told = ""
        for message in make_text(seed, kind, 2000, count).messages:
            if message["role"] == "user":
                told += message["content"]
                continue
            for figure in re.findall(r"\b[\w.:-]*\d[\w.:-]*\b", message["content"]):
                assert figure in told
                figures += 1
    assert figures > 20


def test_texts_differ_from_each_other():
    """Between two samples of a kind few runs of eight words are the same."""
    for kind in KINDS:
        one, other = (words_of(make_text(seed, kind, 2500, count)) for seed in (1, 2))
        runs = [{tuple(w[i : i + 8]) for i in range(len(w) - 8)} for w in (one, other)]
        assert len(runs[0] & runs[1]) < 0.1 * min(map(len, runs))


def test_no_slot_is_left_open_and_no_list_is_torn():
    for kind in KINDS:
        for seed in range(10):
            text = make_text(seed, kind, 1500, count)
            for message in text.messages:
                assert not re.search(r"\{(who|first|noun|topic|city|place)\}", message["content"])
                assert not re.search(r"\b[Aa] [aeiou]", message["content"])


def test_samples_are_of_all_kinds_and_lengths():
    samples = builtin_samples(Encoder(by_bytes(), 4000), 2 * len(KINDS), 1000, seed=0)
    assert [sample.kind for sample in samples] == [*KINDS, *KINDS]
    lengths = [len(sample.token_ids) for sample in samples]
    assert max(lengths) == 4000 and min(lengths) < 2500
    assert all(sample.later for sample in samples)


def test_a_tokenizer_that_does_not_know_the_text_is_refused():
    with pytest.raises(ConfigurationError, match="does not know .* --data"):
        builtin_samples(Encoder(by_words("a few words"), 500), 4, 300, seed=0)
