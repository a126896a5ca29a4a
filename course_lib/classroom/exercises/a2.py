"""Exercises of notebook A2, the serving edge: buckets, order in the queue, who gets in, quantiles.

The oracles are here, but for that of admission, which is in `a2_admission`. Each also knows the
usual mistakes; `suspects` finds the one that was made.
"""

import bisect
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from course_lib.classroom.checks import Exercise, Mismatch
from course_lib.classroom.exercises.a2_admission import verify_admission
from course_lib.classroom.exercises.a2_oracle import FullAt, goes_first, with_article
from course_lib.classroom.exercises.suspects import Clock, Suspects, difference_of
from course_lib.serving.admission_base import PriorityClass

# A2.1


@dataclass
class _MistakenBucket:
    """A bucket as a level, with one of `_BUCKET_HINTS`' mistakes."""

    mistake: str
    rate_per_s: float
    size: float
    created_s: float

    def __post_init__(self) -> None:
        self.updated_s = self.created_s
        self.level = 0.0 if self.mistake == "empty" else self.size

    def wait_s(self, cost: float, now_s: float) -> float:
        since_s = self.created_s if self.mistake == "since the beginning" else self.updated_s
        elapsed_s = now_s - since_s
        if self.mistake == "whole seconds":
            elapsed_s = int(elapsed_s)
        if self.mistake != "no refill":
            self.level += elapsed_s * self.rate_per_s
        if self.mistake != "no cap":
            self.level = min(self.size, self.level)
        self.updated_s = now_s
        wanted = cost if self.mistake == "large costs" else min(cost, self.size)
        missing = max(0.0, wanted - self.level)
        if (self.mistake == "asking takes" and not missing) or (
            self.mistake == "refused pay" and missing
        ):
            self.level -= cost
        if self.mistake == "no debt":
            self.level = max(0.0, self.level)
        if self.mistake == "level or nothing":
            return max(0.0, cost - max(0.0, self.level)) / self.rate_per_s
        if self.mistake == "tokens":
            return missing
        if self.mistake == "rounded":
            return math.ceil(missing / self.rate_per_s)
        return missing / self.rate_per_s

    def take(self, cost: float, now_s: float) -> None:
        if self.mistake != "nothing taken":
            self.level -= cost
        if self.mistake == "no debt":
            self.level = max(0.0, self.level)


_BUCKET_HINTS = {
    "no refill": "The bucket never refills. (now - updated_s) * rate_per_s tokens have flowed in "
    "since it was looked at last.",
    "no cap": "A bucket cannot hold more than `size`: after the refill, level = min(size, level).",
    "since the beginning": "Remember when the level was right: after the refill, updated_s = now. "
    "Otherwise the same seconds flow in again at the next call.",
    "whole seconds": "Parts of a second count: do not round the time.",
    "empty": "It is full at first; the base class has set `level` already.",
    "large costs": "A cost above `size` could never be paid. A full bucket lets it through: what "
    "must be there is min(cost, size).",
    "asking takes": "`wait_s` only asks. Tokens leave in `take`.",
    "refused pay": "What has to wait has not been served, and pays nothing.",
    "no debt": "A large cost may take the level below 0. That is a debt, and has to be filled up "
    "first: do not cut the level off at 0.",
    "nothing taken": "`take` lowers the level by the whole cost.",
    "tokens": "The result is in seconds: missing tokens / rate_per_s.",
    "rounded": "The exact time, please; it is rounded up only for the client, in A2.3.",
    "level or nothing": "What must be there is min(cost, size), and the level may be below 0.",
}


def verify_token_bucket(answer: type, rng: random.Random) -> None:
    """Against the moment at which the bucket is full again, in histories of asking and taking."""
    if not isinstance(answer, type):
        raise Mismatch(f"expected a class, got {answer!r}")
    histories = [(2.0, 8.0, history) for history in _BUCKET_STORIES]
    for _ in range(60):
        tokens = rng.choice((1, 2, 4, 8, 20))
        history, now_s = [], 0.0
        for _ in range(rng.randint(1, 25)):
            now_s += rng.choice((0.0, 0.0, 0.125, 0.5, 1.0, 2.25, 9.0)) * rng.choice((1, 1, 1, 5))
            cost = rng.randint(1, tokens) if rng.random() < 0.8 else rng.randint(tokens, 3 * tokens)
            history.append((now_s, cost, rng.random() < 0.85))
        histories.append((rng.choice((0.5, 1, 2, 4)), float(tokens), history))
    for rate_per_s, size, history in histories:
        _run_bucket(answer, rate_per_s, size, history)


