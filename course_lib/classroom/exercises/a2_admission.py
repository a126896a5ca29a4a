"""The oracle of A2.3: arrivals at busy and quiet engines, and who gets in by the rules.

`_Door` decides by the rules of the notebook, or with one of the usual mistakes. Thousands of
arrivals, most of them at the edge of a limit, show which of these the answer is.
"""

import math
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from course_lib.classroom.checks import Mismatch
from course_lib.classroom.exercises.a2_oracle import FullAt, goes_first, with_article
from course_lib.classroom.exercises.suspects import Clock, Suspects
from course_lib.serving.admission_base import (
    AdmissionBase,
    Arrival,
    EngineLoad,
    TenantLimits,
)


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
    buckets: dict[tuple[str, str], FullAt] = field(default_factory=dict)

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
            bucket = self.buckets.setdefault(self._key(arrival, reason), FullAt(rate, size))
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
    clock = Clock(1000.0)
    policy, truth = answer(**limits, clock=clock), _Door(limits)
    mistaken = {name: _Door(limits, name) for name in _DOOR_HINTS}
    suspects = Suspects(_DOOR_HINTS)
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
        first = goes_first((other.priority_class, at_s), (arrival.priority_class, now_s), delay_s)
        if first is not None and (priority <= new) != first:
            raise Mismatch(
                f"{where}: admitted with priority {new}, after "
                f"{with_article(other.priority_class)} of {at_s - 1000:g} s with {priority}; "
                f"expected {'the earlier one' if first else 'the new one'} to be served first",
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
        f"arrival {number} at {now_s - 1000:g} s, {with_article(arrival.priority_class)} of "
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
