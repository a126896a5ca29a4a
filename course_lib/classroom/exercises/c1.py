"""Exercises of notebook C1: where the time went, a counter's growth, peers, and the diagnosis.

The oracles of the first three are here; that of `diagnose` is in `c1_incidents`.
"""

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from course_lib.classroom.checks import Exercise, Mismatch
from course_lib.classroom.exercises.c1_incidents import incident_with, verify_diagnose
from course_lib.classroom.exercises.suspects import Suspects, difference_of
from course_lib.classroom.incidents.records import ReplicaLog, RequestLog, TimeSeries

PHASES = ("lost", "gateway", "cold_start", "queue", "prefill", "decode")

# C1.1


def _phase_at(time_s: float, request: RequestLog, replica: ReplicaLog) -> str:
    """The phase in which a request is at a moment."""
    assert replica.ready_s is not None
    if request.retried_s is not None and time_s < request.retried_s:
        return "lost"
    if time_s < request.dispatched_s:
        return "cold_start" if replica.started_s <= time_s < replica.ready_s else "gateway"
    if time_s < request.scheduled_s:
        return "queue"
    return "prefill" if time_s < request.first_token_s else "decode"


def _timeline(request: RequestLog, replica: ReplicaLog) -> dict[str, float]:
    """The oracle: cut the request's life at every moment that the logs name, ask for each piece."""
    named = [request.retried_s, request.dispatched_s, request.scheduled_s, request.first_token_s]
    marks = [m for m in [*named, replica.started_s, replica.ready_s] if m is not None]
    inside = {m for m in marks if request.arrival_s < m < request.finished_s}
    cuts = sorted({request.arrival_s, *inside, request.finished_s})
    phases = dict.fromkeys(PHASES, 0.0)
    for start_s, end_s in pairwise(cuts):
        phases[_phase_at((start_s + end_s) / 2, request, replica)] += end_s - start_s
    return phases


def _mistaken_timeline(mistake: str, request: RequestLog, replica: ReplicaLog) -> dict[str, float]:
    right = _timeline(request, replica)
    assert replica.ready_s is not None
    begin_s = request.arrival_s if request.retried_s is None else request.retried_s
    wrong = dict(right)
    if mistake == "no cold start":
        wrong |= {"cold_start": 0.0, "gateway": right["gateway"] + right["cold_start"]}
    if mistake == "whole start":
        cold_s = replica.ready_s - replica.started_s
        wrong |= {"cold_start": cold_s, "gateway": request.dispatched_s - begin_s - cold_s}
    if mistake == "not above 0":
        loading_s = min(request.dispatched_s, replica.ready_s) - max(begin_s, replica.started_s)
        wrong |= {"cold_start": loading_s, "gateway": request.dispatched_s - begin_s - loading_s}
    if mistake == "before the request":
        loading_s = min(request.dispatched_s, replica.ready_s) - replica.started_s
        cold_s = max(0.0, loading_s)
        wrong |= {"cold_start": cold_s, "gateway": request.dispatched_s - begin_s - cold_s}
    if mistake == "counted twice":
        wrong["gateway"] = request.dispatched_s - begin_s
    if mistake == "no retry":
        loading_s = min(request.dispatched_s, replica.ready_s) - max(
            request.arrival_s, replica.started_s
        )
        cold_s = max(0.0, loading_s)
        gateway_s = request.dispatched_s - request.arrival_s - cold_s
        wrong |= {"lost": 0.0, "cold_start": cold_s, "gateway": gateway_s}
    if mistake == "lost twice":
        wrong["gateway"] = request.dispatched_s - request.arrival_s - right["cold_start"]
    if mistake == "queue from arrival":
        wrong["queue"] = request.scheduled_s - request.arrival_s
    return wrong


_TIMELINE_HINTS = {
    "no cold start": "While its replica was loading, the request waited for the cold start, not "
    "for the gateway.",
    "whole start": "Only the part of the cold start counts in which the request waited: from the "
    "later of the two beginnings to the earlier of the two ends.",
    "not above 0": "Two spans that do not overlap have 0 s in common, not a negative time.",
    "before the request": "The replica may have been started before the request came. What it "
    "loaded before that cost the request nothing.",
    "counted twice": "The phases add up to the whole time: what is cold start is not gateway.",
    "no retry": "After a retry all that went before was for nothing: from the arrival to "
    "`retried_s` is lost, and the other phases begin there.",
    "lost twice": "After a retry the gateway's time begins at `retried_s`.",
    "queue from arrival": "The replica's queue begins when the request is dispatched to it.",
}


def verify_split(answer: Callable[..., Any], rng: random.Random) -> None:
    """Random lives of requests and replicas, on a grid of eighths of a second."""
    suspects = Suspects(_TIMELINE_HINTS)
    for number in range(200):
        request, replica = _random_life(rng, number)
        expected = _timeline(request, replica)
        where = f"split_timeline({_told(request)}, {_told_replica(replica)})"
        got = answer(request, replica)
        if isinstance(got, dict) and set(got) == set(expected):
            got = {name: got[name] for name in PHASES}  # in any order
        agreeing = [
            name
            for name in _TIMELINE_HINTS
            if difference_of(got, _mistaken_timeline(name, request, replica), where) is None
        ]
        suspects.saw(agreeing, difference_of(got, expected, where))
    suspects.accuse()