# (seconds, cost, whether it is taken if it may be)
_BUCKET_STORIES: list[list[tuple[float, int, bool]]] = [
    [(0, 8, True), (0, 1, True), (0.25, 1, True), (0.5, 1, True), (3.5, 8, True)],
    [(0, 3, False), (0, 8, True), (0.5, 4, True), (1, 4, True), (2, 4, True)],
    [(100, 8, True), (100, 8, True), (104, 8, True), (300, 8, True), (300, 1, True)],
    [(0, 20, True), (1, 1, True), (6, 1, True), (6.5, 1, True), (6.5, 9, True), (10.5, 9, True)],
]


def _run_bucket(
    answer: Any, rate_per_s: float, size: float, history: Sequence[tuple[float, int, bool]]
) -> None:
    start_s = 1000.0
    clock = Clock(start_s)
    bucket, truth = answer(rate_per_s, size, clock), FullAt(rate_per_s, size)
    mistaken = {name: _MistakenBucket(name, rate_per_s, size, start_s) for name in _BUCKET_HINTS}
    suspects = Suspects(_BUCKET_HINTS)
    told: list[str] = []
    for at_s, cost, wanted in history:
        now_s = clock.now_s = start_s + at_s
        expected = truth.wait_s(cost, now_s)
        num_calls = clock.num_calls
        got = bucket.wait_s(cost)
        theirs = {name: model.wait_s(cost, now_s) for name, model in mistaken.items()}
        calls = ", ".join(told[-6:]) or "nothing"
        where = (
            f"TokenBucket(rate_per_s={rate_per_s:g}, size={size:g}), after {calls}: "
            f"wait_s({cost}) at {at_s:g} s"
        )
        agreeing = [name for name, value in theirs.items() if _close(value, got)]
        difference = difference_of(got, expected, where)
        if difference is not None and clock.num_calls == num_calls:
            difference.hint = "Ask self.clock() what time it is: here it is a virtual one."
        suspects.saw(agreeing, difference)
        told.append(f"wait_s({cost}) at {at_s:g} s")
        if wanted and expected == 0:
            bucket.take(cost)
            truth.take(cost, now_s)
            for model in mistaken.values():
                model.take(cost, now_s)
            told[-1] = f"take({cost}) at {at_s:g} s"
    suspects.accuse()


def _close(a: Any, b: Any) -> bool:
    try:
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)
    except TypeError:
        return False


# A2.2


_ORDER_HINTS: dict[str, tuple[Callable[[str, float, float], float], str]] = {
    "strict": (
        lambda kind, now_s, delay_s: float(kind == "batch"),
        "So a batch request is served when no interactive one waits, which under load may be "
        "never. Let it count as arrived `batch_delay_s` later, and compare arrivals.",
    ),
    "classless": (
        lambda kind, now_s, delay_s: 1000 * now_s,
        "A batch request counts as arrived `batch_delay_s` later than it did.",
    ),
    "backwards": (
        lambda kind, now_s, delay_s: 1000 * (now_s - delay_s * (kind == "batch")),
        "Smaller numbers are served first, so batch_delay_s is added to the time of a batch "
        "request.",
    ),
    "mixed units": (
        lambda kind, now_s, delay_s: 1000 * now_s + delay_s * (kind == "batch"),
        "batch_delay_s is in seconds, the result in milliseconds: multiply the sum by 1000.",
    ),
    "seconds": (
        lambda kind, now_s, delay_s: int(now_s + delay_s * (kind == "batch")),
        "Whole seconds are too coarse: requests of the same second lose their order. Multiply by "
        "1000 before rounding.",
    ),
    "last first": (
        lambda kind, now_s, delay_s: -1000 * (now_s + delay_s * (kind == "batch")),
        "Smaller numbers are served first, so a later arrival has a larger one.",
    ),
}


