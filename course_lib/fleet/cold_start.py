"""What a replica that is not there yet costs in time: how many to start, and ready by when.

`capacity_plan` counts replicas for a known peak; `readiness` adds up the phases of a cold start and
compares them with the time that is left before the peak. A target does not erase start-up time: a
plan that is not ready before the surge needs warm replicas or an earlier start. `ColdStart` knows
that no two starts take equally long, and what shortens them:

    ColdStart().with_levers("local_nvme").ready_time_s(0.95)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from course_lib.validation import known_name, number, whole_number

#: The phases of a cold start, in their order.
PHASES = ("node_provisioning", "container_pull", "weight_loading", "runtime_warm_up")

# How many standard deviations the 95th percentile of a normal distribution is above its median.
_SIGMAS_TO_P95 = NormalDist().inv_cdf(0.95)

# Starts that `ready_time_s` draws; its p95 is then within about 1 % of that of many more.
_DRAWS = 20_000


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


@dataclass(frozen=True)
class Duration:
    """How long something takes: a lognormal distribution through two of its quantiles.

    It is never negative, and a few draws are much longer than the others, as starts are. Both
    equal is a constant, both 0 something that does not happen.

    Args:
        p50_s: half of them take longer.
        p95_s: one in 20 takes longer.

    Raises:
        ValueError: a quantile is negative or not a number, p95 is below p50, or only p50 is 0.
    """

    p50_s: float
    p95_s: float

    def __post_init__(self) -> None:
        """Refuse what is no distribution."""
        number("p50_s", self.p50_s, at_least=0)
        number("p95_s", self.p95_s, at_least=self.p50_s)
        if self.p50_s == 0 and self.p95_s > 0:
            raise ValueError(
                f"p50_s is 0 and p95_s {self.p95_s:g}, and no lognormal has these; a phase that "
                "does not happen has 0 for both"
            )

    @property
    def is_constant(self) -> bool:
        """Whether every draw is the same."""
        return self.p50_s == self.p95_s

    def draw(self, rng: np.random.Generator) -> float:
        """One of them, in seconds."""
        return float(self.draws(rng, 1)[0])

    def draws(self, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        """So many of them, in seconds."""
        if self.is_constant:
            return np.full(count, float(self.p50_s))
        sigma = math.log(self.p95_s / self.p50_s) / _SIGMAS_TO_P95
        return rng.lognormal(math.log(self.p50_s), sigma, count)

    def scaled(self, factor: float) -> "Duration":
        """The same, each `factor` times as long."""
        return Duration(self.p50_s * factor, self.p95_s * factor)


@dataclass(frozen=True)
class Lever:
    """What shortens one phase.

    Args:
        phase: field of `ColdStart`.
        factor: the phase takes so much of its time.
        assumption: where the factor comes from.
    """

    phase: str
    factor: float
    assumption: str


#: What shortens a cold start. The factors are our assumptions, to reason with until you have
#: measured your own; then give `ColdStart` what you measured instead.
LEVERS: Mapping[str, Lever] = MappingProxyType(
    {
        "lazy_pulling": Lever(
            "container_pull",
            0.25,
            "the container starts when the quarter of the image that it reads at first is there; "
            "the rest follows while it runs",
        ),
        "local_nvme": Lever(
            "weight_loading",
            0.25,
            "the node's own disk reads the weights at 4 GB/s, the network storage at 1 GB/s",
        ),
        "snapshots": Lever(
            "runtime_warm_up",
            0.20,
            "a process that has compiled and captured everything is restored, in a fifth of the "
            "time that it took to get there; weights are loaded as before",
        ),
    }
)


@dataclass(frozen=True)
class ColdStart:
    """From the decision to start a replica until it is in rotation.

    The phases follow one another and are drawn independently. The defaults are illustrative: 207 s
    if each phase takes its median. Record your own.

    Args:
        node_provisioning: until the cloud's machine has joined the cluster.
        container_pull: until the image is on it.
        weight_loading: until the weights are in the GPU's memory.
        runtime_warm_up: compiling kernels, capturing CUDA graphs, the first requests.
        levers: names of `LEVERS`, each of which shortens its phase in `phases`.

    Raises:
        ValueError: a phase is no `Duration`, or there is no such lever.
    """

    node_provisioning: Duration = Duration(95, 170)
    container_pull: Duration = Duration(22, 60)
    weight_loading: Duration = Duration(78, 150)
    runtime_warm_up: Duration = Duration(12, 25)
    levers: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Refuse phases that are no durations, and unknown levers."""
        for name in PHASES:
            duration = getattr(self, name)
            if not isinstance(duration, Duration):
                raise ValueError(
                    f"{name} must be a Duration, such as Duration(78, 150), got {duration!r}"
                )
        known = frozenset(known_name("lever", name, LEVERS) for name in self.levers)
        object.__setattr__(self, "levers", known)

    @property
    def phases(self) -> dict[str, Duration]:
        """The phases by name in their order, as the levers leave them."""
        phases: dict[str, Duration] = {name: getattr(self, name) for name in PHASES}
        for name in self.levers:
            lever = LEVERS[name]
            phases[lever.phase] = phases[lever.phase].scaled(lever.factor)
        return phases

    def with_levers(self, *names: str) -> "ColdStart":
        """The same with these levers too; one that was there already counts once.

        Raises:
            ValueError: there is no such lever.
        """
        return replace(self, levers=self.levers.union(names))

    def draw(self, rng: np.random.Generator) -> dict[str, float]:
        """Seconds of each phase of one start, in their order; `readiness` adds them up."""
        return {name: duration.draw(rng) for name, duration in self.phases.items()}

    def ready_time_s(self, quantile: float) -> float:
        """The time within which this share of the starts is ready, of 20,000 fixed draws.

        The quantile of the sum is below the sum of the quantiles, since the phases are hardly ever
        all slow at once.

        Args:
            quantile: 0.5 for the median, 0.95 for the time to plan with.

        Raises:
            ValueError: it is not between 0 and 1.
        """
        number("quantile", quantile, above=0, at_most=1)
        rng = np.random.default_rng(0)
        starts_s = sum(duration.draws(rng, _DRAWS) for duration in self.phases.values())
        return float(np.quantile(starts_s, quantile))
