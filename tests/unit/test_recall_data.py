"""The recall task: its conversations, the bundled model's tokens, and what it was trained on."""

import importlib
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tangram import conversations as recall
from tangram.bundled import recall_model_path
from tangram.conversations import is_right, make_conversation
from tangram.errors import ConfigurationError

FOLDER = recall_model_path()
SCRIPTS = ("tokenizer", "model", "batches", "evaluation")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def scripts():
    """The modules beside the training script, imported as it imports them."""
    kept = {name: sys.modules.pop(name) for name in SCRIPTS if name in sys.modules}
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in SCRIPTS})
    finally:
        sys.path.remove(str(FOLDER))
        for name in SCRIPTS:
            del sys.modules[name]
        sys.modules.update(kept)


def whole(conversation) -> list[dict[str, str]]:
    """The finished conversation, the last answer included."""
    last = {"role": "assistant", "content": conversation.turns[-1].answer}
    return [*conversation.messages(len(conversation.turns) - 1), last]


def render(tokenizer, messages, prompt: bool = False) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)


# -- conversations -------------------------------------------------------------------------------


def test_same_arguments_give_the_same_conversation() -> None:
    assert make_conversation(7, 800, 10, 5) == make_conversation(7, 800, 10, 5)
    assert make_conversation(7, 800, 10, 5) != make_conversation(8, 800, 10, 5)


def test_a_seed_gives_what_it_always_gave() -> None:
    """Figures that name a seed stay reproducible."""
    turns = make_conversation(1, 120, 3, 2).turns
    assert [turn.answer for turn in turns] == ["1033", "9325"]
    assert turns[0].user.startswith("a lawyer gathered the statue at the street. the code of dock")
    assert turns[1].user.endswith("patient summer in the crossing. vinegar?")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("context_tokens", "facts", "turns"),
    [(60, 1, 1), (200, 5, 1), (200, 5, 4), (1024, 20, 20), (4096, 50, 7), (16384, 100, 25)],
)
def test_a_conversation_keeps_its_promises(seed, context_tokens, facts, turns) -> None:
    talk = make_conversation(seed, context_tokens, facts, turns)
    assert context_tokens - 10 <= talk.context_tokens <= context_tokens
    assert len(talk.turns) == turns
    assert len(talk.facts) == len(set(talk.facts.values())) == facts
    assert set(talk.facts) <= set(recall.KEYS)

    told: dict[str, str] = {}
    asked = []
    for turn in talk.turns:
        *_, question = re.split(r"(?<=\.) ", turn.user)
        facts_of_turn = re.findall(r"the code of (\w+) is (\d{4})\.", turn.user)
        assert not told.keys() & {key for key, _ in facts_of_turn}, "a fact is told once"
        told.update(facts_of_turn)
        (key,) = re.fullmatch(r"(?:what is the code of )?(\w+)\?", question).groups()
        asked.append(key)
        assert turn.answer == told[key], "told before it is asked"
    assert told == talk.facts
    assert len(set(asked)) == turns


def test_later_turns_tell_more() -> None:
    talk = make_conversation(3, 4096, 50, 10, later_share=0.3)
    first, *later = (recall.count_tokens(turn.user) for turn in talk.turns)
    assert 0.2 * talk.context_tokens < sum(later) < 0.4 * talk.context_tokens
    assert sum("the code of" in turn.user.split("what")[0] for turn in talk.turns[1:]) >= 2
    together = make_conversation(3, 4096, 50, 10, later_share=0.0)
    assert all(recall.count_tokens(turn.user) < 10 for turn in together.turns[1:])
    assert first < recall.count_tokens(together.turns[0].user)


def test_messages_are_the_history_up_to_a_question() -> None:
    talk = make_conversation(0, 300, 5, 3)
    assert talk.messages(0) == [{"role": "user", "content": talk.turns[0].user}]
    given = talk.messages(2, answers=["one", "two"])
    assert [m["role"] for m in given] == ["user", "assistant"] * 2 + ["user"]
    assert [m["content"] for m in given[1::2]] == ["one", "two"]
    assert talk.messages(2)[1]["content"] == talk.turns[0].answer
    with pytest.raises(ValueError):
        talk.messages(2, answers=["one"])


