"""The tokenizer of models by shape: text for every id, and the same ids again."""

import random

import pytest
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer

from benchmarks.serving.sides import find_model
from benchmarks.serving.vllm_bench import with_tokenizer
from benchmarks.serving.words import write_tokenizer

VOCAB_SIZE = 5000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(write_tokenizer(VOCAB_SIZE, tmp_path_factory.mktemp("t")))


def test_every_id_has_text_of_its_own(tokenizer):
    ids = list(range(VOCAB_SIZE))
    random.Random(0).shuffle(ids)
    assert len(tokenizer) == tokenizer.vocab_size == VOCAB_SIZE
    assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) == ids
    assert tokenizer(tokenizer.decode(ids)).input_ids == ids


def test_an_answer_is_read_token_by_token(tokenizer):
    """A step without text keeps what it has read, the prompt too, and reads it all again."""
    prompt, answer = list(range(2000)), list(range(4999, 4000, -7))
    stream = DecodeStream(ids=prompt, skip_special_tokens=True)
    steps = [stream.step(tokenizer._tokenizer, token) for token in answer]
    assert [text.strip() for text in steps] == [f"t{token}" for token in answer]


def test_a_shape_is_served_with_text():
    model = find_model("tiny")
    assert "--skip-tokenizer-init" in model.arguments and not model.has_tokenizer
    served = with_tokenizer(model)
    assert served.has_tokenizer and "--skip-tokenizer-init" not in served.arguments
    option, folder = served.arguments[-2:]
    assert option == "--tokenizer"
    assert AutoTokenizer.from_pretrained(folder).vocab_size == model.vocab_size
    assert with_tokenizer(served) is served
