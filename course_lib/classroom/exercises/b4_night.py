"""The oracle of B4.4: a night second by second, and the mistakes often made in its bill."""

import random
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from course_lib.classroom.exercises.suspects import Suspects, difference_of
from course_lib.sizing.night import NightCost

_NIGHT_HINTS = {
    "start is free": "The replica is paid from the moment that it is started, not from that at "
    "which it is ready.",
    "time-out is free": "While it waits for the next customer it is paid as well: until it leaves.",
    "time-out from the first": "Each request begins the time-out anew: the replica leaves "
    "idle_timeout_s after the end of the last one.",
    "every request starts one": "A request that finds a replica, ready or on its way, starts none.",
    "only the first waits": "Those that come while the replica starts wait as well, until it is "
    "ready.",
    "wait the whole start": "Who comes while the replica starts waits only for the rest of the "
    "start.",
    "time-out from the arrival": "The time-out begins at the end of the request, and that is "
    "busy_s after it was begun to be served.",
    "pays beyond the night": "What is there at the end of the night is paid until then: "
    "min(leaves, night_s).",
    "leaves at the very second": "A request that comes at the very second at which the replica "
    "leaves still finds it.",
    "per second": "usd_per_hour is for an hour: seconds / 3600.",
    "last not paid": "The last replica is paid too, after the loop.",
}


def _night(given: Mapping[str, Any], mistake: str = "") -> NightCost:
    """The oracle: second by second through the night; or with one of the mistakes."""
    waiting = deque(given["arrivals_s"])
    cold_s, busy_s, idle_s = given["cold_start_s"], given["busy_s"], given["idle_timeout_s"]
    starts = billed_s = waited_s = last_billed_s = idle_run_s = 0
    ready_at = leaves_at = None  # None: there is no replica
    late = mistake == "pays beyond the night"
    second = 0
    while second < given["night_s"] or (late and leaves_at is not None) or waiting:
        gone = leaves_at is not None and (
            second >= leaves_at if mistake == "leaves at the very second" else second > leaves_at
        )
        if gone:
            ready_at = leaves_at = None
            billed_s -= idle_run_s * (mistake == "time-out is free")
            idle_run_s = 0
        while waiting and waiting[0] == second:
            waiting.popleft()
            idle_run_s = 0
            first = leaves_at is None
            if first or mistake == "every request starts one":
                starts, last_billed_s = starts + 1, 0
                ready_at = second + cold_s
            assert ready_at is not None
            wait_s = max(0, ready_at - second)
            if mistake == "only the first waits" and not first:
                wait_s = 0
            if mistake == "wait the whole start" and wait_s:
                wait_s = cold_s
            waited_s += wait_s
            served_at = max(second, ready_at)
            if first or mistake != "time-out from the first":
                leaves_at = served_at + busy_s + idle_s
            if mistake == "time-out from the arrival":
                leaves_at = max(second + busy_s + idle_s, ready_at)
        if leaves_at is not None and second < leaves_at and (late or second < given["night_s"]):
            assert ready_at is not None
            idle_run_s = idle_run_s + 1 if second >= leaves_at - idle_s else 0
            if not (mistake == "start is free" and second < ready_at):
                billed_s += 1
                last_billed_s += 1
        second += 1
    billed_s -= idle_run_s * (mistake == "time-out is free")
    if mistake == "last not paid":
        billed_s -= last_billed_s
    usd = given["usd_per_hour"] * billed_s / (1 if mistake == "per second" else 3600)
    return NightCost(starts, float(billed_s), float(usd), float(waited_s))


def verify_quiet_night(answer: Callable[..., Any], rng: random.Random) -> None:
    """Nights of every kind: nobody, one, several at once, at the last second, in the time-out."""
    suspects = Suspects(_NIGHT_HINTS)
    for number in range(60):
        night_s = rng.choice((600, 900, 1800))
        cold_s, busy_s = rng.choice((0, 20, 90, 207)), rng.choice((0, 4, 30))
        idle_s = rng.choice((0, 45, 120, 300))
        arrivals = [rng.randrange(night_s) for _ in range(number % 7)]
        if arrivals:
            first = min(arrivals)
            arrivals += [first] * (number % 2)  # two at once
            leaves_s = first + cold_s + busy_s + idle_s
            arrivals += [at for at in (first + cold_s // 2, leaves_s) if at < night_s]
        given = {
            "arrivals_s": sorted(arrivals),
            "night_s": night_s,
            "cold_start_s": cold_s,
            "busy_s": busy_s,
            "idle_timeout_s": idle_s,
            "usd_per_hour": rng.choice((1.0, 3.5, 14.0)),
        }
        where = f"quiet_night({', '.join(f'{name}={value}' for name, value in given.items())})"
        got = answer(**given)
        agreeing = [
            name for name in _NIGHT_HINTS if difference_of(got, _night(given, name), where) is None
        ]
        suspects.saw(agreeing, difference_of(got, _night(given), where))
    suspects.accuse()