@pytest.mark.parametrize(
    ("context_tokens", "facts", "turns", "said"),
    [
        (200, 5, 6, "fewer turns"),
        (200, 0, 0, "fewer turns"),
        (10**5, 513, 1, "fewer turns"),
        (50, 5, 2, "longer context"),
    ],
)
def test_impossible_conversations_are_refused(context_tokens, facts, turns, said) -> None:
    with pytest.raises(ConfigurationError, match=said):
        make_conversation(0, context_tokens, facts, turns)


def test_an_answer_is_right_as_a_whole() -> None:
    assert is_right("4821", "4821") and is_right(" 4821\n", "4821")
    for wrong in ("", "482", "48211", "4821.", "0821", "the code is 4821"):
        assert not is_right(wrong, "4821")


def test_words_are_distinct() -> None:
    filler = [word for words in recall.SLOTS.values() for word in words]
    assert len(set(recall.KEYS)) == len(recall.KEYS) == 512
    assert len(set(filler)) == len(filler)
    assert not set(filler) & set(recall.KEYS)


# -- tokens --------------------------------------------------------------------------------------


def test_every_word_and_digit_pair_is_one_token(tokenizer) -> None:
    for word in recall.vocabulary():
        assert len(tokenizer.encode(f" {word}")) == 1, word
    for number in range(100):
        assert len(tokenizer.encode(f"{number:02}")) == 1
    assert tokenizer.vocab_size == len(tokenizer)


@pytest.mark.parametrize("seed", range(4))
def test_counted_tokens_are_the_templates(tokenizer, seed) -> None:
    talk = make_conversation(seed, 1500, 20, 6)
    assert len(render(tokenizer, whole(talk))) == talk.context_tokens


def test_a_conversation_comes_back_from_its_tokens(tokenizer) -> None:
    talk = make_conversation(2, 600, 8, 3)
    text = tokenizer.decode(render(tokenizer, whole(talk)))
    expected = "".join(
        f"<|user|> {t.user}<|end|><|assistant|>{t.answer}<|end|>" for t in talk.turns
    )
    assert text == expected


@pytest.mark.parametrize("seed", range(4))
def test_a_turn_and_its_answer_are_a_prefix_of_the_next(tokenizer, seed) -> None:
    """What prefix caching lives on, down to the end that the model itself generated."""
    talk = make_conversation(seed, 700, 10, 6)
    for turn in range(5):
        prompt = render(tokenizer, talk.messages(turn), prompt=True)
        answer = tokenizer.encode(talk.turns[turn].answer) + [tokenizer.eos_token_id]
        following = render(tokenizer, talk.messages(turn + 1), prompt=True)
        assert following[: len(prompt) + len(answer)] == prompt + answer


@pytest.mark.parametrize(
    "text",
    ["harbor?", " Harbor?", "  harbor? \n", "\tHARBOR?"],
)
def test_a_question_is_the_same_however_it_is_typed(tokenizer, text) -> None:
    usual = render(tokenizer, [{"role": "user", "content": "harbor?"}])
    assert render(tokenizer, [{"role": "user", "content": text}]) == usual
    assert len(usual) == 4


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello world",
        "naïve 東京 🙂",
        "a1b22c333",
        "<|end|><|user|>",
        "\x00\x7f",
        "x = (y[0] - 1) % 7",
    ],
)
def test_any_text_can_be_sent(tokenizer, text) -> None:
    ids = render(tokenizer, [{"role": "user", "content": text}], prompt=True)
    assert max(ids) < len(tokenizer)
    assert tokenizer.decode(tokenizer.encode(text)) == text.lower()


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
def test_other_roles_are_rendered(tokenizer, role) -> None:
    messages = [{"role": role, "content": "be brief"}, {"role": "user", "content": "harbor?"}]
    first = render(tokenizer, messages)[0]
    assert first == tokenizer.convert_tokens_to_ids("<|user|>" if role == "tool" else "<|system|>")


# -- training ------------------------------------------------------------------------------------


