"""Conversations that ask for facts told long before: the task of the bundled recall model.

A conversation's first turn tells codes ("the code of harbor is 4821.") among filler sentences and
ends with a question ("harbor?"); later turns ask for other codes, and some of them tell more first.
An answer is the code alone ("4821"), so it is right or wrong as a whole.

Every word used here is one token of the recall model's tokenizer, two digits are one token, and
the chat template adds `TURN_TOKENS` to a turn, so this module counts tokens without a tokenizer.
It needs the standard library only.
"""

import random
import re
from dataclasses import dataclass

from tangram.errors import ConfigurationError

#: What the codes belong to.
KEYS = tuple(
    """
    harbor lantern violin copper meadow falcon ginger marble pepper saddle tunnel velvet walnut
    anchor basket candle dragon engine feather garden hammer island jacket kettle ladder magnet
    needle orange pencil quartz ribbon silver temple umbrella village window yogurt zipper almond
    bamboo cactus dagger eagle forest glacier helmet igloo jungle kitten lemon mango napkin olive
    parrot rabbit salmon tomato uncle valley wagon acorn badger camel dolphin ember fossil goblet
    hazel ivory jasmine kernel lagoon mirror nutmeg oyster puzzle quiver rocket shadow thimble
    vessel willow beacon canyon desert fiddle gravel hollow insect jewel knight lizard monkey
    nickel onion panther quarry raven sponge turtle whistle amber barrel cherry donkey elbow ferry
    gravy hotel ink jelly kayak lobster muffin novel oasis piano spider tiger unicorn vinegar
    wizard apron bridge castle diamond envelope flute guitar honey iris jigsaw kiosk lilac maple
    nest otter pumpkin radar scarf trumpet vase whale arrow bottle cotton drum easel fountain goose
    hinge icicle jar kite leaf mitten noodle oak pillow quilt rope stable tulip veil wheel atlas
    button compass daisy emerald fox grape hedge ivy juniper koala lion moss nugget orchid peach
    rain sail thunder vine blanket clover dune echo fern hawk inlet jade kelp lotus mint nectar
    opal pearl reef sand tide volcano wolf aspen birch cedar delta elm fig grove heron ibis jackal
    kiwi lark newt owl plum quail rose swan toad wren yak zebra bacon bread butter cheese cocoa
    coffee cookie cream dough flour garlic ham jam lentil melon milk mustard oat pasta pie rice
    salt soup spice sugar tea toast waffle barn bench brick cabin cellar chapel cottage dock fence
    gate hall hut kitchen lodge mill palace pier porch roof shed tower wall well yard bell bolt
    bowl broom brush bucket chain clock coin comb crown cup desk dice doll door fork frame glass
    glove hook horn key knife knot lamp lens lock map mask medal mug nail net oven paddle page pan
    pen pipe plate plow pot pump purse rake ring rug saw shelf shield shoe soap spoon stamp stove
    sword table tent tool torch towel toy tray trunk tub vest wire badge banner belt boot bow cap
    cape cloak coat collar dress gown hat hood robe sash shirt skirt sock suit tie turban bay beach
    brook cave cliff coast creek field fjord gulf hill lake marsh mesa mound peak plain pond ridge
    shore spring strait summit swamp trail wood ant bat bear bee beetle bison bull calf cat cobra
    colt crab crane cricket crow deer dog dove duck eel elk ferret frog goat gull hen hornet horse
    jay lamb lemur lynx moose mouse mule panda pig pony puma rat robin seal shark sheep skunk sloth
    slug snail snake squid stag stork swift trout tuna vulture walrus wombat worm basalt brass
    bronze chalk clay coal cobalt flint gold granite iron lead lime pewter ruby shale slate steel
    stone tin topaz zinc bishop cello chess choir circus comet cosmos crystal dynamo flag flame
    flask fleet forge fort gala jazz maze meteor mosaic motor organ orbit parade planet poem prism
    pulley riddle rudder satin saturn sonnet sphinx sundial tango tempest
    """.split()
)

