"""The replicas of one region, from the decision to start one to the end of its bill.

`Capacity` starts replicas through the phases of a cold start, keeps a warm pool, drains on the way
down and lets the spot market take its machines back. What becomes of requests is not its business:
it hands back those that a replica does not finish.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import numpy as np

from course_lib.engine.request import Request
from course_lib.fleet.events import EventQueue, Rank
from course_lib.fleet.replica import Replica, VirtualClock
from course_lib.fleet.spec import FleetSpec
from course_lib.serving.lifecycle import DrainPolicy
from course_lib.validation import whole_number


class State(Enum):
    """Where a replica stands."""

    LOADING = "loading"  # paid for, of no use yet
    STANDBY = "standby"  # loaded, in the warm pool
    READY = "ready"  # in rotation
    DRAINING = "draining"  # finishes what it has
    GONE = "gone"


@dataclass(eq=False)
class Member:
    """A replica of the fleet and its life so far. Times are in seconds of the simulation.

    Args:
        number: the how-manieth that was started, from 0.
        replica: its engine.
        market: "on demand" or "spot".
        usd_per_hour: its price.
        phases: of its cold start, in seconds; empty if it was warm at the beginning.
        started_s: when its bill began.
        for_standby: whether it goes to the warm pool once it is loaded.
    """

    number: int
    replica: Replica
    market: str
    usd_per_hour: float
    phases: dict[str, float]
    started_s: float
    for_standby: bool = False
    state: State = State.LOADING
    ready_s: float | None = None  # the first time
    ended_s: float | None = None
    end_reason: str = ""
    warming_up: set[str] = field(default_factory=set)  # ids of warm-up requests that run
    version: int = 0  # of the end of its step, as it stands in the queue of events
    planned_end_s: float = float("inf")
    seconds_in: dict[State, float] = field(default_factory=lambda: dict.fromkeys(State, 0.0))
    busy_s_in: dict[State, float] = field(default_factory=lambda: dict.fromkeys(State, 0.0))
    since_s: float = 0.0  # when it came into its state
    busy_since_s: float = 0.0  # its engine's busy time by then

    def enter(self, state: State, now_s: float) -> None:
        """Change the state, and book the time in the one before."""
        self._book(now_s)
        self.state = state

    def _book(self, now_s: float) -> None:
        busy_s = self.replica.busy_s
        self.seconds_in[self.state] += now_s - self.since_s
        self.busy_s_in[self.state] += busy_s - self.busy_since_s
        self.since_s, self.busy_since_s = now_s, busy_s

    def row(self, now_s: float) -> dict[str, Any]:
        """Its life so far, for `SimulationResult.replicas`."""
        if self.state is not State.GONE:
            self._book(now_s)
        in_rotation = (State.READY, State.DRAINING)
        serving_s = sum(self.busy_s_in[state] for state in in_rotation)
        ended_s = now_s if self.ended_s is None else self.ended_s
        return {
            "name": self.replica.name,
            "region": self.replica.region,
            "market": self.market,
            "cold": bool(self.phases),
            "started_s": self.started_s,
            "ready_s": self.ready_s,
            "ended_s": self.ended_s,
            "end_reason": self.end_reason,
            **{f"{phase}_s": seconds for phase, seconds in self.phases.items()},
            "serving_s": serving_s,
            "idle_s": sum(self.seconds_in[state] for state in in_rotation) - serving_s,
            "loading_s": self.seconds_in[State.LOADING],
            "standby_s": self.seconds_in[State.STANDBY],
            "usd": self.usd_per_hour * (ended_s - self.started_s) / 3600,
        }


class Owner(Protocol):
    """Who is told what happens to replicas, and says what they are."""

    def make_replica(self, region: str) -> tuple[int, Replica]:
        """The next replica of the fleet and its number."""
        ...

    def started(self, member: Member) -> None:
        """Its bill begins."""
        ...

    def loaded(self, member: Member) -> None:
        """It could go into rotation; `Capacity.enter_rotation` is to be called when it should."""
        ...

    def changed(self, member: Member) -> None:
        """It has entered or left rotation, or requests were taken from it."""
        ...

    def lost(self, member: Member, requests: list[Request]) -> None:
        """It will not finish these requests."""
        ...

    def log(self, kind: str, *who: Any) -> None:
        """Something has happened."""
        ...


class Capacity:
    """The replicas of a region.

    Args:
        fleet: what is simulated.
        region: its name.
        usd_per_hour: of a replica on demand there.
        clock: of the simulation.
        events: its queue of events.
        rng: of cold starts and reclaims.
        owner: is told what happens.
    """

    def __init__(
        self,
        fleet: FleetSpec,
        region: str,
        usd_per_hour: float,
        clock: VirtualClock,
        events: EventQueue,
        rng: np.random.Generator,
        owner: Owner,
    ) -> None:
        self.fleet = fleet
        self.region = region
        self.usd_per_hour = usd_per_hour
        self.clock = clock
        self.events = events
        self.rng = rng
        self.owner = owner
        self.members: list[Member] = []  # in the order of their start, those gone left out
        self.down = False
        spot = fleet.spot
        warning_s = spot.warning_s if spot else 0.0
        self.drain = fleet.drain or DrainPolicy(warning_s, min(1.0, warning_s))
        self.plan = fleet.warm_pool(clock) if callable(fleet.warm_pool) else None
        self.pool_size = 0 if callable(fleet.warm_pool) else fleet.warm_pool

    @property
    def current(self) -> list[Member]:
        """What an autoscaler counts: in rotation or on the way there."""
        return [
            member
            for member in self.members
            if member.state is State.READY
            or (member.state is State.LOADING and not member.for_standby)
        ]

    def count(self, state: State) -> int:
        """Replicas in that state."""
        return sum(member.state is state for member in self.members)

    def begin(self, replicas: int) -> None:
        """Have so many warm ones in rotation, and the warm pool in place."""
        for _ in range(replicas):
            self._load(self._start({}), 0.0)
        self._plan_pool(replicas)
        for _ in range(self.pool_size):
            member = self._start({}, for_standby=True)
            member.enter(State.STANDBY, self.clock.now_s)

    def scale_to(self, wanted: int) -> None:
        """Start or remove replicas until so many are in rotation or on the way there."""
        current = self.current
        if wanted > len(current):
            self._add(wanted - len(current))
        elif wanted < len(current):
            newest_first = sorted(current, key=lambda m: (m.state is State.READY, -m.number))
            for member in newest_first[: len(current) - wanted]:
                self._remove(member)
        self._plan_pool(wanted)
        self._fill_warm_pool()

    def _add(self, count: int) -> None:
        """Take those that stand by, then those that load for it, then new ones."""
        standby = [m for m in self.members if m.state is State.STANDBY]
        loading = [m for m in self.members if m.state is State.LOADING and m.for_standby]
        for member in [*standby, *loading][:count]:
            member.for_standby = False
            if member.state is State.STANDBY:
                member.enter(State.LOADING, self.clock.now_s)
                self._load(member, self.fleet.activation_s)
        for _ in range(count - len(standby) - len(loading)):
            self._start_cold()

    def _plan_pool(self, current: int) -> None:
        """Ask the plan, if there is one, and end those that need not stand by any more."""
        if self.plan is None:
            return
        decision = self.plan.decide(current)
        size = whole_number("replicas of the warm pool's plan", decision.replicas, at_least=0)
        if size != self.pool_size:
            self.owner.log("warm_pool", self.region, size, decision.reason)
        self.pool_size = size
        pool = [member for member in self.members if member.for_standby]
        newest_first = sorted(pool, key=lambda m: (m.state is State.STANDBY, -m.number))
        for member in newest_first[: max(0, len(pool) - self.pool_size)]:
            self.end(member, "scaled down")

    def _fill_warm_pool(self) -> None:
        there = sum(member.for_standby for member in self.members)
        for _ in range(self.pool_size - there):
            self._start_cold(for_standby=True)

    def _start_cold(self, for_standby: bool = False) -> None:
        member = self._start(self.fleet.cold_start.draw(self.rng), for_standby)
        self._load(member, sum(member.phases.values()))

    def _start(self, phases: dict[str, float], for_standby: bool = False) -> Member:
        spot, now_s = self.fleet.spot, self.clock.now_s
        on_demand = sum(member.market == "on demand" for member in self.members)
        is_spot = spot is not None and on_demand >= spot.on_demand_replicas
        number, replica = self.owner.make_replica(self.region)
        member = Member(
            number,
            replica,
            "spot" if is_spot else "on demand",
            self.usd_per_hour * (spot.price_factor if spot and is_spot else 1.0),
            phases,
            now_s,
            for_standby,
            since_s=now_s,
        )
        self.members.append(member)
        self.owner.started(member)
        if spot and is_spot:
            reclaimed_s = now_s + spot.draw_lifetime_s(self.rng)
            self.events.plan(reclaimed_s, Rank.CAPACITY, self._reclaim, member, spot.warning_s)
        return member

    def _load(self, member: Member, seconds: float) -> None:
        """Be loaded after so long; at once if it takes no time."""
        if seconds:
            ready_s = self.clock.now_s + seconds
            self.events.plan(ready_s, Rank.CAPACITY, self._loaded, member)
        else:
            self._loaded(member)

    def _loaded(self, member: Member) -> None:
        if member.state is not State.LOADING:  # ended in the meantime
            return
        if member.for_standby:
            member.enter(State.STANDBY, self.clock.now_s)
            self.owner.log("replica_standby", member.replica.name)
        else:
            self.owner.loaded(member)

    def enter_rotation(self, member: Member) -> None:
        """A loaded replica, warmed up if that was wanted, takes requests from now on."""
        member.enter(State.READY, self.clock.now_s)
        if member.ready_s is None:
            member.ready_s = self.clock.now_s
        self.owner.log("replica_ready", member.replica.name)
        self.owner.changed(member)

    def _remove(self, member: Member) -> None:
        """Drain it, or end it at once if it is of no use yet."""
        if member.state is State.READY:
            member.enter(State.DRAINING, self.clock.now_s)
            self.owner.log("replica_draining", member.replica.name)
            member.end_reason = "scaled down"
            self.owner.changed(member)
            self.leave_if_empty(member)
        elif member.state is State.LOADING and not member.warming_up and self._pool_is_short():
            member.for_standby = True
        else:
            self.end(member, "scaled down")

    def _pool_is_short(self) -> bool:
        return sum(member.for_standby for member in self.members) < self.pool_size

    def leave_if_empty(self, member: Member) -> None:
        """A draining replica that has finished goes to the warm pool if that is short, or ends."""
        if member.state is not State.DRAINING or member.replica.requests:
            return
        if member.end_reason == "scaled down" and self._pool_is_short():
            member.for_standby, member.end_reason = True, ""
            member.enter(State.STANDBY, self.clock.now_s)
            self.owner.log("replica_standby", member.replica.name)
        else:
            self.end(member, member.end_reason)

    def end(self, member: Member, reason: str) -> None:
        """It is gone, and its bill ends. What it had not finished is lost to it."""
        if member.state is State.GONE:
            return
        unfinished = member.replica.stop()
        member.enter(State.GONE, self.clock.now_s)
        member.ended_s, member.end_reason = self.clock.now_s, reason
        self.members.remove(member)
        self.owner.log("replica_ended", member.replica.name, reason)
        self.owner.changed(member)
        if unfinished:
            self.owner.lost(member, unfinished)

    def _reclaim(self, member: Member, warning_s: float) -> None:
        """The cloud takes the machine back: use the warning, then it is gone."""
        if member.state is State.GONE:
            return
        self.owner.log("replica_reclaimed", member.replica.name)
        if member.state in (State.LOADING, State.STANDBY):
            self.end(member, "reclaimed")
            self._fill_warm_pool()
            return
        if member.state is State.READY:
            member.enter(State.DRAINING, self.clock.now_s)
        member.end_reason = "reclaimed"
        by_name = {request.request_id: request for request in member.replica.requests}
        remaining_s = {n: member.replica.remaining_s(request) for n, request in by_name.items()}
        decided = self.drain.decide(remaining_s)
        sent_back = [request for name, request in by_name.items() if decided[name] == "retry"]
        for request in sent_back:
            member.replica.abort(request)
        self.owner.changed(member)
        self.events.plan(self.clock.now_s + warning_s, Rank.CAPACITY, self.end, member, "reclaimed")
        if sent_back:
            self.owner.lost(member, sent_back)
        self.leave_if_empty(member)

    def go_down(self) -> None:
        """An outage begins: all replicas are gone."""
        self.down = True
        for member in list(self.members):
            self.end(member, "outage")

    def come_back(self, replicas: int) -> None:
        """The outage is over: start as many as there were at the beginning, cold."""
        self.down = False
        self.scale_to(replicas)
