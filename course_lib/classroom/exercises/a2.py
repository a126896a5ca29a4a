"""Oracles of notebook A2, the serving edge: buckets, order in the queue, who gets in, quantiles.

Each oracle also knows the usual mistakes. They are tried on the same inputs as the answer; when it
differs, the mistake that gives what the answer gives, to the end of the inputs, has the hint.
"""

import bisect
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from course_lib.classroom.checks import Exercise, Mismatch, compare
from course_lib.serving.admission_base import (
    AdmissionBase,
    Arrival,
    EngineLoad,
    PriorityClass,
    TenantLimits,
)


class _Clock:
    """Virtual seconds. All of them are multiples of 1/8, so that sums are exact."""

    def __init__(self, now_s: float) -> None:
        self.now_s = now_s
        self.num_calls = 0

    def __call__(self) -> float:
        self.num_calls += 1
        return self.now_s


class _Suspects:
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


def _difference(got: Any, expected: Any, where: str) -> Mismatch | None:
    try:
        compare(got, expected, where)
    except Mismatch as difference:
        return difference
    return None


# A2.1


class _FullAt:
    """A bucket as the moment at which it will be full again."""

    def __init__(self, rate_per_s: float, size: float) -> None:
        self.rate_per_s, self.size, self.full_at_s = rate_per_s, size, -math.inf

    def wait_s(self, cost: float, now_s: float) -> float:
        spare_s = (self.size - min(cost, self.size)) / self.rate_per_s
        return max(0.0, self.full_at_s - now_s - spare_s)

    def take(self, cost: float, now_s: float) -> None:
        self.full_at_s = max(self.full_at_s, now_s) + cost / self.rate_per_s


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
    clock = _Clock(start_s)
    bucket, truth = answer(rate_per_s, size, clock), _FullAt(rate_per_s, size)
    mistaken = {name: _MistakenBucket(name, rate_per_s, size, start_s) for name in _BUCKET_HINTS}
    suspects = _Suspects(_BUCKET_HINTS)
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
        difference = _difference(got, expected, where)
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


