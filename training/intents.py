"""What customers ask for, in which words, and what the shop replies.

An intent has questions (templates with slots) and a function that gives the replies for an order's
record. The first reply is the main wording, the others are chosen now and then. A new intent is
one reply function and one entry of `INTENTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from training.orders import Order

SHOP = "Fernhill Outfitters"
DEFAULT_RETURN_DAYS = 30

# What a customer may name besides the order.
SIZES = ("XS", "S", "M", "L", "XL", "XXL", "36", "37", "38", "39", "40", "41", "42", "43", "44")
COLOURS = ("black", "blue", "green", "red", "grey", "white", "yellow", "brown", "orange")
ITEMS = (
    "jacket",
    "tent",
    "backpack",
    "sleeping bag",
    "fleece",
    "rain coat",
    "lamp",
    "water bottle",
    "cap",
    "belt",
    "shirt",
    "sweater",
    "scarf",
    "camping stove",
    "hammock",
    "towel",
)
CODES = ("SPRING", "WELCOME", "SUMMER", "TRAIL", "FRIENDS", "WINTER", "CAMP", "HELLO")
SHOPS = (
    "Oakline",
    "Riverside Books",
    "Tinker Toys",
    "Maple and Pine",
    "Sunny Garden",
    "Cloud Nine Bedding",
    "Pixel Market",
    "Copper Kettle",
    "North Star Bikes",
    "Little Lamb",
    "Urban Thread",
    "Blue Door Home",
    "Happy Paws",
    "Green Leaf Tea",
    "Iron Gym",
    "Velvet Shoe",
)


@dataclass(frozen=True)
class Shop:
    """What a system prompt tells about the shop: its name and its return window in days."""

    name: str = SHOP
    return_days: int = DEFAULT_RETURN_DAYS


@dataclass(frozen=True)
class Turn:
    """What one reply depends on: the order asked about, what else was named, and the mood."""

    order: Order
    shop: Shop
    size: str = "M"
    colour: str = "blue"
    item: str = "jacket"
    code: str = "SPRING10"
    angry: bool = False


def _status_sentence(o: Order) -> str:
    """Where an order is, in one sentence that starts with its number."""
    return {
        "packing": f"Order {o.number} is being packed and leaves our warehouse on {o.day} "
        f"with {o.carrier}.",
        "shipped": f"Order {o.number} is on its way with {o.carrier} and should arrive on {o.day}.",
        "out_for_delivery": f"Order {o.number} is out for delivery with {o.carrier} and should "
        "arrive today.",
        "delivered": f"Order {o.number} was delivered by {o.carrier} on {o.day}.",
        "delayed": f"Order {o.number} is delayed at {o.carrier} and should now arrive on {o.day}.",
        "pickup_point": f"Order {o.number} is waiting for you at the {o.carrier} pickup point "
        f"until {o.day}.",
    }[o.status]


def _order_status(t: Turn) -> list[str]:
    o = t.order
    tail = {
        "packing": "You will get an email with the tracking link as soon as it ships.",
        "shipped": "You can follow the parcel with the tracking link in your shipping email.",
        "out_for_delivery": "Please keep your phone close, because the driver may call you.",
        "delivered": "If you cannot find the parcel, please ask your neighbours and then tell me.",
        "delayed": "I am sorry for the wait and will keep an eye on it for you.",
        "pickup_point": "Please bring an identity card when you collect it.",
    }[o.status]
    return [
        f"{_status_sentence(o)} {tail}",
        f"Thank you for waiting. {_status_sentence(o)}",
        f"I have looked it up for you. {_status_sentence(o)} {tail}",
    ]


def _late(t: Turn) -> list[str]:
    o = t.order
    if o.in_hand:
        tail = "Please look near your door and ask your neighbours, then write to me again."
    elif o.status == "pickup_point":
        tail = "The driver did not find anyone at home, so please collect it there."
    elif o.status == "packing":
        tail = "It took us longer than the one working day that we promise."
    else:
        tail = f"If nothing has come two days later, I will ask {o.carrier} to search for it."
    return [
        f"I am sorry that you have to wait. {_status_sentence(o)} {tail}",
        f"I understand that this is annoying. {_status_sentence(o)} {tail}",
    ]


def _arrival(t: Turn) -> list[str]:
    o = t.order
    text = {
        "packing": f"Order {o.number} leaves our warehouse on {o.day}, and {o.carrier} brings it "
        "two days later.",
        "shipped": f"{o.carrier} should bring order {o.number} on {o.day}. Someone should be at "
        "home to take the parcel.",
        "out_for_delivery": f"Order {o.number} should arrive today, because {o.carrier} already "
        "has it on the van.",
        "delivered": f"Order {o.number} has already arrived: {o.carrier} delivered it on {o.day}.",
        "delayed": f"Order {o.number} is late, and {o.carrier} now expects to bring it on {o.day}. "
        "I am sorry for the wait.",
        "pickup_point": f"Order {o.number} is already at the {o.carrier} pickup point, and you can "
        f"collect it there until {o.day}.",
    }[o.status]
    return [text, f"I have checked this for you. {text}"]


def _carrier(t: Turn) -> list[str]:
    o = t.order
    verb = {"delivered": "was delivered by", "packing": "will be delivered by"}.get(
        o.status, "is with"
    )
    return [
        f"Order {o.number} {verb} {o.carrier}. The tracking link in your shipping email leads to "
        "their page.",
        f"The carrier is {o.carrier} for order {o.number}.",
    ]


def _return_item(t: Turn) -> list[str]:
    o, days = t.order, t.shop.return_days
    if o.in_hand:
        text = (
            f"You can return order {o.number} within {days} days of delivery. I have sent you a "
            f"free return label for {o.carrier}, so please put it on the parcel."
        )
    else:
        text = (
            f"Order {o.number} has not reached you yet, so please wait until {o.carrier} has "
            f"brought it. After that you have {days} days to send it back with a free label."
        )
    return [text, f"Of course, I can help with that. {text}"]


def _refund(t: Turn) -> list[str]:
    o = t.order
    if not o.in_hand:
        text = (
            f"There is no refund for order {o.number} yet, because it has not been sent back. Once "
            f"the parcel is with us again, {o.amount} goes to your card within 5 working days."
        )
    elif o.status == "delivered" and o.digits[3] == "6":
        text = (
            f"The refund of {o.amount} for order {o.number} was sent on {o.day}. It reaches your "
            "card within 5 working days."
        )
    else:
        text = (
            f"The refund of {o.amount} for order {o.number} is approved and will be sent on "
            f"{o.day}. It reaches your card within 5 working days."
        )
    return [text, f"I have checked your refund. {text}"]


def _exchange(t: Turn, wanted: str) -> list[str]:
    o = t.order
    if o.status == "packing":
        text = f"I have changed order {o.number} to {wanted} before it leaves on {o.day}."
    elif o.in_hand:
        text = (
            f"I have set up a free exchange of order {o.number} for {wanted}. Please send the old "
            f"item back with {o.carrier}; the label is in your email."
        )
    else:
        text = (
            f"Order {o.number} is already with {o.carrier}, so I have noted a free exchange for "
            f"{wanted}. Please send the first parcel back when it arrives."
        )
    return [text, f"That is no problem. {text}"]


def _exchange_size(t: Turn) -> list[str]:
    return _exchange(t, f"size {t.size}")


def _exchange_colour(t: Turn) -> list[str]:
    return _exchange(t, f"the {t.colour} one")


def _cancel(t: Turn) -> list[str]:
    o, days = t.order, t.shop.return_days
    if o.status == "packing":
        text = (
            f"I have cancelled order {o.number} for you. The full amount of {o.amount} goes back "
            "to your card within 5 working days."
        )
    elif o.in_hand:
        text = (
            f"Order {o.number} was already delivered on {o.day}, so it cannot be cancelled. You "
            f"can send it back within {days} days instead."
        )
    else:
        text = (
            f"Order {o.number} is already with {o.carrier}, so I cannot cancel it any more. You "
            "can refuse the parcel or send it back for free."
        )
    return [text, f"Let me see what I can do. {text}"]


def _address(t: Turn) -> list[str]:
    o = t.order
    if o.status == "packing":
        text = (
            f"Order {o.number} is still being packed, so the address can be changed. Please send "
            f"me the new address before {o.day}."
        )
    elif o.in_hand:
        text = (
            f"Order {o.number} was already delivered by {o.carrier} on {o.day}, so the address "
            "cannot be changed any more. I can save the new one for your next order."
        )
    else:
        text = (
            f"Order {o.number} has already left our warehouse. Please use the tracking link to ask "
            f"{o.carrier} for another address."
        )
    return [text, f"Thank you for telling us. {text}"]


def _damaged(t: Turn) -> list[str]:
    o = t.order
    text = (
        f"I am sorry that order {o.number} arrived damaged. Please send a photo to "
        f"help@fernhill.example, and we will send a new {t.item} with {o.carrier} at once."
    )
    return [text, f"Oh no, that should not happen. {text}"]


def _missing(t: Turn) -> list[str]:
    o = t.order
    text = (
        f"I am sorry that the {t.item} is missing from order {o.number}. We will send it with "
        f"{o.carrier} tomorrow, and you do not pay anything for it."
    )
    return [text, f"Thank you for telling us. {text}"]


def _wrong_item(t: Turn) -> list[str]:
    o = t.order
    text = (
        f"I am sorry that order {o.number} came with the wrong item. The right one leaves tomorrow "
        f"with {o.carrier}, and the return label is in your email."
    )
    return [text, f"That is our mistake. {text}"]


def _invoice(t: Turn) -> list[str]:
    o = t.order
    text = (
        f"I have sent the invoice for order {o.number} to your email address. It is dated {o.date} "
        f"and shows {o.amount}."
    )
    return [text, f"With pleasure. {text}"]


def _payment(t: Turn) -> list[str]:
    o = t.order
    if o.status == "packing":
        text = (
            f"The payment of {o.amount} for order {o.number} did not go through the first time. "
            f"Please try another card; we keep the order for you until {o.day}."
        )
    else:
        text = (
            f"The payment of {o.amount} for order {o.number} went through on {o.date}, so you do "
            "not have to do anything."
        )
    return [text, f"I have looked into it. {text}"]


def _amount(t: Turn) -> list[str]:
    o = t.order
    text = f"You paid {o.amount} for order {o.number} on {o.date}. The invoice is in your account."
    return [text, f"Let me check. {text}"]


def _warranty(t: Turn) -> list[str]:
    o = t.order
    text = (
        f"The {t.item} from order {o.number} has a warranty of two years from {o.date}. Please "
        "send us a photo of the fault, and we will repair or replace it."
    )
    return [text, f"That is covered. {text}"]


def _discount(t: Turn) -> list[str]:
    percent = t.code[-2:]
    text = (
        f"Please type the code {t.code} in the basket before you pay, and {percent} percent comes "
        "off the price. It works once per customer and not on items in the sale."
    )
    return [text, f"Let me explain. {text}"]


def _hours(t: Turn) -> list[str]:
    return [
        f"You can reach the team of {t.shop.name} by phone from Monday to Saturday, 9 am to 6 pm. "
        "By email we are at help@fernhill.example.",
        "Our team answers the phone from Monday to Saturday, 9 am to 6 pm.",
    ]


def _human(t: Turn) -> list[str]:
    return [
        "I will pass this chat on to a colleague. Someone from our team answers from Monday to "
        "Saturday, 9 am to 6 pm, so please stay in the chat.",
        "Of course, a colleague will take over this chat in a moment.",
    ]


def _shipping_cost(t: Turn) -> list[str]:
    return [
        "Delivery is free from $50, and below that it costs $4. Orders leave our warehouse within "
        "one working day.",
        "Delivery costs $4, and from $50 it is free.",
    ]


def _return_policy(t: Turn) -> list[str]:
    return [
        f"You can send items back within {t.shop.return_days} days of delivery, and the return "
        "label is free. The refund takes 5 working days once the parcel is with us.",
        f"Returns are free within {t.shop.return_days} days of delivery.",
    ]


def _greeting(t: Turn) -> list[str]:
    return [
        f"Hello and welcome to {t.shop.name}. How can I help you with your order today?",
        f"Hello, this is the assistant of {t.shop.name}. What can I do for you?",
    ]


def _who_are_you(t: Turn) -> list[str]:
    return [
        f"I am the chat assistant of {t.shop.name}. I can help you with orders, deliveries, "
        "returns and payments.",
        f"I am an assistant and answer questions about your orders at {t.shop.name}.",
    ]


def _off_topic(t: Turn) -> list[str]:
    return [
        f"I am sorry, but I can only help with orders from {t.shop.name}. If you have a question "
        "about a delivery, a return or a payment, please ask me.",
        "I am afraid that I cannot help with that. Do you have a question about an order?",
    ]


def _thanks(t: Turn) -> list[str]:
    return [
        "You are welcome. Have a nice day, and write to us again if you need anything else.",
        "My pleasure. Have a nice day!",
    ]


def _bye(t: Turn) -> list[str]:
    return [
        f"Goodbye, and thank you for shopping at {t.shop.name}.",
        "Goodbye, and have a nice day.",
    ]


@dataclass(frozen=True)
class Intent:
    """One thing that a customer may want.

    `questions` name the order by the slot `{order}` (intents about an order) or need none.
    `follow_ups` do not name the order: used with a number before or after, in a later turn about
    the same order, or alone, in which case the reply asks for the number. They contain `it`-style
    words rather than a slot. `asks` completes "Please send me the order number, so that I can ...".
    """

    name: str
    reply: Callable[[Turn], list[str]]
    questions: tuple[str, ...]
    follow_ups: tuple[str, ...] = ()
    asks: str = ""
    weight: float = 1.0
    about_order: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "about_order", bool(self.asks))


INTENTS: tuple[Intent, ...] = (
    Intent(
        "order_status",
        _order_status,
        (
            "Where is {order}?",
            "Where is my {order}?",
            "Can you tell me where {order} is?",
            "What is the status of {order}?",
            "I would like to know where {order} is.",
            "Could you check {order} for me?",
            "Has {order} been shipped?",
            "Did {order} ship yet?",
            "Please track {order}.",
            "I am looking for {order}.",
            "What is happening with {order}?",
            "Do you know where {order} is right now?",
            "Any news about {order}?",
            "Please give me an update on {order}.",
            "I want to track {order}.",
            "Is {order} on its way?",
        ),
        (
            "Where is my parcel?",
            "Where is my order?",
            "Where is it?",
            "Where is it now?",
            "Can you check the status?",
            "What is the status?",
            "Has it been shipped?",
            "Can you track my package?",
            "Is it on its way?",
            "Any news about my parcel?",
            "Where is my package?",
        ),
        asks="look up where the parcel is",
        weight=3.0,
    ),
    Intent(
        "late_delivery",
        _late,
        (
            "{order} is late.",
            "Why is {order} so late?",
            "{order} should have been here days ago.",
            "I am still waiting for {order}.",
            "{order} has not arrived.",
            "{order} still has not come.",
            "It has been two weeks and {order} is not here.",
            "I never received {order}.",
            "Why has {order} not arrived yet?",
            "How much longer do I have to wait for {order}?",
            "You promised {order} for last week.",
        ),
        (
            "It is late.",
            "My parcel has not arrived.",
            "Why is it so late?",
            "My order is late.",
            "I am still waiting for my parcel.",
            "It should have been here days ago.",
            "I never received it.",
        ),
        asks="find out why the parcel is late",
        weight=1.5,
    ),
    Intent(
        "arrival",
        _arrival,
        (
            "When will {order} arrive?",
            "When does {order} come?",
            "On which day will I get {order}?",
            "When can I expect {order}?",
            "When will {order} be delivered?",
            "What is the delivery date of {order}?",
            "How long until {order} arrives?",
            "Will {order} be here this week?",
        ),
        (
            "When will it arrive?",
            "When does it come?",
            "When can I expect it?",
            "On which day will it come?",
            "When will it be delivered?",
            "What is the delivery date?",
            "When will my parcel arrive?",
        ),
        asks="see when the parcel will arrive",
        weight=1.5,
    ),
    Intent(
        "carrier",
        _carrier,
        (
            "Who delivers {order}?",
            "Which carrier has {order}?",
            "Which company brings {order}?",
            "Who is the carrier for {order}?",
            "With which carrier did you send {order}?",
            "Who will bring {order}?",
        ),
        (
            "Who delivers it?",
            "Which carrier is it?",
            "Which carrier has it?",
            "Who will bring it?",
            "Which company delivers it?",
            "Who is the carrier?",
        ),
        asks="see which carrier has the parcel",
    ),
    Intent(
        "return",
        _return_item,
        (
            "I want to return {order}.",
            "How can I return {order}?",
            "How do I send {order} back?",
            "Can I send {order} back?",
            "I would like to send back {order}.",
            "I need a return label for {order}.",
            "{order} does not fit, I want to return it.",
            "I do not like {order}, can I return it?",
            "Please help me return {order}.",
        ),
        (
            "I want to return it.",
            "How can I return it?",
            "How do I send it back?",
            "Can I send it back?",
            "I need a return label.",
            "I want to send it back.",
        ),
        asks="prepare the return",
        weight=1.5,
    ),
    Intent(
        "refund",
        _refund,
        (
            "Where is my refund for {order}?",
            "When do I get my money back for {order}?",
            "I am waiting for the refund of {order}.",
            "Has the refund for {order} been sent?",
            "What about my refund for {order}?",
            "How much is the refund for {order}?",
            "I have not got my money back for {order}.",
            "I want my money back for {order}.",
        ),
        (
            "Where is my refund?",
            "When do I get my money back?",
            "What about my refund?",
            "How much do I get back?",
            "Has my refund been sent?",
            "I want my money back.",
        ),
        asks="check the refund",
        weight=1.5,
    ),
    Intent(
        "exchange_size",
        _exchange_size,
        (
            "Can I change {order} to size {size}?",
            "I need {order} in size {size}.",
            "Please exchange {order} for size {size}.",
            "{order} is too small, can I get size {size}?",
            "{order} is too big, I need size {size}.",
            "I ordered the wrong size in {order}, I need size {size}.",
            "I would like to exchange {order} for size {size}.",
        ),
        (
            "Can I have it in size {size}?",
            "Can I change it to size {size}?",
            "I need size {size} instead.",
            "Please exchange it for size {size}.",
            "It is too small, I need size {size}.",
            "It is too big, can I get size {size}?",
        ),
        asks="set up the exchange",
    ),
    Intent(
        "exchange_colour",
        _exchange_colour,
        (
            "Can I have {order} in {colour}?",
            "I want to change the colour of {order} to {colour}.",
            "Please exchange {order} for the {colour} one.",
            "Can you swap {order} for the {colour} one?",
            "I would like {order} in {colour} instead.",
            "I wanted {colour}, can you exchange {order}?",
        ),
        (
            "Can I have it in {colour}?",
            "I want the {colour} one instead.",
            "Can you swap it for the {colour} one?",
            "Please change the colour to {colour}.",
        ),
        asks="set up the exchange",
    ),
    Intent(
        "cancel",
        _cancel,
        (
            "I want to cancel {order}.",
            "Please cancel {order}.",
            "Can I cancel {order}?",
            "Can you cancel {order}?",
            "Cancel {order} please.",
            "How do I cancel {order}?",
            "I do not need {order} any more, please cancel it.",
            "Is it too late to cancel {order}?",
        ),
        (
            "I want to cancel it.",
            "Please cancel it.",
            "Can I still cancel it?",
            "Can you cancel my order?",
            "How do I cancel my order?",
            "I changed my mind, please cancel.",
        ),
        asks="see whether it can be cancelled",
        weight=1.3,
    ),
    Intent(
        "change_address",
        _address,
        (
            "I need to change the address of {order}.",
            "Can you change the delivery address for {order}?",
            "{order} has the wrong address.",
            "I gave the wrong address for {order}.",
            "Please send {order} to another address.",
            "I have moved, can {order} go to my new address?",
            "How do I change the address for {order}?",
        ),
        (
            "Can you change the address?",
            "I gave the wrong address.",
            "Can it go to another address?",
            "I have moved, can you change the address?",
            "Please send it to my new address.",
            "The address is wrong.",
        ),
        asks="check the address",
    ),
    Intent(
        "damaged",
        _damaged,
        (
            "The {item} from {order} is damaged.",
            "{order} arrived damaged, the {item} is broken.",
            "The {item} in {order} is broken.",
            "My {item} from {order} came with a hole in it.",
            "The {item} in {order} arrived broken.",
            "{order} arrived today and the {item} is damaged.",
        ),
        (
            "The {item} is damaged.",
            "The {item} is broken.",
            "My {item} arrived broken.",
            "The {item} has a hole in it.",
        ),
        asks="send you a new one",
    ),
    Intent(
        "missing_item",
        _missing,
        (
            "The {item} is missing from {order}.",
            "There is no {item} in {order}.",
            "{order} came without the {item}.",
            "I got {order} but the {item} is missing.",
            "The {item} was not in the box of {order}.",
            "Where is the {item} from {order}? It was not in the box.",
        ),
        (
            "The {item} is missing.",
            "The {item} was not in the box.",
            "There is no {item} in the parcel.",
            "It came without the {item}.",
        ),
        asks="send the missing item",
    ),
    Intent(
        "wrong_item",
        _wrong_item,
        (
            "I got the wrong item in {order}.",
            "{order} is not what I ordered.",
            "You sent me the wrong thing in {order}.",
            "The item in {order} is wrong.",
            "{order} came with the wrong product.",
        ),
        (
            "I got the wrong item.",
            "This is not what I ordered.",
            "You sent me the wrong thing.",
            "The wrong product is in the box.",
        ),
        asks="send the right item",
    ),
    Intent(
        "invoice",
        _invoice,
        (
            "I need an invoice for {order}.",
            "Can you send me the invoice for {order}?",
            "Where can I find the invoice of {order}?",
            "Please send me the bill for {order}.",
            "I need a receipt for {order}.",
            "Could I get the invoice for {order} by email?",
        ),
        (
            "I need an invoice.",
            "Can you send me the invoice?",
            "Can I get a receipt?",
            "Please send me the bill.",
            "Where is the invoice?",
        ),
        asks="send you the invoice",
    ),
    Intent(
        "payment",
        _payment,
        (
            "The payment for {order} failed.",
            "My payment for {order} did not go through.",
            "My card was declined for {order}.",
            "Did my payment for {order} go through?",
            "I could not pay for {order}.",
            "Has {order} been paid?",
            "There was an error when I paid for {order}.",
        ),
        (
            "Did my payment go through?",
            "My card was declined.",
            "The payment failed.",
            "My payment failed.",
            "Has it been paid?",
        ),
        asks="check the payment",
    ),
    Intent(
        "amount",
        _amount,
        (
            "How much did I pay for {order}?",
            "What was the price of {order}?",
            "How much was {order}?",
            "What did {order} cost?",
            "What is the total of {order}?",
        ),
        (
            "How much did I pay?",
            "How much was it?",
            "What did it cost?",
            "What was the total?",
        ),
        asks="look up the amount",
    ),
    Intent(
        "warranty",
        _warranty,
        (
            "Is there a warranty on the {item} from {order}?",
            "How long is the warranty on the {item} from {order}?",
            "Does the {item} in {order} have a guarantee?",
            "The {item} from {order} broke after a few months, is there a warranty?",
            "Is the {item} from {order} still under warranty?",
        ),
        (
            "Is there a warranty on the {item}?",
            "Is the {item} still under warranty?",
            "Does the {item} have a guarantee?",
            "The {item} stopped working, is there a warranty?",
        ),
        asks="check the warranty",
    ),
    Intent(
        "discount_code",
        _discount,
        (
            "How do I use the code {code}?",
            "My discount code {code} does not work.",
            "Where do I enter {code}?",
            "I have a voucher {code}, how does it work?",
            "Can I use {code} on my order?",
            "Is the code {code} still valid?",
        ),
        weight=0.7,
    ),
    Intent(
        "opening_hours",
        _hours,
        (
            "What are your opening hours?",
            "When are you open?",
            "How can I contact you?",
            "Do you have a phone number?",
            "What is your email address?",
            "When can I call you?",
            "Are you open on Saturday?",
            "How do I reach customer service?",
        ),
        weight=0.7,
    ),
    Intent(
        "human_agent",
        _human,
        (
            "I want to talk to a human.",
            "Can I speak to a real person?",
            "Let me talk to a person.",
            "Please connect me to an agent.",
            "I want to speak to your manager.",
            "Are there any humans there?",
        ),
        weight=0.5,
    ),
    Intent(
        "shipping_cost",
        _shipping_cost,
        (
            "How much is shipping?",
            "What does delivery cost?",
            "Is delivery free?",
            "Do I have to pay for shipping?",
            "How long does delivery take?",
            "What are your shipping costs?",
        ),
        weight=0.6,
    ),
    Intent(
        "return_policy",
        _return_policy,
        (
            "What is your return policy?",
            "How long do I have to return something?",
            "Are returns free?",
            "How many days do I have to send something back?",
            "How do returns work?",
            "Can I return things if I do not like them?",
        ),
        weight=0.8,
    ),
    Intent(
        "greeting",
        _greeting,
        (
            "Hello",
            "Hi",
            "Hi there",
            "Good morning",
            "Good evening",
            "Hey",
            "Hello, I need help",
            "Can you help me?",
            "I have a question.",
            "Hi, I have a question about my order",
        ),
        weight=0.6,
    ),
    Intent(
        "who_are_you",
        _who_are_you,
        (
            "Who are you?",
            "What can you do?",
            "Are you a robot?",
            "What is your name?",
            "Am I talking to a machine?",
            "What can you help me with?",
        ),
        weight=0.4,
    ),
    Intent(
        "off_topic",
        _off_topic,
        (
            "What is the capital of France?",
            "Tell me a joke.",
            "What is the weather today?",
            "Who won the football match?",
            "Can you write a poem?",
            "What is two plus two?",
            "Tell me a story about a dragon.",
            "How do I cook rice?",
            "Write a Python program.",
            "What do you think about politics?",
            "Who is the president?",
            "What is the meaning of life?",
            "Translate this into French.",
            "Recommend a good film.",
            "How tall is the Eiffel Tower?",
            "Explain how a GPU works.",
            "Why is the sky blue?",
            "Do my homework.",
            "Sing a song for me.",
            "What should I eat tonight?",
        ),
        weight=0.7,
    ),
    Intent(
        "thanks",
        _thanks,
        (
            "Thanks",
            "Thank you",
            "Thank you very much",
            "Thanks a lot, that helps",
            "Great, thank you",
            "Perfect, thanks",
            "Ok, thank you for your help",
            "Thanks, that is all",
            "Great",
            "That helps, thanks",
        ),
        weight=0.5,
    ),
    Intent(
        "goodbye",
        _bye,
        ("Bye", "Goodbye", "See you", "Bye bye", "That is all, goodbye", "Have a nice day, bye"),
        weight=0.3,
    ),
)

INTENT_BY_NAME = {intent.name: intent for intent in INTENTS}
