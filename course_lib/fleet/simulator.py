"""The fleet simulator: a trace goes in, what would have become of it comes out.

    result = simulate(trace, FleetSpec(replica, initial_replicas=2))

One queue of events, one clock, and for each replica the engine's own scheduler and block pool.
The same trace, fleet and seed give the same result, on any machine. A request goes

    arrival -> gateway -> router -> admission -> scheduler -> first token -> end

and back to the gateway when its replica is taken away. Each ends once: finished or rejected.
"""

import gc
import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from tqdm import tqdm

from course_lib.engine.batch import ScheduledBatch
from course_lib.engine.request import Request, RequestStatus
from course_lib.engine.sampling_params import SamplingParams
from course_lib.fleet.block_names import contents_of
from course_lib.fleet.capacity import Capacity, Member, State
from course_lib.fleet.events import EventQueue, Rank
from course_lib.fleet.flight import Flight, flight_of, kept_probe, load_of
from course_lib.fleet.regions import Region, Regions
from course_lib.fleet.replica import Replica, SimulatedRequest, VirtualClock
from course_lib.fleet.results import SimulationResult
from course_lib.fleet.spec import FleetSpec
from course_lib.fleet.telemetry import Telemetry, replica_row
from course_lib.serving.admission_base import AdmissionBase
from course_lib.traces.trace import Trace
from course_lib.validation import number


def simulate(
    trace: Trace,
    fleet: FleetSpec,
    *,
    seed: int = 0,
    until_s: float | None = None,
    jump: bool | None = None,
    record_events: bool = False,
    show_progress: bool = False,
) -> SimulationResult:
    """Run a trace through a fleet.

    Args:
        trace: the requests.
        fleet: what serves them.
        seed: of cold starts and reclaims.
        until_s: go on at least so long, though all requests have ended; by default until the last
            arrival.
        jump: see `Replica`.
        record_events: keep a log of all that happened, for tests and for looking at one request.
        show_progress: a bar of the requests that have arrived.

    Raises:
        ValueError: the trace names a region that the fleet lacks, or an argument is out of range.
        RuntimeError: a scheduler leaves its requests alone for ever.
    """
    simulation = Simulation(trace, fleet, seed, jump, record_events)
    until_s = trace.duration_s if until_s is None else number("until_s", until_s)
    with without_cycle_search():
        simulation.run(until_s, show_progress)
    return simulation.result()


