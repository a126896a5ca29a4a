"""The oracle of B4.2: lines through two measurements in exact fractions, and the mistakes."""

import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from course_lib.classroom.checks import Mismatch
from course_lib.classroom.exercises.suspects import Suspects, difference_of

_PHASES = ("disk_read", "unpack", "host_copy", "device_copy", "warm_up")

_SCALE_HINTS = {
    "from the larger alone": "Not everything grows with the size: two measurements give a fixed "
    "part, too.",
    "from the smaller alone": "Not everything grows with the size: two measurements give a fixed "
    "part, too.",
    "no fixed part": "The fixed part is what is left of a measurement when its GB are taken off: "
    "add it.",
    "from the smaller on": "per GB x weights_gb, plus the fixed part: large_s - per GB x large_gb.",
    "negative fixed part": "A fixed part below 0 makes no sense: then large_s / large_gb x "
    "weights_gb.",
    "fixed part cut off": "Without a fixed part, seconds per GB are large_s / large_gb: the line "
    "goes through 0.",
    "negative slope": "If the larger one took no longer, the phase does not depend on the size: "
    "large_s.",
    "slope cut off": "If the larger one took no longer, the phase takes large_s, whatever the "
    "size.",
    "gib": "Everything is in GB here. Nothing has to be converted.",
}


def _scaled(
    small_gb: float, small_s: Mapping[str, float], large_gb: float, large_s: Mapping[str, float],
    weights_gb: float, mistake: str = "",
) -> dict[str, float]:  # fmt: skip
    """The oracle, in exact fractions; or with one of the mistakes."""
    small, large, target = Fraction(small_gb), Fraction(large_gb), Fraction(weights_gb)
    if mistake == "gib":
        target = target * 10**9 / 2**30
    found = {}
    for name, seconds in large_s.items():
        lower, upper = Fraction(small_s[name]), Fraction(seconds)
        slope = (upper - lower) / (large - small)
        fixed = lower - slope * small
        if mistake == "no fixed part":
            value = slope * target
        elif mistake == "from the larger alone":
            value = upper / large * target
        elif mistake == "from the smaller alone":
            value = lower / small * target
        elif mistake == "from the smaller on":
            value = lower + slope * target
        elif slope <= 0 and mistake != "negative slope":
            value = lower if mistake == "slope cut off" else upper
        elif fixed < 0 and mistake == "fixed part cut off":
            value = slope * target
        elif fixed < 0 and mistake != "negative fixed part":
            value = upper / large * target
        else:
            value = fixed + slope * target
        found[name] = float(value)
    return found


def verify_scale_loading(answer: Callable[..., Any], rng: random.Random) -> None:
    """Measurements with and without a fixed part, noisy ones among them; then bad input."""
    suspects = Suspects(_SCALE_HINTS)
    for number in range(120):
        small_gb = rng.choice((0.25, 0.5, 1.5))
        large_gb = small_gb + rng.choice((0.75, 2.0, 14.0))
        small_s, large_s = dict[str, float](), dict[str, float]()
        for name in rng.sample(_PHASES, rng.randint(1, 4)):
            fixed, per_gb = rng.randint(1, 40) / 8, rng.randint(1, 64) / 16
            kind = (number + len(small_s)) % 4
            if kind == 1:
                fixed = -per_gb * small_gb / rng.choice((2, 4))  # noise: no such part
            if kind == 2:
                per_gb = rng.choice((0.0, -fixed / large_gb / 2))
            small_s[name], large_s[name] = fixed + per_gb * small_gb, fixed + per_gb * large_gb
        given = (small_gb, small_s, large_gb, large_s, rng.choice((14.5, 29.0, 141.0)))
        where = f"scale_loading{given}"
        got = answer(*given)
        agreeing = [
            name
            for name in _SCALE_HINTS
            if difference_of(_as_dict(got), _in_order_of(got, _scaled(*given, name)), where) is None
        ]
        expected = _in_order_of(got, _scaled(*given))
        suspects.saw(agreeing, difference_of(_as_dict(got), expected, where))
    suspects.accuse()
    one = {"disk_read": 1.0, "warm_up": 2.0}
    for bad, says in (
        ((2.0, one, 2.0, one, 14.0), "large_gb must be above small_gb"),
        ((2.0, one, 1.0, one, 14.0), "large_gb must be above small_gb"),
        ((1.0, {"disk_read": 1.0}, 2.0, one, 14.0), "the phases of both must be the same"),
        ((1.0, one, 2.0, {"disk_read": 1.0}, 14.0), "the phases of both must be the same"),
    ):
        try:
            got = answer(*bad)
        except ValueError:
            continue
        except (KeyError, ZeroDivisionError) as error:
            got = f"{type(error).__name__}: {error}"
        raise Mismatch(
            f"scale_loading{bad}: expected a ValueError, got {got!r}", f"Refuse it first: {says}."
        )


def _as_dict(got: Any) -> Any:
    return dict(got) if isinstance(got, Mapping) else got


def _in_order_of(got: Any, expected: dict[str, float]) -> dict[str, float]:
    """The phases may come in any order."""
    if isinstance(got, Mapping) and set(got) == set(expected):
        return {name: expected[name] for name in got}
    return expected
