"""What the oracles of A2 share: the truth about buckets and about who goes first."""

import math

from course_lib.serving.admission_base import PriorityClass


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