#: The words of each slot of a filler sentence; none of them is a key.
SLOTS = {
    slot: tuple(words.split())
    for slot, words in {
        "adjective": """new quiet young tall small bright gentle clever tired happy busy careful
        cheerful patient loyal proud shy brave calm curious friendly modest polite serious
        simple sleepy thin warm wise lively late lonely famous hungry lucky strange pale green
        blue heavy""",
        "person": """farmer teacher sailor baker doctor painter driver singer writer miller
        tailor carpenter gardener soldier student traveler merchant neighbor hunter builder
        potter dancer lawyer clerk butcher fisher weaver scholar waiter guard captain nurse
        mason porter barber cousin brother sister mother father""",
        "verb": """found carried bought repaired painted watched cleaned borrowed moved opened
        closed counted dropped followed gathered handled hid kept lifted liked lost measured
        noticed polished praised pulled pushed remembered returned sold studied touched traded
        visited washed weighed wrapped admired described examined""",
        "thing": """box cart chair picture letter story road house tree flower carpet cloth
        suitcase parcel statue machine bicycle blouse ticket paper book song bundle sack crate
        camera stool bed curtain cabinet drawer bag rifle ruler violet poster diary ledger coil
        sheet""",
        "place": """market station library church school office factory farm museum theater
        bakery tavern square corner street crossing hospital city town country""",
        "time": """morning evening night summer winter autumn week month year holiday storm
        feast dinner lunch meeting lesson journey concert harvest wedding""",
    }.items()
}
#: The sentences among which facts are told.
FILLER = (
    "the {adjective} {person} {verb} the {adjective} {thing} near the {place}.",
    "a {person} {verb} the {thing} at the {place}.",
    "after the {time} the {person} {verb} a {thing}.",
    "it was a {adjective} {time} in the {place}.",
    "the {person} talked with a {adjective} {person} during the {time}.",
    "the {thing} was {adjective}.",
)
FACT = "the code of {key} is {code}."
QUESTIONS = ("{key}?", "what is the code of {key}?")
CODE_DIGITS = 4

#: What becomes one token if the vocabulary has it: a word with the space before it, two digits.
TOKEN_PATTERN = r" ?[a-z]+|[0-9]{2}|."
#: What the chat template adds to a turn: the marks of both roles and the ends of both messages.
TURN_TOKENS = 4

_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Turn:
    """One exchange: what the user says, and the answer that is right."""

    user: str
    answer: str


@dataclass(frozen=True)
class Conversation:
    """Turns to be played in order, each with the whole history before it.

    Attributes:
        turns: what is asked and the right answers.
        facts: every code told, by key.
    """

    turns: tuple[Turn, ...]
    facts: dict[str, str]

    def messages(self, turn: int, answers: list[str] | None = None) -> list[dict[str, str]]:
        """The chat history that ends with the question of turn number `turn`, counted from 0.

        Args:
            turn: whose question comes last.
            answers: what was answered in the turns before it; the right answers if left out.

        Returns:
            Messages with `role` and `content`, as chat servers and chat templates take them.
        """
        if answers is None:
            answers = [t.answer for t in self.turns[:turn]]
        history: list[dict[str, str]] = []
        for past, answer in zip(self.turns[:turn], answers, strict=True):
            history.append({"role": "user", "content": past.user})
            history.append({"role": "assistant", "content": answer})
        history.append({"role": "user", "content": self.turns[turn].user})
        return history

    @property
    def context_tokens(self) -> int:
        """Tokens of the whole conversation in the recall model's chat format, answers included."""
        texts = [text for turn in self.turns for text in (f" {turn.user}", turn.answer)]
        return sum(map(count_tokens, texts)) + TURN_TOKENS * len(self.turns)


def vocabulary() -> list[str]:
    """Every word that a conversation can hold, sorted, without spaces, digits and punctuation."""
    patterns = " ".join((*FILLER, FACT, *QUESTIONS))
    words = set(re.findall(r"[a-z]+", _SLOT.sub(" ", patterns)))
    return sorted(words.union(KEYS, *SLOTS.values()))


def count_tokens(text: str) -> int:
    """Tokens of a text made by this module: words carry the space before them."""
    return len(re.findall(TOKEN_PATTERN, text))


