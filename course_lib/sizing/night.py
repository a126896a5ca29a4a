"""What a quiet night costs: a replica that comes for each customer, against one that stays.

    night = quiet_night([3600, 3700, 20_000], 28_800, cold_start_s=120, busy_s=5,
                        idle_timeout_s=300, usd_per_hour=3.5)

A replica that stays costs `usd_per_hour` for the whole night. One that comes costs its cold starts
and its idle time-outs, and those who called it wait.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from course_lib.validation import number


@dataclass(frozen=True)
class NightCost:
    """A night of a replica that is started when somebody comes.

    Args:
        cold_starts: how often it was started.
        billed_s: seconds that are paid: from each start until it leaves.
        usd: the price of those.
        waited_s: seconds that requests waited for a replica to be ready, all of them together.
    """

    cold_starts: int
    billed_s: float
    usd: float
    waited_s: float


def quiet_night(
    arrivals_s: Sequence[float],
    night_s: float,
    cold_start_s: float,
    busy_s: float,
    idle_timeout_s: float,
    usd_per_hour: float,
) -> NightCost:
    """The night of one replica that scales to zero.

    A request that finds no replica starts one, and waits for it with all that come meanwhile. Each
    is served for `busy_s`, several at once. The replica leaves `idle_timeout_s` after the end of
    the last request; one that comes at that very second still finds it.

    Args:
        arrivals_s: of the requests, in order, within the night.
        night_s: length of the night; what is there at its end is paid until then.
        cold_start_s: from the decision to start until it serves.
        busy_s: that each request is served.
        idle_timeout_s: that it stays without work.
        usd_per_hour: price of the replica.

    Raises:
        ValueError: a time or the price is negative, or an arrival is out of order or of the night.
    """
    night_s = number("night_s", night_s, above=0)
    cold_start_s = number("cold_start_s", cold_start_s, at_least=0)
    stay_s = number("busy_s", busy_s, at_least=0)
    stay_s += number("idle_timeout_s", idle_timeout_s, at_least=0)
    price = number("usd_per_hour", usd_per_hour, at_least=0)
    starts, billed_s, waited_s = 0, 0.0, 0.0
    ready_s = leaves_s = began_s = -1.0  # of the replica that there was last
    previous_s = 0.0
    for arrival_s in arrivals_s:
        previous_s = number("arrivals_s", arrival_s, at_least=previous_s, at_most=night_s)
        if not starts or arrival_s > leaves_s:
            billed_s += leaves_s - began_s
            starts, began_s, ready_s = starts + 1, arrival_s, arrival_s + cold_start_s
        served_s = max(arrival_s, ready_s)
        waited_s += served_s - arrival_s
        leaves_s = served_s + stay_s
    billed_s += min(leaves_s, night_s) - began_s
    return NightCost(starts, billed_s, price * billed_s / 3600, waited_s)
