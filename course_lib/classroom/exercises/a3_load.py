"""The oracle of A3.2: replicas for a load, in exact fractions, and the usual mistakes."""

import math
import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from course_lib.classroom.checks import Mismatch
from course_lib.classroom.exercises.suspects import Suspects, difference_of
from course_lib.fleet.metrics import FleetMetrics


def _load(
    metrics: Mapping[str, float], current: int, target: float, cache_target: float, mistake: str
) -> Fraction:
    """In replicas, exactly, or with one of `LOAD_HINTS`' mistakes."""
    waiting = Fraction(metrics["num_requests_waiting"])
    running = Fraction(metrics["num_requests_running"])
    if mistake == "waiting only":
        running = Fraction(0)
    if mistake == "running only":
        waiting = Fraction(0)
    counted = Fraction(current if mistake == "kv of all" else metrics["num_replicas_ready"])
    if mistake == "kv of one":
        counted = Fraction(1)
    by_requests = (waiting + running) / Fraction(target)
    by_cache = counted * Fraction(metrics["kv_cache_utilization"]) / Fraction(cache_target)
    if mistake == "no kv":
        by_cache = Fraction(0)
    if mistake == "kv alone":
        return by_cache
    if mistake == "sum":
        return by_requests + by_cache
    if mistake == "smaller":
        return min(by_requests, by_cache)
    if mistake == "mean":
        return (by_requests + by_cache) / 2
    return max(by_requests, by_cache)


def needed(
    metrics: Mapping[str, float],
    current: int,
    target: float,
    cache_target: float,
    tolerance: float,
    mistake: str = "",
    nudge: float = 0.0,
) -> int:
    """Replicas for the load, `nudge` of it more or fewer; or with one of `LOAD_HINTS`' mistakes."""
    load = _load(metrics, current, target, cache_target, mistake) * Fraction(1 + nudge)
    if current and mistake != "no tolerance":
        compared = Fraction(math.ceil(load)) if mistake == "tolerance of the ceiling" else load
        off = compared / current - 1
        if mistake == "tolerance in replicas":
            off = load - current
        near = abs(off) < Fraction(tolerance) if mistake == "strict" else abs(off) <= tolerance
        if mistake == "tolerance down only":
            near = -tolerance <= off <= 0
        if mistake == "tolerance up only":
            near = 0 <= off <= tolerance
        if near:
            return current
    if mistake == "floor":
        return math.floor(load)
    if mistake == "round":
        return round(load)
    if mistake == "one more":
        return math.floor(load) + 1
    if mistake == "one step":
        return current + (math.ceil(load) > current) - (math.ceil(load) < current)
    if mistake == "at least one":
        return max(1, math.ceil(load))
    return math.ceil(load)


LOAD_HINTS = {
    "waiting only": "Waiting alone is the trap: a fleet that is full, and where nobody waits, "
    "would be taken for an idle one. The load is waiting + running.",
    "running only": "Those who wait need a place as well: waiting + running.",
    "no kv": "The KV cache is a load as well: num_replicas_ready * kv_cache_utilization / "
    "target_kv_cache. The larger of the two counts.",
    "kv alone": "The requests are a load as well: (waiting + running) / target_per_replica. The "
    "larger of the two counts.",
    "kv of all": "kv_cache_utilization is the mean over the ready replicas. Multiply it by "
    "num_replicas_ready: those that are loading hold nothing, and counting them makes a fleet grow "
    "because it grows.",
    "kv of one": "kv_cache_utilization is the mean over the ready replicas: multiply it by "
    "num_replicas_ready.",
    "sum": "Requests and KV cache are two views of the same load: the larger one counts, not the "
    "sum.",
    "smaller": "The larger of the two loads counts. Each resource must be enough.",
    "mean": "The larger of the two loads counts, not their mean. Each resource must be enough.",
    "no tolerance": "Within the tolerance nothing changes: if load / current_replicas is from 1 - "
    "tolerance to 1 + tolerance, return current_replicas.",
    "tolerance of the ceiling": "The tolerance is for the load itself, before it is rounded up.",
    "tolerance in replicas": "The tolerance is a share of the current replicas: look at load / "
    "current_replicas.",
    "strict": "At the tolerance it still holds: <=.",
    "tolerance down only": "The tolerance holds in both directions: abs(load / current_replicas - "
    "1).",
    "tolerance up only": "The tolerance holds in both directions: abs(load / current_replicas - "
    "1).",
    "floor": "Round up, with math.ceil: a part of a replica needs a whole one.",
    "round": "Round up, with math.ceil: a part of a replica needs a whole one.",
    "one more": "Round up, but not beyond: 8 requests at 4 each need 2 replicas, not 3. math.ceil "
    "does it.",
    "one step": "Return what the load needs, not one more or one fewer.",
    "at least one": "No load needs no replica. The limits come later, in A3.4.",
}


def is_plain(
    metrics: Mapping[str, float], current: int, target: float, cache_target: float, tolerance: float
) -> bool:
    """Whether any order of the arithmetic gives the same, in floats."""
    if all(math.frexp(x)[0] == 0.5 for x in (target, cache_target, current or 1)):
        return True
    arguments = (metrics, current, target, cache_target, tolerance)
    return len({needed(*arguments, nudge=nudge) for nudge in (-1e-9, 0.0, 1e-9)}) == 1


def random_load(rng: random.Random, around: float) -> dict[str, float]:
    """Requests near a number, with a KV cache that sometimes needs more than they do."""
    requests = max(0, round(around * rng.choice((0, 0.25, 0.9, 1, 1, 1.1, 1.25, 2, 6))))
    requests = max(0, requests + rng.choice((-1, 0, 0, 1)))
    waiting = rng.choice((0, 0, requests // 2, requests))
    return {
        "num_requests_waiting": float(waiting),
        "num_requests_running": float(requests - waiting),
        "kv_cache_utilization": rng.choice((0, 8, 16, 32, 40, 48, 56, 64)) / 64,
    }


def verify_load(answer: Callable[..., Any], rng: random.Random) -> None:
    """Against exact fractions, with loads at and around the targets and the tolerance."""
    suspects = Suspects(LOAD_HINTS)
    for _ in range(300):
        current = rng.choice((0, 1, 1, 2, 2, 3, 4, 4, 5, 8, 8, 12, 16))
        target = rng.choice((1, 2, 4, 4, 5, 8, 10))
        cache_target = rng.choice((0.5, 0.75, 0.8, 1.0))
        tolerance = rng.choice((0.0, 0.125, 0.25, 0.1))
        metrics = {
            **random_load(rng, target * max(1, current)),
            "num_replicas_ready": float(rng.randint(0, current)),
        }
        arguments = (current, target, cache_target, tolerance)
        if not is_plain(metrics, *arguments):
            continue
        expected = needed(metrics, *arguments)
        said = ", ".join(f"{name}={value:g}" for name, value in metrics.items())
        where = (
            f"replicas_for_load({{{said}}}, current_replicas={current}, target_per_replica="
            f"{target}, target_kv_cache={cache_target:g}, tolerance={tolerance:g})"
        )
        try:
            got = answer(FleetMetrics(metrics), *arguments)
        except ZeroDivisionError:
            raise Mismatch(
                f"{where} divides by zero",
                "With 0 replicas there is no ratio, so no tolerance either: ask `if "
                "current_replicas` first.",
            ) from None
        agreeing = [n for n in LOAD_HINTS if needed(metrics, *arguments, mistake=n) == got]
        suspects.saw(agreeing, difference_of(got, expected, where))
    suspects.accuse()
