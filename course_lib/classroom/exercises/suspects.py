"""What oracles share: a virtual clock, and which of the known mistakes was made.

An oracle plays its inputs to the answer, to the truth and to every known mistake. The mistake that
does what the answer does, to the end of the inputs, has the hint.
"""

from collections.abc import Collection, Mapping
from typing import Any

from course_lib.classroom.checks import Mismatch, compare


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
