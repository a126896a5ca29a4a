"""The shop's order records: every fact is a fixed function of the order number.

The same order gets the same carrier, status, day and amount in every reply, as if it were looked
up in a database, and a small model can learn the function. One number in twenty is held out: it
never appears in training, so the evaluation asks only about orders the model has not seen.
"""

from __future__ import annotations

import random
import string
import zlib
from dataclasses import dataclass

HELD_OUT_ONE_IN = 20

CARRIERS = ("Swiftline", "Harbour Post", "Bluecart", "Greenmile")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
# By the last digit of the order number.
STATUSES = (
    "packing",
    "packing",
    "shipped",
    "shipped",
    "shipped",
    "out_for_delivery",
    "delivered",
    "delivered",
    "delayed",
    "pickup_point",
)


@dataclass(frozen=True)
class Order:
    """An order and its record. `letter` is A to Z, `digits` four decimal digits."""

    letter: str
    digits: str

    @property
    def number(self) -> str:
        """The order number as the shop writes it, such as `A-1842`."""
        return f"{self.letter}-{self.digits}"

    @property
    def carrier(self) -> str:
        """The letter decides the carrier."""
        return CARRIERS[(ord(self.letter) - ord("A")) % len(CARRIERS)]

    @property
    def status(self) -> str:
        """The last digit decides the status."""
        return STATUSES[int(self.digits[3])]

    @property
    def day(self) -> str:
        """The third digit decides the weekday of the next (or last) event."""
        return WEEKDAYS[int(self.digits[2]) % len(WEEKDAYS)]

    @property
    def amount(self) -> str:
        """The price paid, in dollars: the first two digits, then the third as tenths."""
        first = self.digits[0] if self.digits[0] != "0" else "1"
        return f"${first}{self.digits[1]}.{self.digits[2]}0"

    @property
    def date(self) -> str:
        """The date of purchase: the third digit, in May for what has arrived, else in June."""
        month = "May" if self.in_hand else "June"
        return f"1{self.digits[2]} {month}"

    @property
    def in_hand(self) -> bool:
        """Whether the customer has the parcel."""
        return self.status == "delivered"


def is_held_out(number: str) -> bool:
    """Whether an order number is kept for evaluation (by a hash; the README's A-1842 is)."""
    return zlib.crc32(number.encode()) % HELD_OUT_ONE_IN == _HELD_OUT_RESIDUE


_HELD_OUT_RESIDUE = zlib.crc32(b"A-1842") % HELD_OUT_ONE_IN


def random_order(rng: random.Random, *, held_out: bool) -> Order:
    """Draws an order from the held-out numbers or from all the others."""
    while True:
        order = Order(rng.choice(string.ascii_uppercase), f"{rng.randrange(10_000):04d}")
        if is_held_out(order.number) == held_out:
            return order
