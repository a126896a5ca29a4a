"""Checks of numbers that callers bring, in one place, so that every refusal reads alike.

Each function returns the value when it is good and otherwise raises a `ValueError` that names it,
says what would be right and shows what came. Truth values and texts are not numbers here, and NaN
and infinity are never good. Nothing of `course_lib` is imported, so every layer may use it.
"""

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


def whole_number(name: str, value: Any, *, at_least: int = 1, at_most: int | None = None) -> int:
    """`value` as an int, if it is a whole number (numpy's too) within the limits.

    Raises:
        ValueError: it is not.
    """
    good = isinstance(value, Integral) and not isinstance(value, bool)
    if not good or value < at_least or (at_most is not None and value > at_most):
        limits = f"of at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
        raise ValueError(f"{name} must be a whole number {limits}, got {value!r}")
    return int(value)


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> float:
    """`value` as a float, if it is a finite number (numpy's too) within the limits.

    Raises:
        ValueError: it is not.
    """
    good = isinstance(value, Real) and not isinstance(value, bool) and _is_finite(value)
    if (
        not good
        or (above is not None and value <= above)
        or (at_least is not None and value < at_least)
        or (at_most is not None and value > at_most)
    ):
        limits = [
            f"{words} {limit:g}"
            for words, limit in (("above", above), ("at least", at_least), ("at most", at_most))
            if limit is not None
        ]
        wanted = " ".join(["a number", " and ".join(limits)]).rstrip()
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return float(value)


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False


def known_name(kind: str, name: Any, known: Iterable[str]) -> str:
    """The member of `known` that `name` is, whatever its case.

    Raises:
        ValueError: there is none. The message lists the known ones.
    """
    known = list(known)
    for candidate in known:
        if isinstance(name, str) and candidate.lower() == name.lower():
            return candidate
    raise ValueError(f"unknown {kind} {name!r}; known are {', '.join(known)}")