def _random_life(rng: random.Random, number: int) -> tuple[RequestLog, ReplicaLog]:
    def some() -> float:
        return rng.choice((0.0, 0.125, 0.5, 1.0, 2.5, 6.0)) * rng.choice((1, 1, 2))

    arrival_s = some()
    retried_s = arrival_s + some() if number % 3 == 1 else None
    begin_s = arrival_s if retried_s is None else retried_s
    ready_s = begin_s + some() if number % 2 else begin_s - some()
    dispatched_s = max(begin_s, ready_s) + some()
    scheduled_s = dispatched_s + some()
    first_token_s = scheduled_s + 0.125 + some()
    replica = ReplicaLog("replica-1", ready_s - some() - rng.choice((0.0, 4.0)), ready_s)
    request = RequestLog(
        "slow", arrival_s, retried_s, dispatched_s, scheduled_s, first_token_s,
        first_token_s + some(), 100, 10, 0, 0, int(retried_s is not None), "replica-1",
    )  # fmt: skip
    return request, replica


def _told(request: RequestLog) -> str:
    names = ("arrival_s", "retried_s", "dispatched_s", "scheduled_s", "first_token_s", "finished_s")
    return "request with " + ", ".join(f"{name}={getattr(request, name)}" for name in names)


def _told_replica(replica: ReplicaLog) -> str:
    return f"replica with started_s={replica.started_s}, ready_s={replica.ready_s}"


# C1.2


def _grown(series: TimeSeries, start_s: float, end_s: float) -> float:
    """The oracle: unwrap the resets, then take the difference of two readings."""
    unwrapped, base, last = [(float("-inf"), 0.0)], 0.0, 0.0
    for time_s, value in zip(series.times_s, series.values, strict=True):
        base += last if value < last else 0.0
        unwrapped.append((time_s, base + value))
        last = value

    def at(moment_s: float) -> float:
        return [value for time_s, value in unwrapped if time_s <= moment_s][-1]

    return at(end_s) - at(start_s)


def _inside(series: TimeSeries, start_s: float, end_s: float) -> list[float]:
    pairs = zip(series.times_s, series.values, strict=True)
    return [value for time_s, value in pairs if start_s <= time_s <= end_s]


_INCREASES: dict[str, tuple[Callable[[TimeSeries, float, float], float], str]] = {
    "resets": (
        lambda s, a, b: s.at(b) - s.at(a),
        "A counter that has become smaller began anew at 0: all of the new value is growth.",
    ),
    "inside": (
        lambda s, a, b: (lambda v: v[-1] - v[0] if v else 0.0)(_inside(s, a, b)),
        "What grew between `start_s` and the first scrape after it counts too: begin with the last "
        "scrape up to `start_s`.",
    ),
    "new counter": (
        lambda s, a, b: s.at(b) - (s.at(a) if s.times_s and s.times_s[0] <= a else s.values[0]),
        "A counter begins at 0: before the first scrape its value was 0.",
    ),
    "all": (
        lambda s, a, b: _grown(s, float("-inf"), float("inf")),
        "Only the growth between the two moments counts.",
    ),
    "since the beginning": (
        lambda s, a, b: _grown(s, float("-inf"), b),
        "Subtract what had been counted up to `start_s`.",
    ),
    "last value": (
        lambda s, a, b: s.at(b),
        "A counter's value is what it has counted since its beginning. The growth is a difference.",
    ),
}


def verify_increase(answer: Callable[..., Any], rng: random.Random) -> None:
    """Counters with and without a restart, spans with and without scrapes in them."""
    suspects = Suspects({name: hint for name, (_, hint) in _INCREASES.items()})
    for number in range(200):
        times, values, value, now_s = [], [], 0.0, float(rng.randint(-20, 10))
        for _ in range(rng.randint(1, 12)):
            now_s += rng.choice((1.0, 1.0, 2.5))
            value += rng.choice((0, 1, 3, 20))
            if number % 3 == 2 and rng.random() < 0.2:
                value = float(rng.choice((0, 2, 5)))
            times.append(now_s)
            values.append(float(value))
        series = TimeSeries(tuple(times), tuple(values))
        start_s = rng.choice((times[0] - 3, rng.choice(times), rng.choice(times) + 0.25))
        end_s = start_s + rng.choice((0.5, 2.0, 5.0, 30.0))
        where = f"increase({series}, {start_s}, {end_s})"
        got = answer(series, start_s, end_s)
        agreeing = [
            name
            for name, (model, _) in _INCREASES.items()
            if difference_of(got, model(series, start_s, end_s), where) is None
        ]
        suspects.saw(agreeing, difference_of(got, _grown(series, start_s, end_s), where))
    suspects.accuse()


