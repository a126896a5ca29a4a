"""Exercises of notebook A4, cold starts: the backlog, the warm pool, the plan, the ScaledObject.

The oracles of the first two are here, that of the plan is in `a4_plan`, that of the ScaledObject
in `a4_scaled_object`. Each also knows the usual mistakes.
"""

import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from course_lib.classroom.checks import Exercise, Mismatch
from course_lib.classroom.exercises.a4_plan import verify_plan
from course_lib.classroom.exercises.a4_scaled_object import verify_scaled_object
from course_lib.classroom.exercises.suspects import Suspects, difference_of
from course_lib.fleet.warm_pool import Backlog, WarmPoolCost

# A4.1

_START = ("node_s", "image_gb", "network_gbit_per_s", "weights_gib", "disk_gb_per_s", "warm_up_s")
_RATES = ("arrivals_per_min", "served_before_per_min", "served_after_per_min")


def _backlog(given: dict[str, Any], mistake: str = "") -> Backlog:
    """The oracle, in exact fractions; or with one of the mistakes."""
    node, image, network, weights, disk, warm_up, arrivals, before, after = (
        Fraction(given[name]) for name in (*_START, *_RATES)
    )
    bits = {"bytes": Fraction(1), "bits the wrong way": Fraction(1, 8)}.get(mistake, Fraction(8))
    gib = Fraction(2**30, 10**9)
    gib = {"gib": Fraction(1), "gib the wrong way": 1 / gib}.get(mistake, gib)
    phases = [node, image * bits / network, weights * gib / disk, warm_up]
    if mistake == "no warm-up":
        del phases[3]
    ready = max(phases) if mistake == "longest phase" else sum(phases, Fraction(0))

    minute = 1 if mistake == "minutes" else 60
    served = Fraction(0) if mistake == "none served" else before
    queue = (arrivals - served) / minute * ready
    if mistake != "below 0":
        queue = max(Fraction(0), queue)
    surplus = (after if mistake == "nobody comes" else after - arrivals) / 60
    if mistake == "minutes of drain":
        surplus *= 60
    if queue <= 0:
        drain_s = 0.0
    elif surplus <= 0 and mistake != "never":
        drain_s = math.inf
    else:
        drain_s = float(queue / surplus) if surplus else math.nan
    return Backlog(float(ready), float(queue), drain_s)


_BACKLOG_HINTS = {
    "bytes": "The network is measured in bits: a GB is 8 Gbit.",
    "bits the wrong way": "A GB is 8 Gbit: multiply the GB by 8, then divide by the Gbit/s.",
    "gib": "The weights are in GiB, the disk in GB/s: a GiB is 2**30 bytes, a GB 1e9.",
    "gib the wrong way": "A GiB is more than a GB: multiply by 2**30 / 1e9.",
    "longest phase": "The phases follow one another: add them up.",
    "no warm-up": "After the weights are loaded, the runtime still warms up.",
    "minutes": "Rates are per minute, the cold start is in seconds: divide by 60.",
    "none served": "Those that are served meanwhile do not wait: the queue grows by arrivals - "
    "served_before each minute.",
    "below 0": "No queue is shorter than none: max(0, ...).",
    "nobody comes": "While the queue is worked off, customers go on coming: it shrinks by "
    "served_after - arrivals.",
    "minutes of drain": "drain_s is in seconds, the rates are per minute.",
    "never": "If no more is served than comes, the queue never ends: math.inf. And no queue is "
    "gone after 0 s.",
}