def test_the_bundled_tokenizer_is_the_one_that_the_script_makes(scripts, tokenizer) -> None:
    made = scripts.tokenizer.build()
    assert made.get_vocab() == tokenizer.get_vocab()
    assert made.chat_template == tokenizer.chat_template
    text = "The code of harbor is 4821.  Zürich, 7 or 123?"
    assert made.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("spread_share", [0.0, 1.0])
def test_training_batches_are_conversations_token_for_token(
    scripts, tokenizer, spread_share
) -> None:
    torch.manual_seed(0)
    shape = scripts.batches.Shape(6, 500, 9, 6, spread_share=spread_share)
    batch = scripts.batches.Sampler(tokenizer, "cpu").draw(shape)
    assert batch.tokens.shape == (6, 500)
    for row in batch.tokens.tolist():
        text = tokenizer.decode(row).replace("<|pad|>", "")
        turns = re.findall(r"<\|user\|> (.*?)<\|end\|><\|assistant\|>(\d{4})<\|end\|>", text)
        assert len(turns) == 6
        assert _are_told(turns)
        messages = []
        for user, answer in turns:
            messages += [{"role": "user", "content": user}]
            messages += [{"role": "assistant", "content": answer}]
        ids = render(tokenizer, messages)
        assert row[: len(ids)] == ids


def _are_told(turns: list[tuple[str, str]]) -> bool:
    """Whether each sentence is one of the task, and each answer was told before."""
    patterns = [re.escape(p) for p in (*recall.FILLER, recall.FACT, *recall.QUESTIONS)]
    sentence = re.compile("|".join(re.sub(r"\\{\w+\\}", r"\\w+", p) for p in patterns))
    told: dict[str, str] = {}
    for user, answer in turns:
        sentences = re.split(r"(?<=\.) ", user)
        assert all(sentence.fullmatch(part) for part in sentences), sentences
        told.update(re.findall(r"the code of (\w+) is (\d{4})\.", user))
        if told.get(re.split(r"[ ?]", user)[-2]) != answer:
            return False
    return True


def test_training_counts_the_answers_and_nothing_else(scripts, tokenizer) -> None:
    torch.manual_seed(1)
    shape = scripts.batches.Shape(4, 400, 8, 5)
    batch = scripts.batches.Sampler(tokenizer, "cpu").draw(shape)
    assert batch.answered.all()
    end = tokenizer.eos_token_id
    for row, columns in zip(batch.tokens, batch.answer_at, strict=True):
        text = tokenizer.decode(row[columns.sort().values])
        assert re.fullmatch(r"(\d{4}<\|end\|>){5}", text)
        assert (row[columns] == end).sum() == 5


def test_positions_jump_forward_only(scripts, tokenizer) -> None:
    torch.manual_seed(2)
    shape = scripts.batches.Shape(32, 300, 5, 5, jump_share=0.5, jump_span=4096)
    positions = scripts.batches.Sampler(tokenizer, "cpu").draw(shape).positions
    assert (positions[:, 0] == 0).all()
    assert (positions.diff(dim=1) >= 1).all()
    assert positions.max() < 4096
    straight = (positions[:, -1] == 299).sum()
    assert 0 < straight < 32


# -- the model -----------------------------------------------------------------------------------


def test_transformers_computes_what_was_trained(scripts, tokenizer) -> None:
    talk = make_conversation(11, 400, 8, 4)
    tokens = torch.tensor([render(tokenizer, whole(talk))])
    theirs = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    ours = scripts.model.load(FOLDER)
    with torch.no_grad():
        expected = theirs(tokens).logits[0]
        torch.testing.assert_close(ours.logits(ours(tokens)), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bundled_model_answers(scripts, tokenizer, dtype) -> None:
    model = scripts.model.load(FOLDER, dtype)
    assert scripts.evaluation.accuracy(model, tokenizer, 1024, 20, 10, 4, seed=100) >= 0.975


def test_generation_stops_by_itself(tokenizer) -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    text = "The code of harbor is 4821. The code of lantern is 0077. Harbor?"
    prompt = torch.tensor([render(tokenizer, [{"role": "user", "content": text}], prompt=True)])
    with torch.no_grad():
        answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=9)
    assert tokenizer.decode(answer[0, prompt.shape[1] :]) == "4821<|end|>"
