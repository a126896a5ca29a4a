"""The grammar: a seeded generator of merchant-support dialogues.

Draws intents (`intents.py`) and orders (`orders.py`) and writes the customer's words around them:
polite or angry, tidy or in a hurry, with the order number in front, inside, behind or missing.

    for dialogue in make_dialogues(seed=0, count=10, held_out=False):
        print(dialogue.messages)  # [{"role": "user", "content": ...}, ...]
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from training.intents import (
    CODES,
    COLOURS,
    INTENT_BY_NAME,
    INTENTS,
    ITEMS,
    SHOP,
    SHOPS,
    SIZES,
    Intent,
    Shop,
    Turn,
)
from training.orders import Order, random_order

# The long system prompt that the chat template puts in front of a conversation that has none.
DEFAULT_SYSTEM_PROMPT = """\
You are the chat assistant of Fernhill Outfitters, an online shop for outdoor clothing, boots, \
tents and backpacks. You answer questions about orders, deliveries, returns and payments.

Rules of the shop:
- Orders leave our warehouse within one working day. Delivery is free from $50, below that it \
costs $4.
- Our carriers are Swiftline, Harbour Post, Bluecart and Greenmile.
- Returns are accepted within 30 days of delivery. The return label is free.
- Refunds go to the card that paid and take 5 working days once the parcel is back.
- Exchanges for another size or colour are free. An order can be cancelled or its address changed \
only while it is being packed.
- Every item has a warranty of two years.
- People answer the phone from Monday to Saturday, 9 am to 6 pm. The email address is \
help@fernhill.example.

