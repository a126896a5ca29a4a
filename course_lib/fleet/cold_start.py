"""What a replica that is not there yet costs in time: how many to start, and ready by when.

`capacity_plan` counts replicas for a known peak; `readiness` adds up the phases of a cold start and
compares them with the time that is left before the peak. A target does not erase start-up time: a
plan that is not ready before the surge needs warm replicas or an earlier start.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from course_lib.validation import number, whole_number


@dataclass(frozen=True)
class CapacityPlan:
    """Replicas for a peak, and the requests that find none of them warm."""

    target_replicas: int
    replicas_to_start: int
    requests_waiting_for_cold_capacity: int


@dataclass(frozen=True)
class Readiness:
    """When a replica started now is ready, and how long before the surge that is."""

    ready_s: float
    margin_s: float  # negative: that much too late
    ready_before_surge: bool


def capacity_plan(
    concurrent_requests: int, requests_per_replica: int, warm_replicas: int
) -> CapacityPlan:
    """Replicas that a peak takes, beyond those that are warm.

    Args:
        concurrent_requests: requests at once at the peak.
        requests_per_replica: as many as one replica serves within its latency objectives.
        warm_replicas: replicas that are ready now.

    Raises:
        ValueError: a count is not a whole number, is negative, or a replica serves none.
    """
    requests = whole_number("concurrent_requests", concurrent_requests, at_least=0)
    per_replica = whole_number("requests_per_replica", requests_per_replica)
    warm = whole_number("warm_replicas", warm_replicas, at_least=0)
    target = -(-requests // per_replica)
    return CapacityPlan(target, max(0, target - warm), max(0, requests - warm * per_replica))


def readiness(phase_seconds: Mapping[str, float], lead_time_s: float) -> Readiness:
    """Whether a replica started `lead_time_s` before the surge is ready in time.

    Args:
        phase_seconds: seconds of each phase; they follow one another.
        lead_time_s: from the start to the surge.

    Raises:
        ValueError: there is no phase, or a time is negative or not a number.
    """
    if not phase_seconds:
        raise ValueError("phase_seconds must have at least one phase, got none")
    ready_s = sum(
        number(f"phase_seconds[{name!r}]", seconds, at_least=0)
        for name, seconds in phase_seconds.items()
    )
    margin_s = number("lead_time_s", lead_time_s, at_least=0) - ready_s
    return Readiness(ready_s, margin_s, margin_s >= 0)