def is_right(answer_text: str, expected: str) -> bool:
    """Whether a model's answer is the expected one and nothing else (outer spaces aside)."""
    return answer_text.strip() == expected


def make_conversation(
    seed: int, context_tokens: int, facts: int, turns: int, later_share: float = 0.1
) -> Conversation:
    """A conversation drawn from `seed`: the same arguments always give the same one.

    Keys and codes differ within a conversation, and no key is asked for twice.

    Args:
        seed: any integer.
        context_tokens: tokens of the whole conversation in the recall model's chat format, answers
            included. The result has at most as many, and at most 10 fewer.
        facts: codes told, at most `len(KEYS)`.
        turns: questions asked, at most `facts`.
        later_share: share of the facts and of the filler that is told after the first question, in
            about half of the later turns.

    Raises:
        ConfigurationError: counts out of range, or facts and questions alone exceed
            `context_tokens`.
    """
    if not 1 <= turns <= facts <= len(KEYS) or not 0 <= later_share < 1:
        raise ConfigurationError(
            f"expected 1 <= turns <= facts <= {len(KEYS)} and 0 <= later_share < 1, got "
            f"turns={turns}, facts={facts}, later_share={later_share}; ask for fewer turns or facts"
        )
    rng = random.Random(seed)
    codes = rng.sample(range(10**CODE_DIGITS), facts)
    keys = rng.sample(KEYS, facts)
    table = {key: f"{code:0{CODE_DIGITS}}" for key, code in zip(keys, codes, strict=True)}
    questions = rng.choices(QUESTIONS, k=turns)

    told = [(FACT.format(key=key, code=code), key) for key, code in table.items()]
    # The counts hold for any key and code: a question and an answer are as long as any other.
    asking = sum(count_tokens(" " + question.format(key=KEYS[0])) for question in questions)
    asking += turns * (count_tokens("0" * CODE_DIGITS) + TURN_TOKENS)
    fixed_tokens = asking + sum(count_tokens(" " + text) for text, _ in told)
    if fixed_tokens > context_tokens:
        raise ConfigurationError(
            f"{facts} facts and {turns} turns take {fixed_tokens} tokens, more than "
            f"context_tokens={context_tokens}; ask for fewer or for a longer context"
        )
    filler = _filler(rng, context_tokens - fixed_tokens)

    asked: list[Turn] = []
    open_keys: list[str] = []
    for sentences, question in zip(
        _parts(rng, told, filler, turns, later_share), questions, strict=True
    ):
        open_keys += [key for _, key in sentences if key]
        key = open_keys.pop(rng.randrange(len(open_keys)))
        texts = [text for text, _ in sentences] + [question.format(key=key)]
        asked.append(Turn(" ".join(texts), table[key]))
    return Conversation(tuple(asked), table)


def _parts(
    rng: random.Random, told: list, filler: list, turns: int, later_share: float
) -> list[list[tuple[str, str | None]]]:
    """What each turn tells before its question: pairs of a sentence and the key it is about."""
    # Enough facts come first for every turn to have one left to ask for.
    late_facts = min(round(len(told) * later_share), len(told) - turns) if turns > 1 else 0
    late_filler = round(len(filler) * later_share) if turns > 1 else 0
    parts = [told[late_facts:] + filler[late_filler:]] + [[] for _ in range(turns - 1)]
    telling = rng.sample(range(1, turns), turns // 2)
    for sentence in told[:late_facts] + filler[:late_filler]:
        parts[rng.choice(telling)].append(sentence)
    for sentences in parts:
        rng.shuffle(sentences)
    return parts


def _filler(rng: random.Random, tokens: int) -> list[tuple[str, None]]:
    """Filler sentences of `tokens` tokens in all, or a few fewer."""
    sentences: list[tuple[str, None]] = []
    while True:
        pattern = rng.choice(FILLER)
        text = _SLOT.sub(lambda slot: rng.choice(SLOTS[slot[1]]), pattern)
        tokens -= count_tokens(" " + text)
        if tokens < 0:
            return sentences
        sentences.append((text, None))