How to write:
- Name the order that the customer asks about. If the number is missing, ask for it.
- Use plain words and at most three sentences. Stay friendly when the customer is angry.
- Never ask for card numbers or passwords. If a question is not about the shop, say so politely."""

_ORDER_INTENTS = [intent for intent in INTENTS if intent.about_order]
_GENERAL_INTENTS = [intent for intent in INTENTS if not intent.about_order]
_OPENING_INTENTS = [i for i in _GENERAL_INTENTS if i.name not in ("thanks", "goodbye")]

_POLITE_OPENINGS = (
    "Hi,",
    "Hello,",
    "Hi there,",
    "Good morning,",
    "Good afternoon,",
    "Hey,",
    "Dear team,",
    "Excuse me,",
    "Hello there,",
    "Good evening,",
)
_POLITE_CLOSINGS = ("Thanks!", "Thank you.", "Please help.", "Thanks in advance.", "Best wishes.")
_ANGRY_OPENINGS = (
    "This is ridiculous.",
    "I am really annoyed.",
    "This is not acceptable.",
    "I am very angry.",
    "Come on.",
    "I am fed up with this.",
    "This is the third time I write.",
)
_ANGRY_CLOSINGS = (
    "This is terrible service.",
    "I am very disappointed.",
    "I will never buy here again.",
    "Fix this now!",
    "Unbelievable.",
    "What a joke.",
)
_ASIDES = (
    "I bought it as a gift.",
    "I am leaving for a trip soon.",
    "I could not find it in my account.",
    "I already looked at the website.",
    "It is for my daughter.",
    "I paid by card.",
    "My neighbour got theirs already.",
    "I have been a customer for 12 years.",
    "There were 3 items in the basket.",
    "I ordered it on the 5th.",
)
_REFERENCES = (
    ("order {n}", 8.0),
    ("{n}", 3.0),
    ("order number {n}", 2.0),
    ("order #{n}", 1.5),
    ("my order {n}", 1.5),
    ("#{n}", 1.0),
    ("the order {n}", 1.0),
    ("parcel {n}", 1.0),
    ("package {n}", 0.7),
    ("order no. {n}", 0.7),
    ("order nr {n}", 0.4),
    ("order: {n}", 0.4),
)
_NUMBER_BEFORE = (
    "{n}: {q}",
    "{n} - {q}",
    "{n}, {q}",
    "Order {n}. {q}",
    "About order {n}: {q}",
    "My order number is {n}. {q}",
    "I have a question about {n}. {q}",
    "I ordered something, the number is {n}. {q}",
    "It is about order {n}. {q}",
)
_NUMBER_AFTER = (
    "{q} {n}",
    "{q} Order {n}.",
    "{q} My order number is {n}.",
    "{q} The number is {n}.",
    "{q} It is order {n}.",
    "{q} ({n})",
    "{q} Order number: {n}",
    "{q} #{n}",
)
_NUMBER_ALONE = (
    "{n}",
    "It is {n}.",
    "Order {n}",
    "The number is {n}.",
    "My order number is {n}.",
    "Sorry, it is {n}.",
    "Here it is: {n}",
    "#{n}",
    "{n} please",
    "I think it is {n}",
)
_ANOTHER_ORDER = (
    "And {order}?",
    "And what about {order}?",
    "What about {order}?",
    "And the same for {order}?",
    "I also have {order}.",
    "And {order} please?",
)
# How often a dialogue has 1, 2, 3, ... turns; every longer length has weight 1.
_TURN_WEIGHTS = (46, 22, 14, 8, 4, 2)
_FOLLOW_UP_OPENINGS = ("And", "Ok, and", "Thanks.", "Ok.", "I see.", "Hm,", "One more thing:", "")


@dataclass(frozen=True)
class Exchange:
    """What a question was about, and every reply that the grammar could have given to it."""

    intent: str
    order: Order | None
    right_replies: tuple[str, ...]


@dataclass
class Dialogue:
    """A conversation and what its replies must contain.

    `messages` has roles system (unless the default prompt is meant), user and assistant.
    `exchanges` has one entry per question and reply.
    """

    messages: list[dict[str, str]]
    exchanges: list[Exchange]


def _pick(rng: random.Random, pairs: tuple[tuple[str, float], ...]) -> str:
    return rng.choices([p[0] for p in pairs], [p[1] for p in pairs])[0]


def _written_number(rng: random.Random, order: Order) -> str:
    """The order number as a customer may type it."""
    draw = rng.random()
    if draw < 0.80:
        return order.number
    if draw < 0.88:
        return f"{order.letter}{order.digits}"
    if draw < 0.94:
        return order.number.lower()
    if draw < 0.97:
        return f"{order.letter} {order.digits}"
    return f"{order.letter}{order.digits}".lower()


def _misspell(rng: random.Random, text: str) -> str:
    """Swaps or drops one letter inside one long lower-case word."""
    words = text.split(" ")
    long_words = [i for i, w in enumerate(words) if len(w) >= 5 and w.isalpha() and w.islower()]
    if not long_words:
        return text
    i = rng.choice(long_words)
    word = words[i]
    at = rng.randrange(1, len(word) - 2)
    if rng.random() < 0.5:
        words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    else:
        words[i] = word[:at] + word[at + 1 :]
    return " ".join(words)


_CONTRACTIONS = (
    ("Where is", "Where's"),
    ("What is", "What's"),
    ("It is", "It's"),
    ("it is", "it's"),
    ("I am", "I'm"),
    ("do not", "don't"),
    ("does not", "doesn't"),
    ("did not", "didn't"),
    ("has not", "hasn't"),
    ("have not", "haven't"),
    ("I would", "I'd"),
    ("I have", "I've"),
    ("was not", "wasn't"),
    ("could not", "couldn't"),
)


def _roughen(rng: random.Random, text: str) -> str:
    """Contractions, lower case, lost punctuation, a typo: how people type in a chat window.

    An order number keeps its letters and digits; `{n}` slots are filled in before this.
    """
    if rng.random() < 0.5:
        for plain, short in _CONTRACTIONS:
            text = text.replace(plain, short)
    if rng.random() < 0.25:
        text = text[:1].lower() + text[1:] if text[:2] != "I " else text
    if rng.random() < 0.08:
        text = text.lower()
    if rng.random() < 0.25:
        text = text.rstrip("?.!")
    if rng.random() < 0.08:
        text = text.replace("'", "").replace(",", "")
    if rng.random() < 0.10:
        text = _misspell(rng, text)
    if rng.random() < 0.05:
        text += rng.choice(("??", "!!", "...", "!"))
    return text


def _capitalise(text: str) -> str:
    return text[:1].upper() + text[1:]


def _details(rng: random.Random) -> dict[str, str]:
    return {
        "size": rng.choice(SIZES),
        "colour": rng.choice(COLOURS),
        "item": rng.choice(ITEMS),
        "code": rng.choice(CODES) + rng.choice(("10", "15", "20", "25", "30", "40")),
    }


def _dress(rng: random.Random, text: str, *, first: bool, angry: bool) -> str:
    """Puts polite or angry words and asides around a question."""
    if angry:
        if rng.random() < 0.5:
            text = f"{rng.choice(_ANGRY_OPENINGS)} {text}"
        else:
            text = f"{text} {rng.choice(_ANGRY_CLOSINGS)}"
    elif first and rng.random() < 0.35:
        text = f"{rng.choice(_POLITE_OPENINGS)} {text[:1].lower() + text[1:]}"
        text = text.replace(" i ", " I ").replace(" i'", " I'")
    if not angry and rng.random() < 0.12:
        text = f"{text} {rng.choice(_POLITE_CLOSINGS)}"
    if rng.random() < 0.06:
        text = f"{text} {rng.choice(_ASIDES)}"
    return _roughen(rng, text)


def _choose_reply(rng: random.Random, variants: list[str]) -> str:
    """Three quarters of the replies take the first wording, so that greedy decoding is clear."""
    return variants[0] if rng.random() < 0.75 else rng.choice(variants[1:])


_SOOTHING = "I am sorry for the trouble."


def _soothe(text: str) -> str:
    """What an angry customer hears: an apology first, but never two."""
    return text if text.startswith("I am sorry") else f"{_SOOTHING} {text}"


def _right_replies(intent: Intent, turn: Turn) -> list[str]:
    replies = intent.reply(turn)
    return [_soothe(text) for text in replies] if turn.angry else replies


def _number_requests(intent: Intent, angry: bool) -> list[str]:
    """The replies to a question about an order whose number is missing."""
    replies = [
        f"Please send me the order number, so that I can {intent.asks}. You find it in your "
        "confirmation email, and it looks like a letter, a dash and four digits.",
        f"Which order is it? With the order number I can {intent.asks}.",
    ]
    return [_soothe(text) for text in replies] if angry else replies


def _lower_first(text: str) -> str:
    """Lower-cases a sentence's first letter unless it is the word I."""
    return text if text.startswith(("I ", "I'")) else text[:1].lower() + text[1:]


