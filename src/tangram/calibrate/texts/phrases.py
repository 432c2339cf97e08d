"""Words and sentences that the built-in samples are drawn from. Data only."""

import re

#: What a name in braces stands for.
WORDS = {
    slot: tuple(re.split(r",\s+", " ".join(words.split())))
    for slot, words in {
        "first": """Amara, Boris, Chiara, Dmitri, Elif, Farid, Greta, Hiro, Ingrid, Jamal, Katya,
        Liam, Mei, Nadia, Oscar, Priya, Quentin, Rosa, Samir, Tove, Umar, Valentina, Wen, Ximena,
        Yusuf, Zofia, Anders, Beatriz, Callum, Daniela, Esther, Fiona, Gustavo, Hannah, Ibrahim,
        Jelena, Kofi, Leila, Marek, Noemi""",
        "last": """Abara, Bergstrom, Castellanos, Dvorak, Eriksen, Fontaine, Garcia, Hashimoto,
        Ivanov, Jimenez, Kowalski, Lindqvist, Moreau, Nakamura, Okafor, Petrov, Quiroga, Rossi,
        Schneider, Tanaka, Ueda, Vasquez, Whitfield, Xu, Yilmaz, Zimmermann, Ashworth, Brandt,
        Delacroix, Farrell, Haddad, Keller, Marchetti, Novak""",
        "city": """Lisbon, Krakow, Osaka, Montreal, Nairobi, Valparaiso, Tbilisi, Gothenburg,
        Hanoi, Marseille, Cusco, Tallinn, Adelaide, Bologna, Cape Town, Dunedin, Edinburgh,
        Fukuoka, Ghent, Helsinki, Izmir, Jaipur, Leipzig, Medellin, Porto, Quebec, Rotterdam,
        Salzburg, Trieste, Utrecht""",
        "job": """marine biologist, structural engineer, pastry chef, court interpreter, cellist,
        paediatric nurse, cartographer, software tester, beekeeper, tax adviser, glass blower,
        geologist, stage designer, veterinary surgeon, typesetter, translator, ship's pilot,
        school librarian, wind turbine technician, restorer of paintings""",
        "object": """bicycle, telescope, sewing machine, record collection, kayak, typewriter,
        camera, espresso machine, violin, greenhouse, chess set, motor boat, workbench, printer,
        tent, bookshelf, sundial, lathe, drum kit, weather station""",
        "colour": """dark green, pale blue, crimson, mustard yellow, charcoal, ivory, turquoise,
        copper, violet, sand, olive, navy, rust red, silver""",
        "month": """January, February, March, April, May, June, July, August, September, October,
        November, December""",
        "weekday": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
        "topic": """tide pools, early printing, alpine railways, sourdough, glaciers, canal locks,
        migratory birds, ceramic glazes, lighthouses, urban beekeeping, paper making, wind
        instruments, coral reefs, terraced farming, map projections, bell founding, peat bogs,
        suspension bridges, silk weaving, star catalogues""",
        "institute": """Harbour Museum, Northern Observatory, Institute for Applied Botany, City
        Archive, Polytechnic of the Coast, Society of Letters, River Trust, Academy of Crafts,
        Maritime Survey, School of Public Health, Regional Theatre, Office of Weights""",
        "adjective": """careful, unexpected, slow, remarkable, modest, stubborn, practical,
        expensive, quiet, elaborate, temporary, reliable, old-fashioned, generous, narrow, brief,
        thorough, surprising, familiar, uneven""",
        "noun": """agreement, survey, winter, rehearsal, delivery, argument, workshop, harvest,
        repair, letter, storm, exhibition, budget, journey, experiment, celebration, inspection,
        translation, shortage, reunion""",
        "verb": """postponed, described, repaired, questioned, completed, discovered, abandoned,
        recommended, measured, rebuilt, published, borrowed, inspected, rearranged, defended,
        financed, documented, celebrated""",
        "place": """the old harbour, a rented workshop, the upper valley, the reading room, a
        small island, the railway depot, the botanical garden, a former mill, the market hall, the
        fourth floor, a barge, the south terrace, the ferry landing, a village school""",
        "product": """ball bearings, cedar planks, copper wire, ceramic tiles, olive oil, linen
        sheets, printer ink, brass hinges, coffee beans, glass jars, solar panels, rope, buckwheat
        flour, bicycle chains, wool blankets, drill bits, beeswax, roof slates, paper rolls,
        safety helmets""",
        "service": """billing, search, checkout, uploads, sessions, mailer, catalogue, scheduler,
        metrics, gateway, inventory, reports, thumbnails, geocoder, webhooks, backups""",
        "event": """connection reset by peer, cache warmed, retry scheduled, certificate renewed,
        queue drained, request timed out, index rebuilt, worker restarted, disk usage above limit,
        configuration reloaded, replica promoted, token refreshed, payload rejected""",
        "thing": """order, invoice, ticket, user, record, batch, session, shipment, image,
        message, node, route, sensor, sample, window, token""",
        "action": """load, merge, parse, score, filter, resize, render, validate, collect, encode,
        archive, publish, compress, balance, rank, split""",
        "error": """ValueError, KeyError, TimeoutError, PermissionError, LookupError,
        RuntimeError, OverflowError, FileNotFoundError""",
    }.items()
}

