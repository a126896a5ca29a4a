"""How many replicas to keep warm, what that costs, and when: the plan against cold starts.

`backlog` says how long a queue grows while a replica starts, `warm_pool_for` how many replicas
that stand by cover a rush. `ColdStartPlan` asks a forecast, so that they stand by before the rush
and not all day:

    FleetSpec(replica, warm_pool=lambda clock: ColdStartPlan(forecast, 60, 0.4, 300, clock=clock))

A warm pool of your own needs `decide(current_replicas) -> ScalingDecision`: how many stand by,
beside the current ones. Time comes from the clock it was given.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from course_lib.fleet.autoscaler import ScalingDecision
from course_lib.validation import number, whole_number

GIB_IN_GB = 1.073741824


@dataclass(frozen=True)
class Backlog:
    """What a cold start does to those who wait.

    Args:
        ready_s: from the decision until the replica serves.
        queue: requests that wait by then, more than before.
        drain_s: from then until the queue is gone; infinite if it never is.
    """

    ready_s: float
    queue: float
    drain_s: float


def backlog(
    node_s: float,
    image_gb: float,
    network_gbit_per_s: float,
    weights_gib: float,
    disk_gb_per_s: float,
    warm_up_s: float,
    arrivals_per_min: float,
    served_before_per_min: float,
    served_after_per_min: float,
) -> Backlog:
    """The queue that has grown when a replica that starts now is ready, and how long it lasts.

    Args:
        node_s: until the machine has joined the cluster.
        image_gb: of the container, in GB (1e9 bytes).
        network_gbit_per_s: over which it is pulled, in Gbit/s.
        weights_gib: of the model, in GiB (2**30 bytes).
        disk_gb_per_s: from which they are loaded, in GB/s.
        warm_up_s: of the runtime.
        arrivals_per_min: requests.
        served_before_per_min: by the replicas that are ready.
        served_after_per_min: by those and the new one.

    Raises:
        ValueError: an argument is negative, or a speed is 0.
    """
    node_s, warm_up_s = (
        number(name, seconds, at_least=0)
        for name, seconds in (("node_s", node_s), ("warm_up_s", warm_up_s))
    )
    image_gbit = number("image_gb", image_gb, at_least=0) * 8
    weights_gb = number("weights_gib", weights_gib, at_least=0) * GIB_IN_GB
    pull_s = image_gbit / number("network_gbit_per_s", network_gbit_per_s, above=0)
    load_s = weights_gb / number("disk_gb_per_s", disk_gb_per_s, above=0)
    arrivals = number("arrivals_per_min", arrivals_per_min, at_least=0) / 60
    before = number("served_before_per_min", served_before_per_min, at_least=0) / 60
    after = number("served_after_per_min", served_after_per_min, at_least=0) / 60

    ready_s = node_s + pull_s + load_s + warm_up_s
    queue = max(0.0, arrivals - before) * ready_s
    if queue == 0:
        return Backlog(ready_s, 0.0, 0.0)
    return Backlog(ready_s, queue, queue / (after - arrivals) if after > arrivals else math.inf)


@dataclass(frozen=True)
class WarmPoolCost:
    """Replicas that stand by, and what they cost."""

    replicas: int
    usd_per_day: float


def warm_pool_for(
    customers_per_min: float,
    ramp_min: float,
    requests_per_customer_per_min: float,
    ready_s: float,
    capacity_per_s: float,
    usd_per_hour: float,
    hours_per_day: float = 24,
) -> WarmPoolCost:
    """Replicas that must stand by, so that a rush finds a warm one at every moment.

    Each that goes into rotation is replaced by one that needs `ready_s`. So the pool has to cover
    what the load grows by in that time, or in the whole rush if that is shorter.

    Args:
        customers_per_min: that come, each minute of the rush.
        ramp_min: minutes that the rush lasts.
        requests_per_customer_per_min: that each of them sends.
        ready_s: from the decision to start a replica until it serves.
        capacity_per_s: requests/s that one replica serves.
        usd_per_hour: price of a replica.
        hours_per_day: that the pool is kept.

    Raises:
        ValueError: an argument is negative, the capacity 0, or a day has more than 24 hours.
    """
    minutes = min(
        number("ready_s", ready_s, at_least=0) / 60, number("ramp_min", ramp_min, at_least=0)
    )
    customers = number("customers_per_min", customers_per_min, at_least=0) * minutes
    each = number("requests_per_customer_per_min", requests_per_customer_per_min, at_least=0)
    load_per_s = customers * each / 60
    replicas = math.ceil(
        round(load_per_s / number("capacity_per_s", capacity_per_s, above=0), 9)  # 0.1 x 3 / 0.3
    )
    price = number("usd_per_hour", usd_per_hour, at_least=0)
    hours = number("hours_per_day", hours_per_day, at_least=0, at_most=24)
    return WarmPoolCost(replicas, replicas * price * hours)


class WarmPool(Protocol):
    """Decides once an interval how many replicas stand by."""

    def decide(self, current_replicas: int) -> ScalingDecision:
        """How many replicas stand by, and why.

        Args:
            current_replicas: in rotation or on the way there; the pool comes on top of them.
        """
        ...


class ColdStartPlanBase(ABC):
    """What a plan against cold starts knows.

    Args:
        forecast: load expected in each step of a day, from time 0 of the clock on, in requests/s;
            after the last step the first one follows.
        step_s: length of each step.
        capacity_per_replica: requests/s that one replica serves.
        ready_time_s: from the decision to start a replica until it serves; the measured p95 is a
            good choice.
        min_standby: so many stand by at least, for what no forecast knows.
        max_standby: and so many at most.
        clock: returns seconds.

    Raises:
        ValueError: an argument is out of its range, or the forecast is empty.
    """

    def __init__(
        self,
        forecast: Sequence[float],
        step_s: float,
        capacity_per_replica: float,
        ready_time_s: float,
        min_standby: int = 0,
        max_standby: int = 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.forecast = [number("forecast", load, at_least=0) for load in forecast]
        if not self.forecast:
            raise ValueError("forecast is empty; give it the load of each step of a day")
        self.step_s = number("step_s", step_s, above=0)
        self.capacity_per_replica = number("capacity_per_replica", capacity_per_replica, above=0)
        self.ready_time_s = number("ready_time_s", ready_time_s, at_least=0)
        self.min_standby = whole_number("min_standby", min_standby, at_least=0)
        self.max_standby = whole_number("max_standby", max_standby, at_least=self.min_standby)
        self.clock = clock

    @abstractmethod
    def decide(self, current_replicas: int) -> ScalingDecision:
        """How many replicas stand by, and why."""


class ColdStartPlan(ColdStartPlanBase):
    """Has warm what the forecast needs before a replica that starts now would be ready."""

    def decide(self, current_replicas: int) -> ScalingDecision:
        """Look ahead as far as a cold start takes.

        Raises:
            ValueError: `current_replicas` is not a whole number of at least 0.
        """
        current = whole_number("current_replicas", current_replicas, at_least=0)
        now = self.clock()
        first, last = now // self.step_s, (now + self.ready_time_s) // self.step_s
        steps = range(int(first), int(last) + 1)
        expected = max(self.forecast[step % len(self.forecast)] for step in steps)
        needed = math.ceil(round(expected / self.capacity_per_replica, 9))
        standby = min(max(needed - current, self.min_standby), self.max_standby)
        return ScalingDecision(
            standby,
            f"up to {expected:.3g} requests/s expected in the next {self.ready_time_s:g} s need "
            f"{needed} replicas, {current} are there",
        )