def make_system_prompt(rng: random.Random) -> tuple[str, Shop]:
    """A short system prompt of another shop, and what it says about the shop."""
    draw = rng.random()
    if draw < 0.12:
        generic = ("", "You are a helpful assistant.", "Answer the customer.", "Be brief.")
        return rng.choice(generic), Shop()
    shop = Shop(rng.choice(SHOPS) if rng.random() < 0.85 else SHOP)
    sentences = [
        rng.choice(
            (
                "You are the chat assistant of {shop}.",
                "You work for {shop}.",
                "You answer customers of {shop}.",
                "You are the support assistant of the online shop {shop}.",
                "This is the customer chat of {shop}.",
            )
        ).format(shop=shop.name)
    ]
    if rng.random() < 0.5:
        days = rng.choice((7, 10, 14, 15, 20, 21, 28, 30, 40, 45, 50, 60, 90))
        shop = Shop(shop.name, days)
        sentences.append(f"Returns are accepted within {days} days of delivery.")
    extras = [
        "Be polite and short.",
        "Use plain words.",
        "Name the order that the customer asks about.",
        "Never ask for card numbers or passwords.",
        "If the order number is missing, ask for it.",
        "Write at most three sentences.",
        "Stay friendly.",
        "Refunds take 5 working days.",
    ]
    sentences += rng.sample(extras, rng.randrange(0, 4))
    return " ".join(sentences), shop


def _first_question(
    rng: random.Random, intent: Intent, order: Order | None, details: dict[str, str]
) -> str:
    """The words of a question that names the order (None: leaves the number out)."""
    if order is None:
        return rng.choice(intent.follow_ups).format(**details)
    number = _written_number(rng, order)
    draw = rng.random()
    if draw < 0.66:
        reference = _pick(rng, _REFERENCES).format(n=number)
        template = rng.choice(intent.questions)
        if "my {order}" in template.lower() and "order" not in reference:
            reference = f"order {number}"
        template = template.replace("my {order}", "{order}") if "my " in reference else template
        text = template.format(order=reference, **details)
        return _capitalise(text) if template.startswith("{order}") else text
    question = rng.choice(intent.follow_ups).format(**details)
    if draw < 0.82:
        template = rng.choice(_NUMBER_BEFORE)
        if rng.random() < 0.5 and template[4:5] in (" ", ",") and not template.startswith("Order"):
            question = _lower_first(question)
        return template.format(n=number, q=question)
    return rng.choice(_NUMBER_AFTER).format(n=number, q=question)


