"""A request on its way through a simulated fleet, over all its attempts, and what decides on it.

`Flight` is what the router is shown and what is left of a request at its end. Each of its attempts
is a `SimulatedRequest` of some replica. `load_of` is what a replica's admission is shown.
"""

from collections.abc import Sequence
from typing import Any

from course_lib.engine.request import Request, RequestStatus
from course_lib.fleet.capacity import Member
from course_lib.fleet.replica import Replica, SimulatedRequest, probe_of
from course_lib.fleet.router import RoutedRequest
from course_lib.serving.admission_base import Arrival, EngineLoad, PriorityClass
from course_lib.traces.trace import TraceRequest, content_ids, prompt_contents


class Flight:
    """A request on its way, over all its attempts."""

    __slots__ = (
        "_probe",
        "arrival_s",
        "attempt",
        "delivered_s",
        "first_token_s",
        "held_since_s",
        "index",
        "member",
        "prompt",
        "prompt_token_ids",
        "request",
        "request_id",
        "retries",
    )

    def __init__(self, index: int, request: TraceRequest) -> None:
        self.index = index
        self.request = request
        self.request_id = str(index)
        self.prompt = prompt_contents(request, -1 - 2 * index)
        self.prompt_token_ids: Sequence[int] = content_ids(self.prompt)
        self.arrival_s = request.arrival_s
        self.retries = 0
        self._probe: Request | None = None
        self.member: Member | None = None
        self.attempt: SimulatedRequest | None = None
        self.delivered_s: float | None = None
        self.first_token_s: float | None = None  # of the attempt that runs
        self.held_since_s: float | None = None  # at the gateway, for want of a replica

    def probe(self, block_size: int) -> Request:
        """Its prompt, to be looked up in prefix caches; all replicas have that block size."""
        if self._probe is None:
            self._probe = probe_of(self, block_size)
        return self._probe

    # What a router may know, see `RoutedRequest`.

    @property
    def session(self) -> str | None:
        """Of the trace's request."""
        return self.request.session

    @property
    def tenant(self) -> str:
        """Of the trace's request."""
        return self.request.tenant

    @property
    def region(self) -> str | None:
        """Of the trace's request."""
        return self.request.region

    @property
    def arrival(self) -> Arrival:
        """What admission decides on."""
        request = self.request
        return Arrival(
            request.tenant, request.priority_class, request.prompt_tokens, request.output_tokens
        )

    def row(self, status: str, reason: str) -> tuple[Any, ...]:
        """What is known of it at its end, by `REQUEST_COLUMNS`."""
        request, attempt = self.request, self.attempt
        served = attempt.metrics if attempt is not None else None
        return (
            self.index,
            self.arrival_s,
            request.prompt_tokens,
            attempt.num_output_tokens if attempt else request.output_tokens,
            request.tenant,
            request.priority_class,
            request.session,
            request.region,
            status,
            reason,
            self.member.replica.name if self.member else None,
            self.delivered_s if served else None,
            served.first_scheduled_time if served else None,
            self.first_token_s if served else None,
            served.finished_time if served else None,
            attempt.num_cached_tokens if attempt else 0,
            served.num_preemptions if served else 0,
            self.retries,
        )


def flight_of(attempt: Request) -> Flight | None:
    """Whose attempt it is; None for a warm-up."""
    assert isinstance(attempt, SimulatedRequest)
    return attempt.flight


def kept_probe(request: RoutedRequest, block_size: int) -> Request:
    """A probe for prefix caches, made once a request if the router hands on what it was given."""
    if isinstance(request, Flight):
        return request.probe(block_size)
    return probe_of(request, block_size)


def load_of(replica: Replica, priority_class: PriorityClass, now_s: float) -> EngineLoad:
    """How busy the replica is for a request of that class, as the server counts."""
    scheduler = replica.scheduler
    waiting: Sequence[Request] = scheduler.waiting
    arrivals = [r.metrics.arrival_time for r in waiting if r.status is RequestStatus.WAITING]
    if priority_class == "batch":
        waiting = [r for r in waiting if _is_batch(r)]
    return EngineLoad(
        num_running=len(scheduler.running),
        max_num_seqs=scheduler.max_num_seqs,
        num_waiting=len(waiting),
        num_waiting_tokens=sum(r.num_prompt_tokens for r in waiting),
        oldest_waiting_age_s=now_s - min(arrivals, default=now_s),
        kv_cache_usage=replica.kv_cache_usage,
    )


def _is_batch(request: Request) -> bool:
    flight = flight_of(request)
    return flight is not None and flight.request.priority_class == "batch"