@contextmanager
def without_cycle_search() -> Iterator[None]:
    """Spare Python its searches for garbage in cycles: while it runs, a simulation makes none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Simulation:
    """The state of one run of `simulate`, which has the arguments."""

    def __init__(
        self, trace: Trace, fleet: FleetSpec, seed: int, jump: bool | None, record_events: bool
    ) -> None:
        self.trace = trace
        self.fleet = fleet
        self.jump = jump
        self.clock = VirtualClock()
        self.queue = EventQueue()
        self.router = fleet.router()
        self.events: list[tuple[Any, ...]] | None = [] if record_events else None
        self.members: list[Member] = []  # all that ever were
        self.by_name: dict[str, Member] = {}
        self.rotation: list[Replica] = []  # as the gateway believes
        self.held: deque[Flight] = deque()  # at the gateway, for want of a replica
        self.gateway_free_s = 0.0
        self.gateway_queue = 0  # waiting for their turn at it
        self.num_unfinished = 0
        self.request_rows: list[tuple[Any, ...]] = []
        self.timeline_rows: list[dict[str, Any]] = []
        self.replica_timeline_rows: list[dict[str, Any]] = []
        self.decision_rows: list[dict[str, Any]] = []
        self._params: dict[int, SamplingParams] = {}
        self._admission: dict[str, AdmissionBase] = {}
        self._begin(seed)

    def _begin(self, seed: int) -> None:
        """Regions with their replicas, outages, the first scrape."""
        fleet = self.fleet
        regions = fleet.regions or (Region("default", fleet.initial_replicas),)
        self.regions = Regions(regions, fleet.outages)
        streams = np.random.SeedSequence(seed).spawn(len(regions))
        self.capacities: dict[str, Capacity] = {}
        self.telemetry: dict[str, Telemetry] = {}
        for region, stream in zip(regions, streams, strict=True):
            self.telemetry[region.name] = Telemetry(
                fleet.scrape_interval_s, fleet.replica.cpu_cores
            )
            self.capacities[region.name] = Capacity(
                fleet,
                region.name,
                fleet.replica.usd_per_hour * region.usd_per_hour_factor,
                self.clock,
                self.queue,
                np.random.default_rng(stream),
                self,
            )
        self.autoscalers = (
            {name: fleet.autoscaler(self.clock) for name in self.capacities}
            if fleet.autoscaler
            else {}
        )
        for region in regions:
            self.capacities[region.name].begin(region.replicas)
        starts = {region.name: region.replicas for region in regions}
        for outage in fleet.outages:
            capacity = self.capacities[outage.region]
            plan = self.queue.plan
            plan(outage.start_s, Rank.CAPACITY, capacity.go_down)
            plan(outage.known_s, Rank.CAPACITY, self._drop_gone, outage.region)
            plan(outage.end_s, Rank.CAPACITY, capacity.come_back, starts[outage.region])
        self.queue.plan(0.0, Rank.SCRAPE, self._scrape)

    def run(self, until_s: float, show_progress: bool = False) -> None:
        """Let all happen, until every request has ended and that time has come."""
        requests, queue, clock = self.trace.requests, self.queue, self.clock
        coming = 0
        progress = tqdm(
            total=len(requests), unit="request", disable=not show_progress, mininterval=0.5
        )
        with progress:
            while True:
                arrival_s = requests[coming].arrival_s if coming < len(requests) else math.inf
                if queue.next_before(arrival_s, Rank.ARRIVAL):
                    if not self.num_unfinished and min(arrival_s, queue.next_s) > until_s:
                        break
                    clock.now_s, act, args = queue.pop()
                    act(*args)
                else:
                    clock.now_s = arrival_s
                    self._arrive(Flight(coming, requests[coming]))
                    coming += 1
                    progress.update()
        clock.now_s = max(clock.now_s, until_s)

    def log(self, kind: str, *who: Any) -> None:
        """Keep an event, if a log was asked for."""
        if self.events is not None:
            self.events.append((self.clock.now_s, kind, *who))

    # A request on its way to a replica.

    def _arrive(self, flight: Flight) -> None:
        self.num_unfinished += 1
        region = self.regions.nearest(flight.region)[0]
        self.telemetry[region].arrived_prompt_tokens.append(flight.request.prompt_tokens)
        self.log("arrived", flight.index)
        self._enter_gateway(flight)

    def _enter_gateway(self, flight: Flight) -> None:
        gateway, now_s = self.fleet.gateway, self.clock.now_s
        if gateway.service_s == 0:
            self._dispatch(flight)
        elif self.gateway_queue >= gateway.max_queue:
            self._reject(flight, "gateway queue full")
        else:
            self.gateway_queue += 1
            self.gateway_free_s = max(now_s, self.gateway_free_s) + gateway.service_s
            self.queue.plan(self.gateway_free_s, Rank.REQUEST, self._leave_gateway, flight)

    def _leave_gateway(self, flight: Flight) -> None:
        self.gateway_queue -= 1
        self._dispatch(flight)

    def _dispatch(self, flight: Flight) -> None:
        """Send it to the router's choice, or keep it until a replica is in rotation."""
        if not self.rotation:
            self._hold(flight)
            return
        replica = self.router.choose(flight, self.rotation)
        flight.held_since_s = None
        flight.member = self.by_name[replica.name]
        home = self.regions.nearest(flight.region)[0]
        delay_s = self.regions.round_trip_s(home, replica.region)
        if delay_s:  # the way back delays its tokens as well; both are counted here
            arrives_s = self.clock.now_s + delay_s
            self.queue.plan(arrives_s, Rank.REQUEST, self._deliver, flight, flight.member)
        else:
            self._deliver(flight, flight.member)

    def _hold(self, flight: Flight) -> None:
        gateway = self.fleet.gateway
        if len(self.held) >= gateway.max_queue:
            self._reject(flight, "gateway queue full")
            return
        since_s = self.clock.now_s
        flight.held_since_s = since_s
        self.held.append(flight)
        self.queue.plan(since_s + gateway.timeout_s, Rank.REQUEST, self._give_up, flight, since_s)

    def _give_up(self, flight: Flight, since_s: float) -> None:
        if flight.held_since_s == since_s:
            self.held.remove(flight)
            self._reject(flight, "gateway timeout")

    def _deliver(self, flight: Flight, member: Member) -> None:
        """Hand it to the replica, which may be gone, may be leaving, or may refuse it."""
        if member.state is State.GONE:
            failed_s = self.clock.now_s + self.fleet.connect_timeout_s
            self.queue.plan(failed_s, Rank.REQUEST, self._retry, flight)
            return
        if member.state is not State.READY:
            self._retry(flight)
            return
        priority = 0
        if self.fleet.admission is not None:
            decision = self._admission[member.replica.name].decide(
                flight.arrival,
                load_of(member.replica, flight.request.priority_class, self.clock.now_s),
            )
            if not decision.admitted:
                self._reject(flight, decision.reason)
                return
            priority = decision.priority
        self._queue_at(flight, member, priority)

    def _queue_at(self, flight: Flight, member: Member, priority: int) -> None:
        request = flight.request
        reply = -2 - 2 * flight.index if request.reply is None else request.reply
        attempt = SimulatedRequest(
            f"{flight.index}/{flight.retries}",
            flight.prompt,
            self._params_for(request.output_tokens),
            reply,
            self.clock.now_s,
            priority,
        )
        attempt.flight = flight
        try:
            member.replica.add_request(attempt)
        except ValueError:
            self._reject(flight, "longer than max_model_len or the KV cache")
            return
        flight.attempt, flight.first_token_s = attempt, None
        flight.delivered_s = self.clock.now_s
        self.log("dispatched", flight.index, member.replica.name)
        self._run(member)

    def _params_for(self, max_tokens: int) -> SamplingParams:
        if max_tokens not in self._params:
            self._params[max_tokens] = SamplingParams(
                max_tokens=max_tokens, ignore_eos=True, temperature=0, detokenize=False
            )
        return self._params[max_tokens]

    def _retry(self, flight: Flight) -> None:
        """An attempt has failed; the client, or the gateway for it, tries again."""
        flight.retries += 1
        self.log("retried", flight.index)
        if flight.retries > self.fleet.max_retries:
            self._reject(flight, "retries used up")
        else:
            self._enter_gateway(flight)

    # A replica's steps.

    def _run(self, member: Member) -> None:
        """A request was queued: the replica begins a step soon, or the one that runs is cut."""
        if member.replica.end_s == math.inf:
            self.queue.plan(self.clock.now_s, Rank.BEGIN, self._begin_step, member)
        else:
            self._watch(member)

    def _begin_step(self, member: Member) -> None:
        if member.state is not State.GONE:
            member.replica.begin()
            self._watch(member)

    def _watch(self, member: Member) -> None:
        """Have the end of the replica's step in the queue of events."""
        end_s = member.replica.end_s
        if end_s != member.planned_end_s:
            member.planned_end_s = end_s
            member.version += 1
            self.queue.plan_step(
                end_s, member.number, member.version, self._complete, member, member.version
            )

    def _complete(self, member: Member, version: int) -> None:
        """The end of a step: first tokens, ended requests, and the next step."""
        if version != member.version:  # the step was cut short since this was planned
            return
        batch = member.replica.complete()
        now_s = self.clock.now_s
        for entry in batch.scheduled:
            attempt = entry.request
            flight = flight_of(attempt)
            if attempt.status is RequestStatus.ABORTED:
                continue
            if flight is None:
                if attempt.status.finished:
                    self._warmed_up(member, attempt)
                continue
            if flight.first_token_s is None and attempt.metrics.token_times:
                flight.first_token_s = now_s
                self._telemetry(member).ttft_s.append((now_s, now_s - flight.arrival_s))
                self.log("first_token", flight.index)
            if attempt.status.finished:
                self._finish(flight, member, attempt)
        self._watch(member)
        if member.state is State.DRAINING:
            self._capacity(member).leave_if_empty(member)

    def _observe(self, name: str, batch: ScheduledBatch) -> None:
        """Log what a scheduler has decided."""
        for request in batch.preempted:
            self.log("preempted", request.request_id, name)
        for entry in batch.scheduled:
            if entry.request.metrics.first_scheduled_time == self.clock.now_s:
                self.log("scheduled", entry.request.request_id, name, entry.num_tokens)

    def _finish(self, flight: Flight, member: Member, attempt: Request) -> None:
        telemetry, tokens = self._telemetry(member), attempt.num_output_tokens
        telemetry.finished_output_tokens.append(tokens)
        if tokens > 1:
            assert attempt.metrics.tpot_s is not None
            telemetry.tpot_s.append((self.clock.now_s, attempt.metrics.tpot_s))
        self.log("finished", flight.index, tuple(attempt.metrics.token_times))
        self._end(flight, "finished", "")

    def _reject(self, flight: Flight, reason: str) -> None:
        self.log("rejected", flight.index, reason)
        flight.attempt = None
        self._end(flight, "rejected", reason)

    def _end(self, flight: Flight, status: str, reason: str) -> None:
        """A request's row; it is in no queue any more."""
        self.num_unfinished -= 1
        self.request_rows.append(flight.row(status, reason))
        if flight.attempt is not None:  # the two would keep each other alive
            flight.attempt.flight = None

    # Replicas that come and go.

    def make_replica(self, region: str) -> tuple[int, Replica]:
        """The next replica, with its admission policy."""
        number = len(self.members)
        replica = Replica(
            f"replica-{number}",
            self.fleet.replica,
            self.clock,
            region,
            self.fleet.slowdowns.get(number, 1.0),
            self.jump,
            kept_probe,
        )
        if self.events is not None:
            replica.observe = self._observe
        if self.fleet.admission is not None:
            self._admission[replica.name] = self.fleet.admission(self.clock)
        return number, replica

    def started(self, member: Member) -> None:
        """Know it from now on."""
        self.members.append(member)
        self.by_name[member.replica.name] = member
        self.log("replica_started", member.replica.name)

    def _capacity(self, member: Member) -> Capacity:
        return self.capacities[member.replica.region]

    def _telemetry(self, member: Member) -> Telemetry:
        return self.telemetry[member.replica.region]

    def loaded(self, member: Member) -> None:
        """Compute the busiest prefixes first, if that is wanted, then go into rotation."""
        prefixes = self.router.hot_prefixes(self.fleet.warm_up_prefixes, member.replica.region)
        for place, prefix in enumerate(prefixes[: self.fleet.warm_up_prefixes]):
            request = SimulatedRequest(
                f"warm-up/{member.number}/{place}",
                contents_of(prefix),
                self._params_for(1),
                -1,
                self.clock.now_s,
            )
            try:
                member.replica.add_request(request)
            except ValueError:  # the prompts that begin so are too long for any replica
                continue
            member.warming_up.add(request.request_id)
            self.router.remember(prefix, member.replica)
        if member.warming_up:
            self._run(member)
        else:
            self._capacity(member).enter_rotation(member)

    def _warmed_up(self, member: Member, request: Request) -> None:
        member.warming_up.discard(request.request_id)
        if not member.warming_up and member.state is State.LOADING:
            self._capacity(member).enter_rotation(member)

    def changed(self, member: Member) -> None:
        """A replica has entered or left rotation, or has lost requests."""
        replica = member.replica
        dead = member.state is State.GONE and self.capacities[replica.region].down
        if member.state is State.READY:
            self.rotation = sorted(
                [*self.rotation, replica], key=lambda r: self.by_name[r.name].number
            )
            held, self.held = self.held, deque()
            for flight in held:
                self._dispatch(flight)
        elif replica in self.rotation and not dead:
            self.rotation = [other for other in self.rotation if other is not replica]
        if member.state is State.GONE:
            self.router.forget(replica.name)
        self._watch(member)

    def _drop_gone(self, region: str) -> None:
        """Health checks have noticed an outage of the region."""
        gone = [
            replica
            for replica in self.rotation
            if replica.region == region and self.by_name[replica.name].state is State.GONE
        ]
        for replica in gone:
            self.router.forget(replica.name)  # once more: it was chosen after its end
        self.rotation = [replica for replica in self.rotation if replica not in gone]

    def lost(self, member: Member, requests: list[Request]) -> None:
        """A replica sends requests back, or has broken off."""
        for request in requests:
            flight = flight_of(request)
            if flight is not None:
                flight.attempt = None
                self._retry(flight)

    # Once an interval.

    def _scrape(self) -> None:
        """Read all metrics; each region's autoscaler decides."""
        now_s = self.clock.now_s
        for name, capacity in self.capacities.items():
            if capacity.down:
                continue
            held = [f.arrival_s for f in self.held if self.regions.nearest(f.region)[0] == name]
            metrics = self.telemetry[name].scrape(now_s, capacity.members, held)
            reported = {replica.name: replica for replica in metrics.replicas}
            self.replica_timeline_rows += [
                replica_row(now_s, m, reported.get(m.replica.name)) for m in capacity.members
            ]
            current = wanted = len(capacity.current)
            if name in self.autoscalers:
                decision = self.autoscalers[name].decide(metrics, current)
                wanted = decision.replicas
                self.decision_rows.append(
                    {
                        "time_s": now_s,
                        "region": name,
                        "current": current,
                        "wanted": wanted,
                        "reason": decision.reason,
                    }
                )
                if wanted != current:
                    self.log("scaled", name, current, wanted, decision.reason)
            capacity.scale_to(wanted)
            self.timeline_rows.append(
                {
                    "time_s": now_s,
                    "region": name,
                    **metrics,
                    **{
                        f"replicas_{state.value}": capacity.count(state)
                        for state in State
                        if state is not State.GONE
                    },
                    "replicas_wanted": wanted,
                    "gateway_queue": self.gateway_queue + len(held),
                }
            )
        self.queue.plan(now_s + self.fleet.scrape_interval_s, Rank.SCRAPE, self._scrape)

    def result(self) -> SimulationResult:
        """What was found."""
        return SimulationResult(
            self.trace.name,
            self.clock.now_s,
            self.request_rows,
            self.timeline_rows,
            self.replica_timeline_rows,
            self.decision_rows,
            [member.row(self.clock.now_s) for member in self.members],
            self.events or [],
        )
