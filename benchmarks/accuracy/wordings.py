"""Several kinds of things that are told and asked for, each in several wordings. Data only.

None of them is a fact, a table or a module of calibration's built-in samples
(`tangram.calibrate.texts`). A conversation is of one kind; its values are told and asked for in
wordings that are drawn one by one. Values and names of a kind have one length, so that none is
part of another.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tangram.evaluate.tasks.haystack import ACCESS_NUMBERS, Wording, names, numbers
from tangram.evaluate.tasks.variable_tracking import VARIABLES, ChainWording, variables

Draw = Callable[[random.Random, int], list[str]]

_WORDS = """ANCHOR BRANCH CASTLE DESERT FABRIC GARDEN HARBOR ISLAND JACKET LADDER MARBLE NEEDLE
ORCHID PILLAR RIBBON SADDLE""".split()
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_READ = "Please read this first; afterwards I will ask about some of the {what} in it."


def _distinct(one: Callable[[random.Random], str]) -> Draw:
    """So many that differ."""

    def draw(rng: random.Random, count: int) -> list[str]:
        found: dict[str, None] = {}
        while len(found) < count:
            found[one(rng)] = None
        return list(found)

    return draw


def _person(rng: random.Random) -> str:
    """A made-up name of five letters."""
    return "".join(rng.choice((_CONSONANTS, _VOWELS)[n % 2]) for n in range(5)).capitalize()


def _shelf(rng: random.Random) -> str:
    return f"{rng.choice('BDFHKMNRTW')}{rng.randrange(1000):03}-{rng.choice('BDFHKMNRTW')}"


def _constant(rng: random.Random) -> str:
    return "_".join(rng.sample(_WORDS, 2))


def _five_digits(rng: random.Random) -> str:
    return str(rng.randrange(10**4, 10**5))


FACTS = (
    Wording(
        kind="access number",
        introduction=_READ.format(what="access numbers"),
        told=(
            *ACCESS_NUMBERS.told,
            "To get into {key} one enters {value}.",
            "{value} is what opens {key}.",
        ),
        asked=(
            *ACCESS_NUMBERS.asked,
            "Which number opens {key}? Give the number alone.",
            "I want to get into {key}. What do I enter? Only the number, please.",
        ),
        asked_all=(
            *ACCESS_NUMBERS.asked_all,
            "{key} is opened by {count} numbers. Which ones? Only the numbers, with commas.",
        ),
        keys=names,
        values=numbers,
    ),
    Wording(
        kind="shelf",
        introduction=_READ.format(what="parcels"),
        told=(
            "Parcel {key} was put on shelf {value}.",
            "On shelf {value} there is something of parcel {key}.",
            "Somebody carried what belongs to parcel {key} over to shelf {value}.",
        ),
        asked=(
            "On which shelf is parcel {key}? Answer with the shelf's code only.",
            "Where did parcel {key} go? Just the code of the shelf.",
            "I am looking for parcel {key}: which shelf? Only its code, please.",
        ),
        asked_all=(
            "Parcel {key} is spread over {count} shelves. Which ones? Answer with the codes of the "
            "shelves only, separated by commas.",
            "List all {count} shelves that have something of parcel {key}, codes only.",
        ),
        keys=names,
        values=_distinct(_shelf),
    ),
    Wording(
        kind="swimmer",
        introduction=_READ.format(what="swimmers"),
        told=(
            "{key} swam with the number {value} on the cap.",
            "The swimmer with cap number {value} was {key}.",
            "On the cap of {key} one could read {value}.",
        ),
        asked=(
            "Which number did {key} have on the cap? Answer with the number only.",
            "What did the cap of {key} say? The number, nothing else.",
        ),
        asked_all=(
            "{key} swam {count} times, each time with another cap. Which numbers were on them? "
            "Answer with the numbers only, separated by commas.",
            "Name all {count} cap numbers of {key}, only the numbers.",
        ),
        keys=_distinct(_person),
        values=_distinct(_five_digits),
    ),
    Wording(
        kind="row",
        introduction=_READ.format(what="meter readings"),
        told=("\n| meter {key} | {value} kWh |\n",),
        asked=(
            "What does the row of meter {key} say, in kWh? Answer with the number only.",
            "How many kWh did meter {key} count? Only the number, please.",
        ),
        asked_all=(
            "There are {count} rows of meter {key}. What do they say, in kWh? Answer with the "
            "numbers only, separated by commas.",
        ),
        keys=names,
        values=_distinct(_five_digits),
    ),
    Wording(
        kind="code",
        introduction=_READ.format(what="lines of code"),
        told=("\nregister('{key}', {value})\n", "\nSIZES['{key}'] += {value}\n"),
        asked=(
            "Which number goes with '{key}' in the code? Answer with the number only.",
            "In the lines of code, what is the value given for {key}? Only the number.",
        ),
        asked_all=(
            "The code has {count} lines with '{key}'. Which numbers stand in them? Answer with the "
            "numbers only, separated by commas.",
        ),
        keys=_distinct(_constant),
        values=numbers,
    ),
)

_ALSO = "There are {count}. Answer with their names only, separated by commas."

CHAINS = (
    ChainWording(
        kind=VARIABLES.kind,
        introduction=VARIABLES.introduction,
        first=VARIABLES.first,
        link=VARIABLES.link,
        asked=(
            *VARIABLES.asked,
            f"Directly or through others, which variables end up as {{value}}? {_ALSO}",
        ),
        names=variables,
    ),
    ChainWording(
        kind="tent",
        introduction=_READ.format(what="campers"),
        first="{name} moved into the tent with the number {value}.",
        link="{name} moved into the tent of {source}.",
        asked=(
            f"Who lives in tent {{value}}, moved in with somebody or not? {_ALSO}",
            f"Which campers share the tent with the number {{value}}? {_ALSO}",
        ),
        names=_distinct(_person),
        values=_distinct(_five_digits),
    ),
    ChainWording(
        kind="assignment",
        introduction=_READ.format(what="lines of code"),
        first="\n{name} = {value}\n",
        link="\n{name} = {source}\n",
        asked=(
            f"Which names of the code have the value {{value}} in the end? {_ALSO}",
            f"After the lines of code have run, what equals {{value}}? {_ALSO}",
        ),
        names=_distinct(lambda rng: _person(rng).lower()),
    ),
)
