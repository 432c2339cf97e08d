"""Records of many kinds for the built-in samples, and what is asked of them. Data only.

A slot in braces is drawn once for a record, by its name up to a figure at its end, and shared by
all that is said of it.
"""

from __future__ import annotations

from typing import NamedTuple


class RecordKind(NamedTuple):
    """Records of one kind.

    Attributes:
        heads: lines before them, one of which is taken.
        lines: wordings of a record, one of which is taken for all or drawn for each.
        asked: questions that are answered by a sentence.
        answer: the sentence.
        briefly: questions that are answered by the bare value.
        value: the bare value.
    """

    heads: tuple[str, ...]
    lines: tuple[str, ...]
    asked: tuple[str, ...]
    answer: str
    briefly: tuple[str, ...]
    value: str


RECORDS = (
    RecordKind(
        ("Contacts:", "People to call, as of {month}:"),
        ("{who}, {job}: phone {phone}, {mail}", "- {who} ({job}): {mail}, phone {phone}"),
        ("How can I call {who}?", "I have to ring up {who}. Where?"),
        "{who}, the {job}, has the phone number {phone}.",
        ("Mail address of {who}? Nothing else.", "Where do I write to {who}? Only the address."),
        "{mail}",
    ),
    RecordKind(
        ("Departures from {city}", "Timetable, valid from {month}:"),
        (
            "{time}  {city2}  platform {day}  train {train}",
            "Train {train} leaves at {time} for {city2}, platform {day}.",
        ),
        ("When does train {train} leave, and for where?", "Where does train {train} go?"),
        "Train {train} leaves at {time} for {city2}.",
        ("Platform of train {train}? Just the number.", "train {train}: which platform"),
        "{day}",
    ),
    RecordKind(
        ("Glossary", "Terms as we use them here:"),
        (
            "**{code}**: a {adjective} {noun} of {topic}.",
            "{code} -- what we call a {adjective} {noun} that has to do with {topic}.",
        ),
        ("What does {code} mean here?", "Explain the term {code}, please."),
        "A {code} is a {adjective} {noun} of {topic}.",
        ("{code}: what has it to do with? Two words at most.",),
        "{topic}",
    ),
    RecordKind(
        ("Bibliography", "References:"),
        (
            "[{number}] {who}: {title} in {city}. {city2}, {year}.",
            "{who} ({year}). {title} in {city}. No. {number}.",
        ),
        ("What did {who} publish, and when?", "Which title of {who} is in the references?"),
        '{who} published "{title} in {city}" in {year}.',
        (
            "Give me the number of the reference to {who}.",
            "Year of {who}'s book? Only digits: the number of the reference first, then the year.",
        ),
        "{number}, {year}",
    ),
    RecordKind(
        ("Minutes of the meeting on {weekday}", "Notes of the call:"),
        (
            "{who}: let us postpone the {noun} until {day} {month}, since {place} costs {price}.",
            "{who} said that {place} costs {price} and wants the {noun} on {day} {month}.",
        ),
        ("What did {who} say in the meeting?", "What is {who}'s opinion about the {noun}?"),
        "{who} wants to postpone the {noun} until {day} {month}, because {place} costs {price}.",
        ("Until when does {who} want to wait? The date only.",),
        "{day} {month}",
    ),
    RecordKind(
        ("Stock of {month}:", "What lies in the warehouse of {city}:"),
        (
            "{serial}: {number} {product}, bin {bin}",
            "There are {number} {product} (article {serial}) in bin {bin}.",
        ),
        ("What is article {serial}?", "How many of article {serial} do we have?"),
        "Article {serial} is {product}: {number} of them.",
        ("Bin of article {serial}?", "Where exactly do we keep {product}? The bin, nothing else."),
        "{bin}",
    ),
    RecordKind(
        ("Measured values", "Readings of the night:"),
        (
            "{time} {colour} probe: {measure} mm at {place}",
            "The {colour} probe showed {measure} mm at {time} ({place}).",
        ),
        (
            "What did the {colour} probe show?",
            "Which value came from the {colour} probe, and where?",
        ),
        "The {colour} probe showed {measure} mm at {place}.",
        ("{colour} probe, in mm:", "Value of the {colour} probe, digits only."),
        "{measure}",
    ),
    RecordKind(
        ("## Endpoints", "Routes of the {service} service:"),
        (
            "{method} /{thing}s/{number} -> handler {handler}, timeout {limit} ms",
            "`{method} /{thing}s/{number}` is served by `{handler}` within {limit} ms.",
        ),
        (
            "Which handler serves /{thing}s/{number}?",
            "Who takes {method} requests to /{thing}s/{number}?",
        ),
        "`{handler}` serves `{method} /{thing}s/{number}`.",
        ("Timeout of {handler}, in ms?", "How long may {handler} take? The figure alone, in ms."),
        "{limit}",
    ),
    RecordKind(
        ("Aliases:", "Links in the file system"),
        (
            "{handler} -> {target}",
            "ln -s /srv/{target} /opt/{handler}",
            "{handler} = {target}  # {service}",
        ),
        ("Where does {handler} point to?", "What is behind {handler}?"),
        "{handler} stands for {target}.",
        ("{handler} is what? Its target only.",),
        "{target}",
    ),
    RecordKind(
        ("Zutaten und Mengen", "Notizen vom {day}. des Monats:"),
        (
            "{who} wohnt seit {year} in {city} und hat die Kundennummer {serial}.",
            "Kundin {serial}: {who}, {city}, seit {year}",
        ),
        ("Welche Kundennummer hat {who}?", "Wo wohnt {who}?"),
        "{who} wohnt in {city} und hat die Kundennummer {serial}.",
        ("Seit welchem Jahr ist {who} dabei? Nur die Zahl.",),
        "{year}",
    ),
    RecordKind(
        ("Liste des réservations", "Ce que j'ai noté :"),
        (
            "{who} a réservé la table {day} pour {time}, téléphone {phone}.",
            "Table {day} : {who}, {time}, tél. {phone}",
        ),
        ("À quelle heure vient {who} ?", "Qu'a réservé {who} ?"),
        "{who} a réservé la table {day} pour {time}.",
        ("Le téléphone de {who} ? Rien que le numéro.",),
        "{phone}",
    ),
    RecordKind(
        ("Pedidos pendientes", "Resumen de la semana:"),
        (
            "Pedido {serial}: {number} unidades para {who}, entrega en {city}.",
            "{who} espera {number} unidades en {city} (pedido {serial}).",
        ),
        ("¿Qué espera {who}?", "¿Adónde va el pedido {serial}?"),
        "El pedido {serial} de {who} va a {city}: {number} unidades.",
        ("¿Cuántas unidades tiene el pedido {serial}? Solo la cifra.",),
        "{number}",
    ),
)

QUOTED = (
    "Quote the line about {what}, word for word.",
    "Repeat exactly what was written about {what}.",
    "Find the place with {what} and copy it.",
)
ALL_OF = (
    "Copy the whole list that begins with {what}.",
    "Repeat the list with {what} from its first line to its last.",
)
