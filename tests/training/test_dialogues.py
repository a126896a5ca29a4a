"""The grammar: same seed, same dialogues; held-out orders stay out; every intent occurs."""

import random
import re
from collections import Counter

import pytest

from training.dialogues import make_dialogue, make_dialogues
from training.intents import INTENTS
from training.orders import CARRIERS, Order, is_held_out, random_order

# Every way in which the grammar lets a customer write an order number.
ORDER_NUMBER = re.compile(r"\b([A-Z])[- ]?(\d{4})\b", re.IGNORECASE)


def numbers_in(text: str) -> set[str]:
    return {f"{letter.upper()}-{digits}" for letter, digits in ORDER_NUMBER.findall(text)}


def all_text(dialogue) -> str:
    return "\n".join(message["content"] for message in dialogue.messages)


def test_the_same_seed_gives_the_same_dialogues():
    first = list(make_dialogues(5, 200, held_out=False, default_system_share=0.5))
    again = list(make_dialogues(5, 200, held_out=False, default_system_share=0.5))
    other = list(make_dialogues(6, 200, held_out=False, default_system_share=0.5))
    assert first == again
    assert first != other


def test_held_out_orders_never_appear_in_training_dialogues():
    text = "\n".join(all_text(d) for d in make_dialogues(1, 5000, held_out=False, max_turns=10))
    numbers = numbers_in(text)
    assert len(numbers) > 4000
    assert not [number for number in numbers if is_held_out(number)]


def test_evaluation_dialogues_ask_only_about_held_out_orders():
    for dialogue in make_dialogues(1, 500, held_out=True, max_turns=10):
        assert all(is_held_out(number) for number in numbers_in(all_text(dialogue)))


def test_one_order_number_in_twenty_is_held_out():
    numbers = [f"{letter}-{i:04d}" for letter in "ACQZ" for i in range(10_000)]
    share = sum(map(is_held_out, numbers)) / len(numbers)
    assert share == pytest.approx(1 / 20, abs=0.005)
    assert is_held_out("A-1842")


def test_every_intent_occurs():
    seen = Counter(
        exchange.intent
        for dialogue in make_dialogues(2, 3000, held_out=False)
        for exchange in dialogue.exchanges
    )
    assert {intent.name for intent in INTENTS} | {"ask_for_number"} == set(seen)
    assert min(seen.values()) >= 10


@pytest.mark.parametrize("intent", INTENTS, ids=lambda intent: intent.name)
def test_a_dialogue_can_open_with_any_intent(intent):
    dialogue = make_dialogue(random.Random(0), held_out=False, max_turns=1, intent_name=intent.name)
    assert dialogue.exchanges[0].intent in (intent.name, "ask_for_number")


def test_a_reply_about_an_order_names_it_and_says_what_its_record_says():
    for dialogue in make_dialogues(3, 2000, held_out=False, max_turns=6):
        replies = [m["content"] for m in dialogue.messages if m["role"] == "assistant"]
        for exchange, reply in zip(dialogue.exchanges, replies, strict=True):
            assert reply in exchange.right_replies
            for right in exchange.right_replies:
                assert "{" not in right
                if exchange.order is not None:
                    assert numbers_in(right) == {exchange.order.number}
                    assert set(re.findall("|".join(CARRIERS), right)) <= {exchange.order.carrier}


def test_the_record_is_a_function_of_the_number():
    order = Order("A", "1842")
    assert (order.number, order.carrier, order.status) == ("A-1842", "Swiftline", "shipped")
    assert (order.day, order.amount, order.date) == ("Friday", "$18.40", "14 June")


def test_a_question_keeps_its_order_number_readable():
    rng = random.Random(8)
    for _ in range(1000):
        dialogue = make_dialogue(rng, held_out=False, max_turns=1)
        exchange = dialogue.exchanges[0]
        if exchange.order is not None:
            assert numbers_in(dialogue.messages[0]["content"]) == {exchange.order.number}


def test_drawn_orders_are_on_the_side_that_was_asked_for():
    rng = random.Random(0)
    assert all(is_held_out(random_order(rng, held_out=True).number) for _ in range(100))
    assert not any(is_held_out(random_order(rng, held_out=False).number) for _ in range(100))
