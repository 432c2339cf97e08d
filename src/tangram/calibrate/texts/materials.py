"""Blocks of text for the built-in samples, each with questions that it answers."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass

from tangram.calibrate.texts.phrases import FACTS, PROSE, WORDS
from tangram.calibrate.texts.records import ALL_OF, QUOTED, RECORDS

_SLOT = re.compile(r"\{(\w+)\}")
_CAPITALS = "ABCDEFGHKLMNPRSTVWXZ"
_ARTICLE = re.compile(r"(?<=\b[Aa])(?= [aeiou])")


@dataclass(frozen=True)
class Block:
    """A piece of text, and what can be asked about it: pairs of a question and its answer."""

    text: str
    questions: tuple[tuple[str, str], ...]


def fill(rng: random.Random, pattern: str, known: dict[str, str] | None = None) -> str:
    """The pattern with words in its slots; those of `known` are taken, and added to, by name."""

    def word(slot: re.Match[str]) -> str:
        if known is None:
            return draw(rng, slot[1])
        return known.setdefault(slot[1], draw(rng, slot[1]))

    return _ARTICLE.sub("n", _SLOT.sub(word, pattern))


def draw(rng: random.Random, slot: str) -> str:
    """A word or a figure for a slot."""
    figures = {
        "year": lambda: str(rng.randint(1780, 2019)),
        "serial": lambda: f"{''.join(rng.choices(_CAPITALS, k=2))}-{rng.randrange(10**6):06}",
        "number": lambda: str(rng.randint(1000, 9999)),
        "day": lambda: str(rng.randint(1, 28)),
        "time": lambda: f"{rng.randint(7, 19)}:{rng.choice(['00', '10', '15', '30', '45'])}",
        "price": lambda: f"{rng.randint(12, 4800)}.{rng.randrange(100):02} euros",
        "code": lambda: f"{draw(rng, 'noun')}-{draw(rng, 'noun')}-{rng.randint(10, 99)}",
        "measure": lambda: f"{rng.randint(2, 900)}.{rng.randrange(10)}",
        "who": lambda: f"{draw(rng, 'first')} {draw(rng, 'last')}",
        "phone": lambda: (
            f"0{rng.randint(20, 99)} {rng.randint(100, 999)} {rng.randint(1000, 9999)}"
        ),
        "mail": lambda: (
            f"{draw(rng, 'last').lower()}.{rng.randint(10, 99)}@{draw(rng, 'city')}.org"
        ),
        "train": lambda: f"{rng.choice(_CAPITALS)}{rng.choice(_CAPITALS)} {rng.randint(100, 999)}",
        "bin": lambda: f"{rng.randint(1, 40)}{rng.choice(_CAPITALS)}{rng.randint(1, 9)}",
        "limit": lambda: str(rng.randint(50, 90_000)),
        "handler": lambda: f"{draw(rng, 'action')}_{draw(rng, 'thing')}_v{rng.randint(2, 19)}",
        "target": lambda: (
            f"{draw(rng, 'service')}-{draw(rng, 'service')}-{rng.getrandbits(20):05x}"
        ),
        "method": lambda: rng.choice(("GET", "PUT", "POST", "DELETE")),
        "title": lambda: draw(rng, "topic").capitalize(),
    }
    slot = slot.rstrip("0123456789")
    return figures[slot]() if slot in figures else rng.choice(WORDS[slot])


def notes(rng: random.Random) -> Block:
    """Paragraphs of prose with a few facts among other sentences."""
    questions, paragraphs = [], []
    for _ in range(rng.randint(1, 3)):
        sentences = [fill(rng, pattern) for pattern in rng.sample(PROSE, rng.randint(3, 6))]
        for sentence, asked, answer in rng.sample(FACTS, rng.randint(1, 2)):
            known: dict[str, str] = {}
            told = fill(rng, sentence, known)
            sentences.insert(rng.randint(0, len(sentences)), told)
            questions.append((fill(rng, rng.choice(asked), known), fill(rng, answer, known)))
        paragraphs.append(" ".join(sentences))
    return Block("\n\n".join(paragraphs), tuple(questions))


def letter(rng: random.Random) -> Block:
    """A letter: prose between a date and a signature."""
    body, who = notes(rng), draw(rng, "who")
    where = f"{draw(rng, 'city')}, {draw(rng, 'day')} {draw(rng, 'month')} {draw(rng, 'year')}"
    text = f"{where}\n\nDear {draw(rng, 'first')},\n\n{body.text}\n\nYours, {who}"
    asked = (f"Where and when did {who} write the letter?", f"{who} wrote it in {where}.")
    return Block(text, (*body.questions, asked))


def python_module(rng: random.Random) -> Block:
    """Constants, functions and a class, as in a module of a service."""
    service = draw(rng, "service")
    lines = [f'"""The {service} service: {draw(rng, "topic")} and what belongs to them."""', ""]
    lines += [f"import {name}" for name in sorted(rng.sample(_IMPORTS, 3))] + [""]
    questions = []
    for _ in range(rng.randint(2, 4)):
        name = f"{draw(rng, 'action')}_{rng.choice(_LIMITS)}".upper()
        value = rng.choice(
            (str(rng.randint(2, 90_000)), f"{rng.random():.3f}", f'"{draw(rng, "code")}"')
        )
        lines.append(f"{name} = {value}")
        questions.append((f"What is {name} set to in {service}?", f"`{name} = {value}`"))
    for _ in range(rng.randint(1, 3)):
        function, about = _python_function(rng)
        lines += ["", "", *function]
        questions.append(about)
    return Block(f"```python\n{chr(10).join(lines)}\n```", tuple(questions))


_IMPORTS = ("asyncio", "hashlib", "json", "logging", "pathlib", "random", "sqlite3", "time", "zlib")
_LIMITS = ("limit", "timeout_s", "batch_size", "retries", "prefix", "threshold", "interval_ms")
_BODIES = (
    """    {things} = [{thing} for {thing} in {source} if {thing}.{field} > {number}]
    logging.info("kept %d of %d", len({things}), len({source}))
    return sorted({things}, key=lambda {thing}: {thing}.{field})""",
    """    total = 0
    for index, {thing} in enumerate({source}):
        if not {thing}.{field}:
            raise {error}(f"{thing} {{index}} has no {field}")
        total += {thing}.{field} * {number}
    return total / max(1, len({source}))""",
    """    seen = {{}}
    while {source}:
        {thing} = {source}.pop()
        key = hashlib.sha256({thing}.{field}.encode()).hexdigest()[:{number}]
        if key in seen:
            raise {error}("{thing} was seen before: " + key)
        seen[key] = {thing}
    return seen""",
    """    try:
        with open({source}, encoding="utf-8") as file:
            {things} = json.load(file)["{field}"]
    except {error}:
        time.sleep({number} / 1000)
        return None
    return {{str({thing}["id"]): {thing} for {thing} in {things}}}""",
)
_FIELDS = ("weight", "created_at", "owner", "size", "status", "score", "priority", "path")


def _python_function(rng: random.Random) -> tuple[list[str], tuple[str, str]]:
    """Lines of a function, and a question about it with its answer."""
    thing, field, error = draw(rng, "thing"), rng.choice(_FIELDS), draw(rng, "error")
    name = f"{draw(rng, 'action')}_{thing}s_by_{field}"
    source, number = rng.choice(("rows", "items", "pending", "path")), draw(rng, "number")
    body = rng.choice(_BODIES).format(
        thing=thing, things=f"{thing}s", field=field, error=error, source=source, number=number
    )
    head = f"def {name}({source}, {rng.choice(_LIMITS)}={rng.randint(1, 500)}):"
    lines = [head, f'    """{draw(rng, "action").capitalize()} every {thing} of the {field}."""']
    lines += body.split("\n")
    if error in body:
        return lines, (
            f"Which exception has to do with `{name}`?",
            f"`{name}` has to do with `{error}`.",
        )
    return lines, (f"Show me the first line of `{name}` again.", f"```python\n{head}\n```")


def settings(rng: random.Random) -> Block:
    """Nested settings, as JSON or YAML."""
    names = rng.sample(WORDS["service"], rng.randint(2, 5))
    tree = {
        name: {
            "host": f"10.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(1, 255)}",
            "port": rng.randint(1024, 65535),
            "owner": draw(rng, "who"),
            rng.choice(_LIMITS): rng.randint(1, 5000),
        }
        for name in names
    }
    questions = []
    for name in names:
        key = rng.choice(list(tree[name]))
        questions.append((f"What is the {key} of {name}?", f"{name} has {key} {tree[name][key]}."))
    if rng.random() < 0.5:
        return Block(f"```json\n{json.dumps(tree, indent=2)}\n```", tuple(questions))
    lines = []
    for name, values in tree.items():
        lines += [f"{name}:", *(f"  {key}: {value}" for key, value in values.items())]
    return Block("```yaml\n{}\n```".format("\n".join(lines)), tuple(questions))


def table(rng: random.Random) -> Block:
    """Rows of products, as a Markdown table or comma-separated."""
    columns = rng.sample(
        ("warehouse", "units", "price", "supplier", "checked on"), rng.randint(3, 4)
    )
    makers = {
        "warehouse": lambda: draw(rng, "city"),
        "units": lambda: str(rng.randint(3, 9000)),
        "price": lambda: f"{rng.randint(1, 400)}.{rng.randrange(100):02}",
        "supplier": lambda: draw(rng, "who"),
        "checked on": lambda: f"{draw(rng, 'day')} {draw(rng, 'month')}",
    }
    products = rng.sample(WORDS["product"], rng.randint(5, 12))
    rows = [[product, *(makers[column]() for column in columns)] for product in products]
    head = ["product", *columns]
    questions = []
    for row in rng.sample(rows, min(4, len(rows))):
        column = rng.randrange(1, len(head))
        asked = f"In the list of {products[0]}, {products[1]} and so on, what is the {head[column]}"
        questions.append((f"{asked} of {row[0]}?", f"For {row[0]} it is {row[column]}."))
    questions.append(
        (
            f"List the {head[1]} of every product from {products[0]} to {products[-1]}, in order.",
            "\n".join(f"- {row[0]}: {row[1]}" for row in rows),
        )
    )
    if rng.random() < 0.5:
        lines = [", ".join(cells) for cells in (head, *rows)]
    else:
        lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return Block("\n".join(lines), tuple(questions))


def log(rng: random.Random) -> Block:
    """Lines of a log with times, levels and identifiers."""
    seconds, lines, questions = rng.randrange(70_000), [], []
    for _ in range(rng.randint(6, 16)):
        seconds += rng.randint(1, 900)
        when = f"{seconds // 3600 % 24:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        service, event = draw(rng, "service"), draw(rng, "event")
        request = f"{rng.getrandbits(32):08x}"
        level = rng.choice(("INFO", "INFO", "WARN", "ERROR", "DEBUG"))
        lines.append(
            f"{when} {level:<5} [{service}] {event} (request {request}, {rng.randint(1, 9000)} ms)"
        )
        asked = f"What happened in request {request}?"
        questions.append((asked, f'At {when}, {service} logged "{event}" ({level}).'))
    return Block("\n".join(lines), tuple(rng.sample(questions, 3)))


def agenda(rng: random.Random) -> Block:
    """A numbered list of who does what until when."""
    rows, questions = [], []
    for number in range(1, rng.randint(5, 11)):
        known: dict[str, str] = {}
        rows.append(
            fill(rng, f"{number}. {{who}}: {{noun}} of {{topic}}, until {{day}} {{month}}", known)
        )
        questions.append(
            fill_pair(
                rng, ("What is {who} to do?", "The {noun} of {topic}, until {day} {month}."), known
            )
        )
    return Block("\n".join(rows), tuple(rng.sample(questions, 3)))


def records(rng: random.Random) -> Block:
    """Records of one kind, as a list or among sentences, asked for in full or in part."""
    kind = rng.choice(RECORDS)
    line, bullet = rng.choice((*kind.lines, "")), rng.choice(("", "", "- ", "* "))
    told: list[str] = []
    questions: list[tuple[str, str]] = []
    for _ in range(rng.randint(4, 9)):
        known: dict[str, str] = {}
        told.append(fill(rng, line or rng.choice(kind.lines), known))
        questions.append(fill_pair(rng, (rng.choice(kind.asked), kind.answer), known))
        questions.append(fill_pair(rng, (rng.choice(kind.briefly), kind.value), known))
        if rng.random() < 0.3:
            what = rng.choice([word for word in known.values() if word in told[-1]])
            questions.append((rng.choice(QUOTED).format(what=what), told[-1]))
    head = fill(rng, rng.choice(kind.heads))
    if rng.random() < 0.3:
        sentences = [[fill(rng, rng.choice(PROSE)), text] for text in told]
        return Block(" ".join(sum(sentences, [head])), tuple(questions))
    if rng.random() < 0.2:
        questions.append((rng.choice(ALL_OF).format(what=told[0]), "\n".join(told)))
    return Block("\n".join([head, *(bullet + text for text in told)]), tuple(questions))


def fill_pair(
    rng: random.Random, patterns: tuple[str, str], known: dict[str, str]
) -> tuple[str, str]:
    """A question and its answer with the same words."""
    return fill(rng, patterns[0], known), fill(rng, patterns[1], known)