def verify_virtual_arrival(answer: Callable[..., Any], rng: random.Random) -> None:
    """Pairs of requests that wait together: who is served first? Ties go by arrival, as always."""
    pairs: list[tuple[PriorityClass, float, PriorityClass, float, float]] = [
        ("batch", 3.0, "interactive", 12.5, 10.0),
        ("batch", 3.0, "interactive", 13.5, 10.0),
        ("batch", 3.0, "interactive", 3.0, 10.0),
        ("interactive", 5.2, "interactive", 5.7, 10.0),
        ("batch", 5.2, "batch", 5.7, 10.0),
        ("batch", 3.25, "interactive", 13.01, 10.0),
    ]
    classes: tuple[PriorityClass, ...] = ("interactive", "batch")
    for _ in range(300):
        first_s = rng.randint(0, 10**7) / 1000
        gap_s = rng.choice((2, 40, 700, 5000, 20_000, 60_000)) * rng.randint(1, 9) / 1000
        delay_s = rng.choice((0.0, 0.5, 10.0, 60.0))
        pairs.append((rng.choice(classes), first_s, rng.choice(classes), first_s + gap_s, delay_s))
    suspects = Suspects({name: hint for name, (_, hint) in _ORDER_HINTS.items()})
    for kind_a, at_a, kind_b, at_b, delay_s in pairs:
        numbers = []
        for kind, at_s in ((kind_a, at_a), (kind_b, at_b)):
            number = answer(kind, at_s, delay_s)
            if not isinstance(number, Integral) or isinstance(number, bool):
                raise Mismatch(
                    f"virtual_arrival_ms({kind!r}, {at_s}, {delay_s}) returned {number!r}",
                    "The scheduler wants a whole number of milliseconds: round(1000 * seconds).",
                )
            numbers.append(int(number))
        a_first = goes_first((kind_a, at_a), (kind_b, at_b), delay_s)
        if a_first is None:
            continue
        got_a_first = numbers[0] <= numbers[1]
        difference = Mismatch(
            f"{with_article(kind_a)} of {at_a:g} s and then {with_article(kind_b)} of {at_b:g} s "
            "wait together, with "
            f"batch_delay_s={delay_s:g}: expected {'the first' if a_first else 'the second'} one "
            f"to be served first, but their numbers are {numbers[0]} and {numbers[1]}"
        )
        agreeing = [
            name
            for name, (model, _) in _ORDER_HINTS.items()
            if (model(kind_a, at_a, delay_s) <= model(kind_b, at_b, delay_s)) == got_a_first
        ]
        suspects.saw(agreeing, difference if got_a_first != a_first else None)
    suspects.accuse()


# A2.4


Buckets = list[tuple[float, float]]


def _inverse(q: float, buckets: Buckets) -> float:
    """The oracle: the point where the straight lines between the counts reach the rank."""
    edges, counts = [0.0], [0.0]
    for edge, count in buckets[:-1]:
        edges.append(edge)
        counts.append(count)
    rank = q * buckets[-1][1]
    if buckets[-1][1] == 0:
        return math.nan
    if rank > counts[-1]:
        return edges[-1]
    at = bisect.bisect_left(counts, rank)
    share = (rank - counts[at - 1]) / (counts[at] - counts[at - 1])
    return (1 - share) * edges[at - 1] + share * edges[at]


def _first_reached(q: float, buckets: Buckets) -> int:
    rank = q * buckets[-1][1]
    return next(i for i, (_, count) in enumerate(buckets) if count >= rank)


def _not_cumulative(q: float, buckets: Buckets) -> float:
    rank, seen = q * sum(count for _, count in buckets), 0.0
    for i, (edge, count) in enumerate(buckets):
        if count and seen + count >= rank:
            lower = buckets[i - 1][0] if i else 0.0
            return lower if edge == math.inf else lower + (edge - lower) * (rank - seen) / count
        seen += count
    return math.nan


def _interpolated(q: float, buckets: Buckets, first_edge: float = 0.0) -> float:
    i = _first_reached(q, buckets)
    lower, below = buckets[i - 1] if i else (first_edge, 0.0)
    edge, count = buckets[i]
    return lower + (edge - lower) * (q * buckets[-1][1] - below) / (count - below)


_QUANTILES: dict[str, Callable[[float, Buckets], float]] = {
    "upper edge": lambda q, buckets: buckets[_first_reached(q, buckets)][0],
    "lower edge": lambda q, buckets: [0.0, *(e for e, _ in buckets)][_first_reached(q, buckets)],
    "middle": lambda q, buckets: (
        sum([0.0, *(edge for edge, _ in buckets)][_first_reached(q, buckets) :][:2]) / 2
    ),
    "not cumulative": _not_cumulative,
    "first edge": lambda q, buckets: _interpolated(q, buckets, buckets[0][0]),
    "infinite": lambda q, buckets: _interpolated(q, buckets),
    "percent": lambda q, buckets: _inverse(q / 100, buckets),
    "finite ones": lambda q, buckets: _inverse(q * buckets[-2][1] / buckets[-1][1], buckets),
    "above": lambda q, buckets: _inverse(1 - q, buckets),
}
_QUANTILE_HINTS = {
    "upper edge": "That is the upper edge of the right bucket. Interpolate: how far between the "
    "counts of the edge below and of this one is the rank?",
    "lower edge": "That is the lower edge of the right bucket. Interpolate between its edges.",
    "middle": "That is the middle of the right bucket. Interpolate by the counts of its two edges.",
    "not cumulative": "The counts add up already: each one counts all observations up to its edge.",
    "first edge": "Below the first edge the bucket begins at 0.",
    "infinite": "The last bucket has no upper edge. If the quantile lies there, all that can be "
    "said is the last finite edge.",
    "percent": "q is a share from 0 to 1, not a percentage.",
    "finite ones": "The number of observations is the last count, that of the infinite edge.",
    "above": "q is the share of observations below, not above.",
}