# C1.3


def _middle(values: list[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _ratio(
    lines: list[tuple[str, float]],
    middle: Callable[[list[float]], float] = _middle,
    everybody: bool = False,
) -> float:
    here = [tpot_s for replica, tpot_s in lines if replica == "replica-0"]
    there = [tpot_s for replica, tpot_s in lines if everybody or replica != "replica-0"]
    return middle(here) / middle(there) if here and there else 1.0


_RATIOS: dict[str, tuple[Callable[[list[tuple[str, float]]], float], str]] = {
    "mean": (
        lambda lines: _ratio(lines, _mean),
        "One odd reply moves a mean. Take the medians.",
    ),
    "inverse": (
        lambda lines: 1 / _ratio(lines),
        "The replica of the slow request comes first: above 1 means that it is the slower one.",
    ),
    "everybody": (
        lambda lines: _ratio(lines, everybody=True),
        "Compare with the other replicas only; a slow replica among the peers hides itself.",
    ),
    "mean of all": (
        lambda lines: _ratio(lines, _mean, everybody=True),
        "Compare the medians, and with the other replicas only.",
    ),
}


def verify_ratio(answer: Callable[..., Any], rng: random.Random) -> None:
    """Neighbours on two to four replicas; replies of one token have no TPOT."""
    suspects = Suspects({name: hint for name, (_, hint) in _RATIOS.items()})
    for number in range(60):
        replicas = [f"replica-{i}" for i in range(rng.randint(1 if number % 5 == 4 else 2, 4))]
        lines, tokens = [], []
        for _ in range(rng.randint(1, 15)):
            lines.append((rng.choice(replicas), rng.choice((1, 2, 3, 4, 40)) / 64))
            tokens.append(rng.choice((1, 9, 17, 33)))
        incident = incident_with(lines, tokens)
        counted = [line for line, count in zip(lines, tokens, strict=True) if count > 1]
        told = ", ".join(
            f"{replica}: {f'{tpot_s} s' if count > 1 else 'one token'}"
            for (replica, tpot_s), count in zip(lines, tokens, strict=True)
        )
        where = f"tpot_ratio of a request on replica-0 with the neighbours ({told})"
        try:
            got = answer(incident)
        except (TypeError, ZeroDivisionError, ValueError) as error:
            raise Mismatch(
                f"{where} raised {type(error).__name__}: {error}",
                "A reply of one token has no TPOT: its `tpot_s` is None. Leave those out, and "
                "return 1.0 if one side has no reply left.",
            ) from error
        agreeing = [
            n for n, (m, _) in _RATIOS.items() if difference_of(got, m(counted), where) is None
        ]
        suspects.saw(agreeing, difference_of(got, _ratio(counted), where))
    suspects.accuse()


EXERCISES = (
    Exercise(
        id="C1.1",
        title="where the time went",
        points=2,
        verify=verify_split,
        reference="course_lib.classroom.diagnosis:split_timeline",
        hints=(
            "Four of the phases are differences of two neighbouring times of the log line. Begin "
            "with those.",
            "begin = retried_s if there is one, else arrival_s. Lost is begin - arrival_s. Between "
            "begin and dispatched_s lie the gateway and the cold start.",
            "The cold start is max(0, min(dispatched_s, ready_s) - max(begin, started_s)). The "
            "rest of that span is the gateway's.",
        ),
    ),
    Exercise(
        id="C1.2",
        title="how much a counter grew",
        points=1,
        verify=verify_increase,
        reference="course_lib.classroom.diagnosis:increase",
        hints=(
            "Go through the scrapes and remember the last value, 0 at first.",
            "A scrape after start_s and up to end_s adds value - last; if value < last, the "
            "process began anew and it adds the whole value.",
        ),
    ),
    Exercise(
        id="C1.3",
        title="slower than its peers?",
        points=1,
        verify=verify_ratio,
        reference="course_lib.classroom.diagnosis:tpot_ratio",
        hints=(
            "Sort the neighbours into two lists: those whose `replica` is that of "
            "`incident.request`, and the others.",
            "Leave out a `tpot_s` of None. Then statistics.median of each list, and 1.0 if one of "
            "them is empty.",
        ),
    ),
    Exercise(
        id="C1.4",
        title="the diagnosis",
        points=5,
        verify=verify_diagnose,
        reference="course_lib.classroom.diagnosis:diagnose",
        hints=(
            "From the outside in: was an attempt lost? Did the autoscaler turn round? Was it the "
            "gateway or a cold start? Only then look into the replica.",
            "Use shares: phase / request.ttft_s. The engines of the course answer in milliseconds, "
            "the simulated GPUs in seconds, and both are in the bank.",
            "In the replica: a cache that the peers have and this one lacks; a neighbour with a "
            "very long prompt that was computed while the request waited; tpot_ratio above 2; "
            "preemptions of the neighbours; then seats: all taken, or free?",
        ),
        part="diagnose",
    ),
)