def make_dialogue(
    rng: random.Random,
    *,
    held_out: bool,
    max_turns: int = 4,
    default_system_share: float = 1.0,
    intent_name: str | None = None,
) -> Dialogue:
    """Draws one dialogue of 1 to `max_turns` questions with their replies.

    Order numbers come from the held-out set or from its complement, never from both. With
    probability `1 - default_system_share` the dialogue opens with a system message of its own.
    `intent_name` fixes the intent of the first question.
    """
    messages: list[dict[str, str]] = []
    exchanges: list[Exchange] = []
    shop = Shop()
    if rng.random() >= default_system_share:
        prompt, shop = make_system_prompt(rng)
        messages.append({"role": "system", "content": prompt})

    def say(question: str, replies: list[str], intent: str, order: Order | None) -> None:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": _choose_reply(rng, replies)})
        exchanges.append(Exchange(intent, order, tuple(replies)))

    lengths = range(1, max_turns + 1)
    num_turns = rng.choices(lengths, [*_TURN_WEIGHTS, *[1] * max_turns][:max_turns])[0]
    order: Order | None = None  # the order under discussion
    last: Intent | None = None  # the last intent about an order

    while len(exchanges) < num_turns:
        first = not exchanges
        details = _details(rng)
        angry = rng.random() < 0.10
        final = len(exchanges) == num_turns - 1

        if intent_name is not None and first:
            intent = INTENT_BY_NAME[intent_name]
        elif not first and final and rng.random() < 0.25:
            intent = INTENT_BY_NAME[rng.choices(("thanks", "goodbye"), (3, 1))[0]]
        elif rng.random() < (0.14 if first else 0.10):
            pool = _OPENING_INTENTS
            intent = rng.choices(pool, [i.weight for i in pool])[0]
        else:
            intent = rng.choices(_ORDER_INTENTS, [i.weight for i in _ORDER_INTENTS])[0]

        if not intent.about_order:
            question = rng.choice(intent.questions).format(**details)
            short = intent.name in ("thanks", "goodbye", "greeting")
            rude = angry and not short
            if short:
                question = _roughen(rng, question.rstrip(".?") + rng.choice(("", ".", "!")))
            else:
                question = _dress(rng, question, first=first, angry=rude)
            turn = Turn(order or Order("A", "0000"), shop, angry=rude, **details)
            say(question, _right_replies(intent, turn), intent.name, None)
            continue

        if order is None and rng.random() < 0.10:
            # The number is missing: ask for it; the next turn may bring it.
            question = _dress(
                rng, _first_question(rng, intent, None, details), first=first, angry=angry
            )
            say(question, _number_requests(intent, angry), "ask_for_number", None)
            if len(exchanges) < max_turns and rng.random() < 0.8:
                order = random_order(rng, held_out=held_out)
                number = _written_number(rng, order)
                question = _roughen(rng, rng.choice(_NUMBER_ALONE).format(n=number))
                turn = Turn(order, shop, **details)
                say(question, _right_replies(intent, turn), intent.name, order)
                last = intent
            continue

        if order is not None and rng.random() < 0.55:
            # The same order, referred to without its number.
            question = rng.choice(intent.follow_ups).format(**details)
            opening = rng.choice(_FOLLOW_UP_OPENINGS)
            if opening.endswith(("d", ",", ":")):
                question = _lower_first(question)
            question = f"{opening} {question}".strip()
        elif order is not None and last is not None and rng.random() < 0.3:
            # Another order, the same request.
            order = random_order(rng, held_out=held_out)
            intent = last
            reference = _pick(rng, _REFERENCES).format(n=_written_number(rng, order))
            if intent.name in ("order_status", "arrival", "carrier", "refund", "amount", "invoice"):
                question = rng.choice(_ANOTHER_ORDER).format(order=reference)
            else:
                question = _first_question(rng, intent, order, details)
        else:
            order = random_order(rng, held_out=held_out)
            question = _first_question(rng, intent, order, details)
        question = _dress(rng, question, first=first, angry=angry)
        turn = Turn(order, shop, angry=angry, **details)
        say(question, _right_replies(intent, turn), intent.name, order)
        last = intent

    return Dialogue(messages, exchanges)


def make_dialogues(
    seed: int, count: int, *, held_out: bool, **options: object
) -> Iterator[Dialogue]:
    """Draws `count` dialogues from a seed; `options` go to `make_dialogue`."""
    rng = random.Random(seed)
    for _ in range(count):
        yield make_dialogue(rng, held_out=held_out, **options)  # type: ignore[arg-type]