def verify_quantile(answer: Callable[..., Any], rng: random.Random) -> None:
    """Against the inverse of the straight lines between the counts."""
    ttft = [0.1, 0.25, 0.5, 1.0, 2.5, math.inf]
    cases: list[tuple[float, Buckets]] = [
        (0.5, list(zip(ttft, [0, 10, 30, 40, 40, 40], strict=True))),
        (0.95, list(zip(ttft, [0, 10, 30, 40, 40, 40], strict=True))),
        (0.25, list(zip(ttft, [8, 10, 30, 40, 40, 40], strict=True))),
        (0.1, list(zip(ttft, [8, 10, 30, 40, 40, 40], strict=True))),
        (0.99, list(zip(ttft, [0, 10, 30, 40, 60, 80], strict=True))),
        (0.75, list(zip(ttft, [0, 10, 30, 40, 40, 40], strict=True))),
        (0.5, list(zip(ttft, [0, 0, 0, 0, 0, 0], strict=True))),
    ]
    for _ in range(100):
        edges = sorted(rng.sample(range(1, 100), rng.randint(2, 8)))
        counts, total = [], 0
        for _ in range(len(edges) + 1):
            total += rng.choice((0, rng.randint(1, 30)))
            counts.append(float(total))
        if total:
            pairs = zip([*(edge / 10 for edge in edges), math.inf], counts, strict=True)
            cases.append((rng.choice((0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)), list(pairs)))
    suspects = Suspects(_QUANTILE_HINTS)
    for q, buckets in cases:
        expected = _inverse(q, buckets)
        got = answer(q, list(buckets))
        where = f"histogram_quantile({q}, {[(e, int(c)) for e, c in buckets]})"
        if math.isnan(expected):
            if not (isinstance(got, float) and math.isnan(got)):
                suspects.accuse()
                raise Mismatch(
                    f"{where}: expected nan, got {got!r}",
                    "Without observations there is no quantile: return math.nan.",
                )
            continue
        agreeing = [n for n, model in _QUANTILES.items() if _close(_tried(model, q, buckets), got)]
        suspects.saw(agreeing, difference_of(got, expected, where))
    suspects.accuse()


def _tried(model: Callable[[float, Buckets], float], q: float, buckets: Buckets) -> float:
    try:
        return model(q, buckets)
    except (ZeroDivisionError, StopIteration, IndexError):
        return math.nan


EXERCISES = (
    Exercise(
        id="A2.1",
        title="the token bucket",
        points=2,
        verify=verify_token_bucket,
        reference="course_lib.serving.admission_base:TokenBucket",
        hints=(
            "Begin `wait_s` with the refill: how many tokens have flowed in since updated_s? Not "
            "more than `size` fit.",
            "What must be there is min(cost, size). If it is, the wait is 0, else it is what is "
            "missing, divided by rate_per_s.",
            "`take` is one line: the level goes down by the whole cost, below 0 if need be.",
        ),
    ),
    Exercise(
        id="A2.2",
        title="who is served first",
        points=1,
        verify=verify_virtual_arrival,
        reference="course_lib.serving.admission_base:virtual_arrival_ms",
        hints=(
            "An interactive request counts as arrived when it arrived. When does a batch request?",
            "Add batch_delay_s to now_s if the class is batch. Then milliseconds, rounded.",
        ),
    ),
    Exercise(
        id="A2.3",
        title="the admission policy",
        points=5,
        verify=verify_admission,
        reference="course_lib.serving.admission:AdmissionPolicy",
        hints=(
            "Go through the rules in their order, and return at the first one that refuses. Only "
            "behind all of them is anything taken.",
            "room = self.max_num_queued_reqs for an interactive request, and int(that * "
            "self.batch_queue_share) for a batch one.",
            "Tenants: make the buckets if arrival.tenant is not in self.buckets, one for each item "
            "of self.tenant.rates. Then ask all of them for wait_s(arrival.costs[reason]).",
            "The refusal of a bucket: AdmissionDecision(False, reason=reason, message=..., "
            "status=429, retry_after_s=max(1, math.ceil(wait_s))).",
        ),
        part="admission",
    ),
    Exercise(
        id="A2.4",
        title="a quantile from a histogram",
        points=2,
        verify=verify_quantile,
        reference="course_lib.serving.scrape:histogram_quantile",
        hints=(
            "The rank is q times the number of observations, which is the last count. Find the "
            "first edge whose count reaches the rank.",
            "Remember the edge and the count before it, 0 and 0 at first. The share of the way "
            "between the edges is (rank - count before) / (count - count before).",
            "Two special cases: no observations at all (nan), and an infinite upper edge (the last "
            "finite one).",
        ),
    ),
)
