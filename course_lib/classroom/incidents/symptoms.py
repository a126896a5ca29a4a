"""What a request's part in a run shows: where it waited, and what happened around it.

The conditions ask this to find the requests that stand for their cause.
"""

from collections.abc import Callable
from itertools import pairwise

from course_lib.classroom.incidents.records import (
    SCRAPES_BEFORE,
    FleetRun,
    ReplicaLog,
    RequestLog,
)


def replica_of(request: RequestLog, run: FleetRun) -> ReplicaLog:
    """The log of the replica that answered."""
    return next(r for r in run.replicas if r.name == request.replica)


def queued(share: float) -> Callable[[RequestLog, FleetRun], bool]:
    """Whether that share of the TTFT was spent in the replica's queue."""
    return lambda request, run: request.scheduled_s - request.dispatched_s > share * request.ttft_s


def before_first_token(request: RequestLog) -> float:
    """Share of the TTFT after the gateway."""
    return (request.first_token_s - request.dispatched_s) / request.ttft_s


def turns_before(request: RequestLog, run: FleetRun) -> int:
    """How often the autoscaler turned round, as far as a record goes back."""
    since_s = request.arrival_s - SCRAPES_BEFORE * run.settings.scrape_interval_s
    seen = [d for d in run.decisions if since_s < d.time_s < request.first_token_s]
    return sum(now != then for then, now in pairwise(d.wanted > d.current for d in seen))


def preempted_near(request: RequestLog, run: FleetRun) -> float:
    """Preemptions for each request of the same replica whose life overlaps with the wait."""
    near = [
        other
        for other in run.requests
        if other.replica == request.replica
        and other.arrival_s < request.first_token_s
        and other.finished_s > request.arrival_s
    ]
    return sum(other.preemptions for other in near) / max(1, len(near))
