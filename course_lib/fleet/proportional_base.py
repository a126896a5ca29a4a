"""The pieces of an autoscaler that grows in proportion to the load.

`replicas_for_load` says how many replicas the load needs, `StabilizationWindow` keeps what was
needed not long ago, and `ProportionalBase` holds the settings. An autoscaler derives from it and
writes `decide`; the course's own is in `proportional`.
"""

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping

from course_lib.fleet.autoscaler import AutoscalerBase, ScalingDecision
from course_lib.validation import number

#: Of each metric that the load is made of.
LOAD_METRICS = (
    "num_requests_waiting",
    "num_requests_running",
    "kv_cache_utilization",
    "num_replicas_ready",
)


def replicas_for_load(
    metrics: Mapping[str, float],
    current_replicas: int,
    target_per_replica: float,
    target_kv_cache: float = 0.8,
    tolerance: float = 0.1,
) -> int:
    """Replicas that bring requests and KV cache to their targets, or the current ones if near.

    The load is measured in replicas, by requests and by KV cache, and the larger one counts. The
    KV cache is that of the ready replicas alone, so those that are loading do not add to it.

    Args:
        metrics: `LOAD_METRICS`, all of them.
        current_replicas: those there are, loading ones included.
        target_per_replica: requests, waiting or running, for each replica.
        target_kv_cache: utilization of the KV cache of each replica.
        tolerance: nothing changes while load / current replicas is within 1 - and 1 + this.
    """
    requests = metrics["num_requests_waiting"] + metrics["num_requests_running"]
    cache = metrics["num_replicas_ready"] * metrics["kv_cache_utilization"]
    load = max(requests / target_per_replica, cache / target_kv_cache)
    load = round(load, 9)  # 3 x 0.8 / 0.8 is a little above 3
    if current_replicas and abs(load / current_replicas - 1) <= tolerance + 1e-9:
        return current_replicas
    return math.ceil(load)


class StabilizationWindowBase:
    """Recommendations of the last seconds, none at first.

    Not abstract: a method that a student has not written yet says so when it is called.

    Args:
        window_s: a recommendation counts until it is this old.
        clock: returns seconds; only differences matter.

    Raises:
        ValueError: the window is negative.
    """

    def __init__(self, window_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.window_s = number("window_s", window_s, at_least=0)
        self.clock = clock
        self.recommendations: list[tuple[float, int]] = []  # when, replicas

    def stabilize(self, wanted: int, current_replicas: int) -> int:
        """How many replicas there should be, given what was wanted not long ago."""
        raise NotImplementedError


class StabilizationWindow(StabilizationWindowBase):
    """Goes up at once, and down only to the highest recommendation of the window.

    So does Kubernetes' HPA, with its default of no window for going up.
    """

    def stabilize(self, wanted: int, current_replicas: int) -> int:
        """Remember what is wanted now; down no further than to the most that was lately."""
        now = self.clock()
        self.recommendations.append((now, wanted))
        self.recommendations = [
            (at_s, replicas)
            for at_s, replicas in self.recommendations
            if now - at_s < self.window_s or at_s == now
        ]
        if wanted >= current_replicas:
            return wanted
        return min(current_replicas, max(replicas for _, replicas in self.recommendations))


class ProportionalBase(AutoscalerBase):
    """Settings of an autoscaler that grows in proportion to the load.

    Args:
        target_per_replica: requests, waiting or running, for each replica; fewer than it has seats
            leaves room for those who come while a replica starts.
        target_kv_cache: utilization of the KV cache of each replica, up to 1.
        tolerance: nothing changes while the load is so near to its target.
        window_s: what was wanted counts so long before the fleet gets smaller.
        min_replicas: never fewer.
        max_replicas: never more.
        clock: returns seconds; only differences matter.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        target_per_replica: float = 4,
        target_kv_cache: float = 0.8,
        tolerance: float = 0.1,
        window_s: float = 300,
        min_replicas: int = 1,
        max_replicas: int = 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(min_replicas, max_replicas, clock)
        self.target_per_replica = number("target_per_replica", target_per_replica, above=0)
        self.target_kv_cache = number("target_kv_cache", target_kv_cache, above=0, at_most=1)
        self.tolerance = number("tolerance", tolerance, at_least=0, at_most=1)
        self.window_s = number("window_s", window_s, at_least=0)

    def recommend(self, metrics: Mapping[str, float], current_replicas: int) -> int:
        """The number of replicas of `decide`."""
        return self.decide(metrics, current_replicas).replicas

    @abstractmethod
    def decide(self, metrics: Mapping[str, float], current_replicas: int) -> ScalingDecision:
        """How many replicas there should be, and why."""
