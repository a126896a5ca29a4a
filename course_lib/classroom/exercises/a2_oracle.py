"""What the oracles of A2 share: a clock, the truth about buckets and order, the known mistakes.

An oracle plays its inputs to the answer, to the truth and to every known mistake. The mistake that
does what the answer does, to the end of the inputs, has the hint.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from course_lib.classroom.checks import Mismatch, compare
from course_lib.serving.admission_base import PriorityClass


class Clock:
    """Virtual seconds. All of them are multiples of 1/8, so that sums are exact."""

    def __init__(self, now_s: float) -> None:
        self.now_s = now_s
        self.num_calls = 0

    def __call__(self) -> float:
        """The time."""
        self.num_calls += 1
        return self.now_s


class Suspects:
    """Which of the known mistakes behave as the answer does."""

    def __init__(self, hints: Mapping[str, str]) -> None:
        self.hints = hints
        self.alive = list(hints)
        self.at_first: list[str] = []
        self.difference: Mismatch | None = None

    def saw(self, agreeing: Collection[str], difference: Mismatch | None) -> None:
        """What they gave for one input, and how the answer differed from what is right."""
        self.alive = [name for name in self.alive if name in agreeing]
        if difference is not None and self.difference is None:
            self.difference = difference
            self.at_first = [name for name in self.hints if name in agreeing]

    def accuse(self) -> None:
        """Raise the first difference, with the hint that fits best."""
        if self.difference is not None:
            found = self.alive
            if not found and self.difference.hint is None:
                found = self.at_first
            hint = self.hints[found[0]] if found else self.difference.hint
            raise Mismatch(str(self.difference), hint)


def difference_of(got: Any, expected: Any, where: str) -> Mismatch | None:
    """The first difference by `compare`, if there is one."""
    try:
        compare(got, expected, where)
    except Mismatch as difference:
        return difference
    return None


class FullAt:
    """A bucket as the moment at which it will be full again."""

    def __init__(self, rate_per_s: float, size: float) -> None:
        self.rate_per_s, self.size, self.full_at_s = rate_per_s, size, -math.inf

    def wait_s(self, cost: float, now_s: float) -> float:
        """Seconds until it can pay."""
        spare_s = (self.size - min(cost, self.size)) / self.rate_per_s
        return max(0.0, self.full_at_s - now_s - spare_s)

    def take(self, cost: float, now_s: float) -> None:
        """Pay."""
        self.full_at_s = max(self.full_at_s, now_s) + cost / self.rate_per_s


def goes_first(
    a: tuple[PriorityClass, float], b: tuple[PriorityClass, float], delay_s: float
) -> bool | None:
    """Whether a is served before b; None if they count as arrived at the same time."""
    ahead_s = (b[1] + delay_s * (b[0] == "batch")) - (a[1] + delay_s * (a[0] == "batch"))
    return None if abs(ahead_s) < 0.0015 else ahead_s > 0


def with_article(kind: str) -> str:
    """Such as "an interactive request"."""
    return f"an {kind} request" if kind == "interactive" else f"a {kind} request"