def verify_backlog(answer: Callable[..., Any], rng: random.Random) -> None:
    """Starts of every size, with fleets that are short of capacity, or not, or stay so."""
    suspects = Suspects(_BACKLOG_HINTS)
    for number in range(150):
        arrivals = rng.choice((30, 60, 90, 240, 600))
        before = rng.choice((0, arrivals // 2, arrivals // 3, arrivals, 2 * arrivals))
        given = {
            "node_s": rng.choice((0, 45, 95, 180)),
            "image_gb": rng.choice((0, 2.5, 8, 12)),
            "network_gbit_per_s": rng.choice((0.5, 1, 4, 10)),
            "weights_gib": rng.choice((0, 1, 15, 131)),
            "disk_gb_per_s": rng.choice((0.25, 1, 4)),
            "warm_up_s": rng.choice((0, 12, 40)),
            "arrivals_per_min": arrivals,
            "served_before_per_min": before,
            "served_after_per_min": before + (number % 3) * arrivals // 2 + number % 2,
        }
        where = f"backlog({', '.join(f'{name}={value:g}' for name, value in given.items())})"
        expected = _backlog(given)
        try:
            got = answer(**given)
        except ZeroDivisionError:
            raise Mismatch(f"{where} divides by zero", _BACKLOG_HINTS["never"]) from None
        agreeing = [
            name
            for name in _BACKLOG_HINTS
            if difference_of(got, _backlog(given, name), where) is None
        ]
        suspects.saw(agreeing, difference_of(got, expected, where))
    suspects.accuse()


# A4.2


def _warm_pool(given: dict[str, Any], mistake: str = "") -> WarmPoolCost:
    """The oracle, in exact fractions; or with one of the mistakes."""
    exact = {name: Fraction(value) for name, value in given.items()}
    ready_min = exact["ready_s"] / (1 if mistake == "seconds" else 60)
    minutes = {"whole ramp": exact["ramp_min"], "beyond the ramp": ready_min}.get(
        mistake, min(ready_min, exact["ramp_min"])
    )
    load = exact["customers_per_min"] * minutes * exact["requests_per_customer_per_min"]
    load /= 1 if mistake == "per minute" else 60
    share = load / exact["capacity_per_s"]
    replicas = {
        "floor": math.floor(share), "round": round(share), "one more": math.floor(share) + 1,
    }.get(mistake, math.ceil(share))  # fmt: skip
    hours = {"all day": Fraction(24), "one hour": Fraction(1)}.get(mistake, exact["hours_per_day"])
    return WarmPoolCost(replicas, float(replicas * exact["usd_per_hour"] * hours))


_WARM_POOL_HINTS = {
    "whole ramp": "Each warm replica that is used is replaced by one that is ready ready_s later. "
    "The pool has to cover what comes in that time, not the whole rush.",
    "beyond the ramp": "A rush that is over sooner than a replica is ready grows no further: "
    "min(ready_s / 60, ramp_min).",
    "seconds": "ready_s is in seconds, customers come per minute: divide by 60.",
    "per minute": "Each customer's requests are per minute, a replica's capacity is per second.",
    "floor": "A part of a replica needs a whole one: math.ceil.",
    "round": "A part of a replica needs a whole one: math.ceil.",
    "one more": "Round up, but not beyond: a load of exactly 2 replicas needs 2. math.ceil does "
    "it.",
    "all day": "The pool is paid for hours_per_day, which may be fewer than 24.",
    "one hour": "usd_per_hour is for an hour; the pool is kept for hours_per_day.",
}


def verify_warm_pool(answer: Callable[..., Any], rng: random.Random) -> None:
    """Rushes longer and shorter than a cold start, some of which fill their replicas exactly."""
    suspects = Suspects(_WARM_POOL_HINTS)
    for number in range(150):
        # A third fills its replicas exactly, in numbers whose products are exact. The others never
        # do: no product of theirs is a multiple of 13, 37 or 41.
        whole = number % 3 == 0
        given = {
            "customers_per_min": rng.choice((16, 32, 64) if whole else (20, 99, 165)),
            "ramp_min": rng.choice((2, 4, 8) if whole else (3, 6, 60)),
            "requests_per_customer_per_min": rng.choice((15, 30) if whole else (0.25, 0.5, 2)),
            "ready_s": rng.choice((60, 120, 240) if whole else (3, 45, 219, 323, 900)),
            "capacity_per_s": rng.choice((4, 8, 16, 64) if whole else (0.37, 0.41, 1.3)),
            "usd_per_hour": rng.choice((1.0, 1.5, 4.25)),
            "hours_per_day": rng.choice((24, 24, 2, 0.5)),
        }
        where = f"warm_pool_for({', '.join(f'{name}={value:g}' for name, value in given.items())})"
        got = answer(**given)
        agreeing = [
            name
            for name in _WARM_POOL_HINTS
            if difference_of(got, _warm_pool(given, name), where) is None
        ]
        suspects.saw(agreeing, difference_of(got, _warm_pool(given), where))
    suspects.accuse()


EXERCISES = (
    Exercise(
        id="A4.1",
        title="the backlog of a cold start",
        points=2,
        verify=verify_backlog,
        reference="course_lib.fleet.warm_pool:backlog",
        hints=(
            "ready_s first: four phases in seconds, one after the other. Then the queue, then how "
            "long it lasts.",
            "pull: image_gb * 8 / network_gbit_per_s. Load: weights_gib * 2**30 / 1e9 / "
            "disk_gb_per_s. Queue: (arrivals - served_before) / 60 * ready_s, but not below 0.",
            "drain_s: 0.0 if there is no queue, math.inf if served_after <= arrivals, else queue / "
            "((served_after - arrivals) / 60).",
        ),
    ),
    Exercise(
        id="A4.2",
        title="the warm pool and its price",
        points=2,
        verify=verify_warm_pool,
        reference="course_lib.fleet.warm_pool:warm_pool_for",
        hints=(
            "How many minutes does the rush go on before the first replacement is ready? How many "
            "customers come in them?",
            "min(ready_s / 60, ramp_min) * customers_per_min customers; times "
            "requests_per_customer_per_min / 60 is requests per second.",
            "replicas = math.ceil(requests per second / capacity_per_s), and WarmPoolCost("
            "replicas, replicas * usd_per_hour * hours_per_day).",
        ),
    ),
    Exercise(
        id="A4.3",
        title="the cold start plan",
        points=4,
        verify=verify_plan,
        reference="course_lib.fleet.warm_pool:ColdStartPlan",
        hints=(
            "Which steps of the forecast lie between now and now + self.ready_time_s? The one in "
            "which now is counts, and the last one too.",
            "int(now // self.step_s) to int((now + self.ready_time_s) // self.step_s), both "
            "included. After the last step of the day the first one follows: index % "
            "len(self.forecast).",
            "needed = math.ceil(highest / self.capacity_per_replica); needed - current_replicas "
            "stand by, within self.min_standby and self.max_standby.",
        ),
        part="cold_start",
    ),
    Exercise(
        id="A4.4",
        title="a ScaledObject",
        points=3,
        verify=verify_scaled_object,
        reference="course_lib.classroom.scaled_object:scaled_object",
        hints=(
            'A text with f"""...""": apiVersion, kind, metadata and spec at the margin, '
            "everything else two spaces deeper for each level. Print it and look.",
            "In spec: scaleTargetRef, minReplicaCount, maxReplicaCount, fallback, advanced and "
            'triggers. The metadata of the trigger are texts: threshold: "{target}", '
            'ignoreNullValues: "false".',
            "advanced: horizontalPodAutoscalerConfig: behavior: scaleDown: "
            "stabilizationWindowSeconds: {window_s}, each on a line of its own, two spaces deeper "
            "than the one before.",
        ),
    ),
)