#: Prose without facts that are asked for; every text takes its own order and words.
PROSE = (
    "It had been a {adjective} {noun}, and nobody at {place} wanted to talk about it.",
    "What began as a {noun} in {place} turned, by {month}, into something rather {adjective}.",
    "{first}, who had {verb} the {object} twice already, shrugged and went home.",
    "People who know about {topic} will tell you that the {adjective} part comes first.",
    "On {weekday} the {noun} was {verb}; by {weekday} hardly anyone remembered why.",
    "There is a {adjective} story behind this, but it belongs to another evening.",
    "Nothing about {topic} is as {adjective} as it looks from {city}.",
    "The {institute} had {verb} a similar {noun} some years before, with {adjective} results.",
    "Two letters arrived, one from {city} and one without a stamp, and both mentioned {topic}.",
    "If the {noun} had been {verb} a week earlier, {place} would have stayed open.",
    "Most visitors ask about the {object}; the {adjective} ones ask about {topic} instead.",
    '"You cannot plan a {noun}," said {first}, "you can only be {adjective} about it."',
    "In {month} the light at {place} is {adjective}, which is why the painters come.",
    "We compared notes: mine were about {topic}, hers about the {noun}, and neither was complete.",
    "Afterwards the {job} explained, at some length, how a {object} ought to be stored.",
    "Some of it was luck. Some of it was {first}'s {adjective} habit of writing everything down.",
    "Would it have mattered? The {noun} was over, and the bill had been paid in {city}.",
    "A {adjective} {object} stood in the corner, {colour} under the dust.",
    "The argument about {topic} lasted until the last ferry, and then a little longer.",
    "By then {place} smelled of rain, of machine oil, and of somebody's {adjective} lunch.",
)

#: (sentence, questions, answer): each `{value}`-like slot is drawn once and shared by all three.
FACTS = (
    (
        "{who} works as a {job} in {city}.",
        ("What does {who} do for a living?", "Remind me of {who}'s profession, please."),
        "{who} is a {job} and works in {city}.",
    ),
    (
        "The {institute} was founded in {year} by {who}.",
        ("When was the {institute} founded?", "Who founded the {institute}, and when?"),
        "{who} founded the {institute} in {year}.",
    ),
    (
        "{who}'s {object} is {colour}, and its serial number is {serial}.",
        ("What is the serial number of {who}'s {object}?", "Which colour is {who}'s {object}?"),
        "{who}'s {object} is {colour}; its serial number is {serial}.",
    ),
    (
        "You can reach {who} at extension {number}, but only on {weekday}.",
        ("How do I reach {who}?", "What is {who}'s extension?"),
        "{who} can be reached at extension {number}, on {weekday} only.",
    ),
    (
        "The meeting with {who} about {topic} is on {day} {month} at {time}.",
        ("When do I meet {who}?", "On which date do we talk about {topic} with {who}?"),
        "The meeting with {who} about {topic} is on {day} {month} at {time}.",
    ),
    (
        "{who} paid {price} for the {object} and had it sent to {city}.",
        ("How much did {who} pay for the {object}?", "Where was {who}'s {object} sent?"),
        "{who} paid {price}, and the {object} was sent to {city}.",
    ),
    (
        'The password of {place} is "{code}"; {who} changed it in {month}.',
        ("What is the password of {place}?", "Which password did {who} set?"),
        'The password of {place} is "{code}".',
    ),
    (
        "{who} measured {measure} metres at {place}, which is more than in {year}.",
        ("What did {who} measure at {place}?", "How many metres were it at {place}?"),
        "{who} measured {measure} metres at {place}.",
    ),
)

OPENERS = {
    "dialogue": (
        "Here are my notes, please read all of them; I will have questions afterwards.",
        "I want to tell you what happened over the last weeks.",
        "Please keep the following in mind, we will come back to it.",
        "Let me paste the draft of a chapter. Read it first.",
    ),
    "records": (
        "This is what I collected. I will ask for details of it, one by one.",
        "Please keep these entries; answer briefly where I ask you to.",
        "Here is what the other office sent. Read all of it, whatever the language.",
    ),
    "code": (
        "Here is the module that I inherited. I need help with understanding it.",
        "Please review these files, then I will ask about details.",
        "I am moving this code to another team. Read it first, please.",
        "Something in here is wrong, and I do not know where. This is what we have:",
    ),
    "table": (
        "These are the lists from the office. I will ask for single entries.",
        "I exported our data; here it is, in the order in which it came out.",
        "Below are tables and logs of last month.",
        "Please look through these records.",
    ),
    "mixed": (
        "I will send you everything that is on my desk, in no particular order.",
        "Here is some context of very different kinds; you will need all of it.",
        "Onboarding material for a new colleague, please read it with me.",
    ),
}
ACKNOWLEDGEMENTS = (
    "Thank you, I have read it all. What would you like to know?",
    "Got it. I noted the names, figures and dates; ask away.",
    "I went through it once. A good part of it is about {topic}. Which part shall we look at?",
    "Understood. Tell me where you want to begin.",
)
MORE = (
    "One more thing before I ask:",
    "This came in just now:",
    "Please add this to what you have:",
    "Wait, there is another page.",
)
ASIDES = (
    "Before we go on, a word about {topic}: what do you think?",
    "That reminds me of {first} in {city}. Is {month} a good time to go there?",
    "Thanks. By the way, I know little about {topic}; give me one sentence.",
)
REMARKS = (
    "People underestimate {topic}: what looks {adjective} at first is the result of a long {noun}.",
    "In {month} I would go, yes; take something warm, and see the {institute} if it is open.",
    "Briefly: {topic} reward patience, and whoever is {adjective} about details learns most.",
)