def _goes_first(
    a: tuple[PriorityClass, float], b: tuple[PriorityClass, float], delay_s: float
) -> bool | None:
    """Whether a is served before b; None if they count as arrived at the same time."""
    ahead_s = (b[1] + delay_s * (b[0] == "batch")) - (a[1] + delay_s * (a[0] == "batch"))
    return None if abs(ahead_s) < 0.0015 else ahead_s > 0


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
    suspects = _Suspects({name: hint for name, (_, hint) in _ORDER_HINTS.items()})
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
        a_first = _goes_first((kind_a, at_a), (kind_b, at_b), delay_s)
        if a_first is None:
            continue
        got_a_first = numbers[0] <= numbers[1]
        difference = Mismatch(
            f"{_a(kind_a)} of {at_a:g} s and then {_a(kind_b)} of {at_b:g} s wait together, with "
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


def _a(kind: str) -> str:
    return f"an {kind} request" if kind == "interactive" else f"a {kind} request"


# A2.3


@dataclass(frozen=True)
class _Verdict:
    """What is compared of a decision. Several reasons are right if buckets wait equally long."""

    reasons: tuple[str, ...] = ()
    status: int = 200
    wait_s: float = 0.0

    @property
    def admitted(self) -> bool:
        return not self.reasons


@dataclass
class _Door:
    """Who gets in, by the rules, or with one of `_DOOR_HINTS`' mistakes."""

    limits: Mapping[str, Any]
    mistake: str = ""
    buckets: dict[tuple[str, str], _FullAt] = field(default_factory=dict)

    def decide(self, arrival: Arrival, load: EngineLoad, now_s: float) -> _Verdict:
        overload = self._overload(arrival, load)
        waits_s = self._waits(arrival, now_s)
        longest_s = max(waits_s.values(), default=0.0)
        if self.mistake == "tenants first" and longest_s > 0:
            overload = ""
        if overload:
            if self.mistake == "overload pays" and longest_s == 0:
                self._take(arrival, waits_s, now_s)
            return _Verdict((overload,), 429 if self.mistake == "all 429" else 503)
        if longest_s > 0:
            paid = {reason: wait_s for reason, wait_s in waits_s.items() if wait_s == 0}
            if self.mistake == "refused pay":
                paid = waits_s
            if self.mistake in ("refused pay", "some pay"):
                self._take(arrival, paid, now_s)
            reasons = tuple(r for r, wait_s in waits_s.items() if wait_s == longest_s)
            if self.mistake == "first reason":
                reasons = tuple(r for r, wait_s in waits_s.items() if wait_s > 0)[:1]
                longest_s = waits_s[reasons[0]]
            return _Verdict(reasons, 503 if self.mistake == "all 503" else 429, longest_s)
        self._take(arrival, waits_s, now_s)
        return _Verdict()

    def _overload(self, arrival: Arrival, load: EngineLoad) -> str:
        limits, mistake = self.limits, self.mistake
        is_batch = arrival.priority_class == "batch"
        share = limits["batch_queue_share"] if is_batch or mistake == "share for all" else 1.0
        room = int(limits["max_num_queued_reqs"] * (1.0 if mistake == "no share" else share))
        present = load.num_running + load.num_waiting
        replies = 1 if mistake == "one reply" else arrival.num_sequences
        queued = present + replies - load.max_num_seqs
        if mistake == "waiting":
            queued = load.num_waiting + replies
        is_full = queued > 0 and (present > 0 or mistake == "empty engine")
        if mistake == "running only":
            is_full = load.num_running >= load.max_num_seqs
        is_full = is_full or mistake == "never free"
        is_old = load.oldest_waiting_age_s > limits["max_queue_age_s"] or (
            mistake == "age at the limit" and load.oldest_waiting_age_s >= limits["max_queue_age_s"]
        )
        if is_old and mistake != "no age" and (is_full or mistake != "age when full"):
            return "queue_age"
        if not is_full:
            return ""
        if queued > room + (mistake == "one more") - (mistake == "one less"):
            return "max_num_queued_reqs"
        tokens = load.num_waiting_tokens + arrival.prompt_tokens * (mistake != "tokens before")
        most = limits["max_num_queued_tokens"]
        if mistake != "no tokens" and (
            tokens > most or (tokens == most and mistake == "tokens at the limit")
        ):
            return "max_num_queued_tokens"
        watermark = limits["kv_high_watermark"]
        is_high = load.kv_cache_usage > watermark or (
            load.kv_cache_usage == watermark and mistake == "kv at the limit"
        )
        return "kv_cache_usage" if is_high and mistake != "no kv" else ""

    def _waits(self, arrival: Arrival, now_s: float) -> dict[str, float]:
        tenant: TenantLimits = self.limits["tenant"]
        rates = {
            "tenant_requests": tenant.requests_per_s,
            "tenant_prompt_tokens": tenant.prompt_tokens_per_s,
            "tenant_generation_tokens": tenant.generation_tokens_per_s,
        }
        if self.mistake == "no tenants":
            return {}
        if self.mistake == "requests only":
            rates = {"tenant_requests": tenant.requests_per_s}
        waits_s = {}
        for reason, rate in rates.items():
            if rate == math.inf:
                continue
            size = max(1.0, rate * (1.0 if self.mistake == "no burst" else tenant.burst_s))
            if self.mistake == "small":
                size = rate * tenant.burst_s
            bucket = self.buckets.setdefault(self._key(arrival, reason), _FullAt(rate, size))
            waits_s[reason] = bucket.wait_s(arrival.costs[reason], now_s)
        return waits_s

    def _key(self, arrival: Arrival, reason: str) -> tuple[str, str]:
        return ("" if self.mistake == "one for all" else arrival.tenant), reason

    def _take(self, arrival: Arrival, reasons: Mapping[str, float], now_s: float) -> None:
        for reason in reasons:
            self.buckets[self._key(arrival, reason)].take(arrival.costs[reason], now_s)


_DOOR_HINTS = {
    "no age": "Rule 1: refuse while `load.oldest_waiting_age_s` is above `max_queue_age_s`.",
    "no kv": "Rule 5: refuse while `load.kv_cache_usage` is above `kv_high_watermark`.",
    "no tokens": "Rule 4: the prompt tokens that wait, with this prompt, may be at most "
    "`max_num_queued_tokens`.",
    "no share": "Batch requests may fill only int(max_num_queued_reqs * batch_queue_share) of the "
    "queue.",
    "one more": "When `room` replies wait, the queue is full: refuse what would make it more, "
    "queued > room, with the newcomer counted in.",
    "one less": "`room` replies may wait: refuse only what would make it more, queued > room.",
    "all 429": "429 says that this tenant has had its share, 503 that the server is overloaded.",
    "all 503": "429 says that this tenant has had its share, 503 that the server is overloaded.",
    "no tenants": "Rule 6: ask the tenant's buckets, and refuse with 429 if one cannot pay. When "
    "the request is admitted, `take` its cost from each.",
    "requests only": "A tenant has up to three buckets, one for each entry of `self.tenant.rates`; "
    "what a request takes from each is in `arrival.costs`.",
    "one for all": "Each tenant has buckets of its own: self.buckets[arrival.tenant].",
    "waiting": "Not all of `num_waiting` wait for a seat: some get one in the next step. Count "
    "num_running + num_waiting + num_sequences - max_num_seqs.",
    "one reply": "A request may ask for several replies, and each needs a seat: count "
    "`arrival.num_sequences`, not 1.",
    "empty engine": "Rule 2: with nobody in the engine there is nothing to wait for. A request for "
    "many replies would otherwise never be let in.",
    "share for all": "`batch_queue_share` is for batch requests; interactive ones may fill all of "
    "the queue.",
    "age when full": "Rule 1 comes before rule 2: a request that has waited too long is a sign of "
    "overload even when a seat is free.",
    "age at the limit": "Only above `max_queue_age_s`; at the limit it is still allowed.",
    "never free": "Rule 2: if nobody would have to wait, the request runs in the next step, and "
    "rules 3 to 5 do not apply.",
    "running only": "A seat is not free if somebody waits who gets it in the next step: count "
    "num_running and num_waiting.",
    "kv at the limit": "Only above `kv_high_watermark`; at the limit it is still allowed.",
    "tokens before": "Rule 4 counts this prompt, too: num_waiting_tokens + prompt_tokens.",
    "tokens at the limit": "`max_num_queued_tokens` may wait; only above it is too much.",
    "tenants first": "Overload is looked at first (rules 1 to 5), then the tenant's buckets.",
    "overload pays": "A request that is refused for overload pays nothing: take from the buckets "
    "only when everything else allows it.",
    "refused pay": "A request that is refused pays nothing, from no bucket.",
    "some pay": "From all buckets or from none: ask each for its `wait_s` first, and take only if "
    "all are 0.",
    "no burst": "A bucket holds `burst_s` seconds of its rate: size = rate * burst_s.",
    "small": "A bucket holds at least 1: size = max(1, rate * burst_s). Otherwise a small rate "
    "would let a request through before it is due.",
    "first reason": "If several buckets cannot pay, name the one that has to wait longest.",
}


def verify_admission(answer: type[AdmissionBase], rng: random.Random) -> None:
    """Arrival by arrival against the rules, with loads at and around every limit."""
    if not (isinstance(answer, type) and issubclass(answer, AdmissionBase)):
        raise Mismatch(f"expected a class derived from AdmissionBase, got {answer!r}")
    for scenario in range(80):
        tenant = TenantLimits(
            requests_per_s=rng.choice((0.25, 0.5, 2, 4, math.inf)),
            prompt_tokens_per_s=rng.choice((32, 128, math.inf)),
            generation_tokens_per_s=rng.choice((16, 64, math.inf)),
            burst_s=rng.choice((2.0, 4.0, 8.0)),
        )
        limits = {
            "max_num_queued_reqs": rng.choice((0, 1, 4, 5, 9)),
            "max_num_queued_tokens": rng.choice((400.0, math.inf)),
            "max_queue_age_s": rng.choice((2.0, 5.0)),
            "kv_high_watermark": rng.choice((0.75, 0.9)),
            "batch_queue_share": rng.choice((0.0, 0.5, 0.75, 1.0)),
            "batch_delay_s": rng.choice((0.0, 2.0, 10.0)),
            "tenant": TenantLimits() if scenario % 4 == 0 else tenant,
        }
        _run_door(answer, limits, rng, num_arrivals=60)


def _run_door(
    answer: Any, limits: Mapping[str, Any], rng: random.Random, num_arrivals: int
) -> None:
    clock = _Clock(1000.0)
    policy, truth = answer(**limits, clock=clock), _Door(limits)
    mistaken = {name: _Door(limits, name) for name in _DOOR_HINTS}
    suspects = _Suspects(_DOOR_HINTS)
    waiting: list[tuple[int, Arrival, float]] = []  # the priorities of those admitted
    told: Counter[str] = Counter()
    for number in range(num_arrivals):
        clock.now_s += rng.choice((0, 0, 0.125, 0.5, 1, 3)) * rng.choice((1, 1, 4))
        arrival = Arrival(
            rng.choice(("acme", "acme", "zenith")),
            rng.choice(("interactive", "interactive", "batch")),
            rng.choice((1, 20, 64, 300)),
            rng.choice((1, 16, 64, 200)),
            rng.choice((1, 1, 1, 1, 2, 6, 15)),
        )
        load = _random_load(limits, arrival, rng)
        expected = truth.decide(arrival, load, clock.now_s)
        got = policy.decide(arrival, load)
        theirs = {n: model.decide(arrival, load, clock.now_s) for n, model in mistaken.items()}
        where = _told_so_far(limits, number, arrival, load, clock.now_s, told)
        if any(not hasattr(got, name) for name in _FIELDS):
            raise Mismatch(f"{where}: decide returned {got!r}", "Return an `AdmissionDecision`.")
        difference = None
        if not _same_verdict(got, expected):
            difference = Mismatch(f"{where}: expected {_said(expected)}, got {_said_by(got)}")
        elif not expected.admitted:
            difference = _refusal_difference(got, expected, where)
        elif suspects.difference is None:
            _compare_order(got, arrival, clock.now_s, waiting, limits["batch_delay_s"], where)
        agreeing = [
            name
            for name, verdict in theirs.items()
            if _same_verdict(got, verdict)
            and (verdict.admitted or _refusal_difference(got, verdict, "") is None)
        ]
        suspects.saw(agreeing, difference)
        told[arrival.tenant] += expected.admitted
    suspects.accuse()


_FIELDS = ("admitted", "priority", "reason", "message", "status", "retry_after_s")


def _random_load(limits: Mapping[str, Any], arrival: Arrival, rng: random.Random) -> EngineLoad:
    """Mostly one in which a request is admitted or one limit is just reached."""
    seats = 4
    room = limits["max_num_queued_reqs"]
    batch_room = int(room * limits["batch_queue_share"])
    around = [0, room - 1, room, room + 1, batch_room - 1, batch_room, batch_room + 1]
    queued = max(0, rng.choice(around) - arrival.num_sequences + 1)
    if rng.random() < 0.4:
        running = rng.randint(0, seats)
        waiting = rng.randint(0, seats - running) * rng.randint(0, 1)
    else:
        running = rng.choice((seats, seats, seats - 1))
        waiting = seats - running + queued
    limit_s = limits["max_queue_age_s"]
    age_s = rng.choice((0, 0.5, 1, limit_s)) if rng.random() < 0.9 else limit_s + 0.125
    watermark = limits["kv_high_watermark"]
    usage = rng.choice((0.1, 0.5, watermark)) if rng.random() < 0.85 else watermark + 0.01
    tokens = 0
    if waiting:
        most = limits["max_num_queued_tokens"]
        most = 1000 if most == math.inf else int(most)
        spare = rng.choice((50, 1, 0)) if rng.random() < 0.75 else -1
        tokens = max(0, most - arrival.prompt_tokens - spare)
    return EngineLoad(running, seats, waiting, tokens, age_s if waiting else 0.0, usage)


def _same_verdict(got: Any, verdict: _Verdict) -> bool:
    if bool(got.admitted) != verdict.admitted:
        return False
    return verdict.admitted or (got.reason in verdict.reasons and got.status == verdict.status)


def _refusal_difference(got: Any, expected: _Verdict, where: str) -> Mismatch | None:
    """What is wrong with what a refusal tells the client."""
    seconds = got.retry_after_s
    is_whole = isinstance(seconds, Integral) and not isinstance(seconds, bool)
    if not is_whole or seconds < 1:
        return Mismatch(
            f"{where}: refused for {got.reason}, with retry_after_s={seconds!r}",
            "Each refusal says when to come back, in whole seconds and at least 1.",
        )
    told = (
        f"{where}: refused for {got.reason}; the bucket can pay in {expected.wait_s:g} s, but "
        f"retry_after_s is {seconds}"
    )
    if expected.wait_s > seconds:
        return Mismatch(
            told,
            "Round up: max(1, math.ceil(wait_s)). A client that comes back too early is refused "
            "again.",
        )
    if expected.wait_s and seconds > math.ceil(expected.wait_s) + 1:
        return Mismatch(
            told, "retry_after_s is the wait of the bucket that waits longest, rounded up."
        )
    if not isinstance(got.message, str) or not got.message:
        return Mismatch(
            f"{where}: refused for {got.reason}, with the message {got.message!r}",
            "The client reads `message`: say in a sentence why it was refused.",
        )
    return None


def _compare_order(
    got: Any,
    arrival: Arrival,
    now_s: float,
    waiting: list[tuple[int, Arrival, float]],
    delay_s: float,
    where: str,
) -> None:
    """The new one against all that were admitted before it."""
    if not isinstance(got.priority, Integral) or isinstance(got.priority, bool):
        raise Mismatch(
            f"{where}: admitted, with the priority {got.priority!r}",
            "The priority is a whole number, as in A2.2.",
        )
    new = int(got.priority)
    for priority, other, at_s in waiting:
        first = _goes_first((other.priority_class, at_s), (arrival.priority_class, now_s), delay_s)
        if first is not None and (priority <= new) != first:
            raise Mismatch(
                f"{where}: admitted with priority {new}, after {_a(other.priority_class)} "
                f"of {at_s - 1000:g} s with {priority}; expected "
                f"{'the earlier one' if first else 'the new one'} to be served first",
                "The priority is the virtual arrival of A2.2, at the time of self.clock().",
            )
    waiting.append((new, arrival, now_s))


def _told_so_far(
    limits: Mapping[str, Any],
    number: int,
    arrival: Arrival,
    load: EngineLoad,
    now_s: float,
    told: Counter[str],
) -> str:
    """The arrival, the load and the limits that are set, so that the reader can follow."""
    shown = {name: value for name, value in limits.items() if name != "tenant"}
    if limits["tenant"].rates:
        shown |= {**limits["tenant"].rates, "burst_s": limits["tenant"].burst_s}
    given = ", ".join(f"{name}={value:g}" for name, value in shown.items())
    return (
        f"arrival {number} at {now_s - 1000:g} s, {_a(arrival.priority_class)} of "
        f"{arrival.tenant} ({told[arrival.tenant]} admitted so far) with {arrival.prompt_tokens} "
        f"prompt tokens, max_tokens={arrival.max_tokens} and num_sequences="
        f"{arrival.num_sequences}, while {load} (limits: {given})"
    )


def _said(verdict: _Verdict) -> str:
    if verdict.admitted:
        return "it to be admitted"
    return f"it to be refused with {verdict.status} for {' or '.join(verdict.reasons)}"


def _said_by(got: Any) -> str:
    return "it admitted" if got.admitted else f"it refused with {got.status} for {got.reason!r}"


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
    suspects = _Suspects(_QUANTILE_HINTS)
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
        suspects.saw(agreeing, _difference(got, expected, where))
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
