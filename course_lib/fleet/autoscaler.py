"""How many replicas to run, from what the replicas report.

`GPUAutoscaler` looks at the queue, the KV cache and the time to first token, never at CPU percent,
and moves by one replica at a time. `decide` says why in its `reason`. Kubernetes' HPA is in
`kubernetes`, KEDA in `keda`, and those that plan ahead are in `planners`.

An autoscaler of your own needs `decide(metrics, current_replicas) -> ScalingDecision`; time comes
from the clock it was given. Or derive from `AutoscalerBase` and write `recommend`, which returns
the number alone.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from course_lib.validation import number, whole_number

# One replica more when any of these is exceeded.
MAX_WAITING = 10  # requests
MAX_KV_CACHE_UTILIZATION = 0.85
MAX_TTFT_P95_MS = 1500

#: One replica fewer only while the KV cache is emptier than this, among other things.
QUIET_KV_CACHE_UTILIZATION = 0.20


@dataclass(frozen=True)
class ScalingDecision:
    """How many replicas there should be, and why."""

    replicas: int
    reason: str


class Autoscaler(Protocol):
    """Decides once an interval; `metrics` are those of `course_lib.fleet.metrics`."""

    def decide(self, metrics: Mapping[str, float], current_replicas: int) -> ScalingDecision:
        """How many replicas there should be.

        Args:
            metrics: of the fleet; a name that is absent could not be measured.
            current_replicas: those there are, loading ones included, draining ones not.
        """
        ...


class AutoscalerBase(ABC):
    """An autoscaler whose whole rule is `recommend`.

    Args:
        min_replicas: never fewer.
        max_replicas: never more.
        clock: returns seconds; only differences matter.
    """

    def __init__(
        self,
        min_replicas: int = 1,
        max_replicas: int = 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.min_replicas = whole_number("min_replicas", min_replicas, at_least=0)
        self.max_replicas = whole_number("max_replicas", max_replicas, at_least=self.min_replicas)
        self.clock = clock

    @abstractmethod
    def recommend(self, metrics: Mapping[str, float], current_replicas: int) -> int:
        """How many replicas there should be."""

    def decide(self, metrics: Mapping[str, float], current_replicas: int) -> ScalingDecision:
        """The recommendation, within the limits."""
        wanted = whole_number(
            "recommend()", self.recommend(metrics, current_replicas), at_least=-(10**9)
        )
        replicas = min(max(wanted, self.min_replicas), self.max_replicas)
        reason = f"recommend() asked for {wanted}"
        return ScalingDecision(replicas, reason)


class GPUAutoscalerBase(ABC):
    """What the simple rule keeps: its limits, the cooldown, and when it changed something last.

    Args:
        min_replicas: never fewer; at least 1, since at zero no replica reports metrics.
        max_replicas: never more.
        cooldown_s: after a change in either direction, the time without another one.
        clock: returns seconds; only differences matter.

    Raises:
        ValueError: a bound is not a whole number of at least 1, the minimum is above the maximum,
            or the cooldown is negative.
    """

    def __init__(
        self,
        min_replicas: int = 1,
        max_replicas: int = 20,
        cooldown_s: float = 300,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.min_replicas = whole_number("min_replicas", min_replicas)
        self.max_replicas = whole_number("max_replicas", max_replicas)
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas must be at most max_replicas, got {min_replicas} and {max_replicas}"
            )
        self.cooldown_s = number("cooldown_s", cooldown_s, at_least=0)
        self.clock = clock
        self.last_change_s: float | None = None  # None: it has not changed anything yet

    def recommend(self, metrics: Mapping[str, float], current_replicas: int) -> int:
        """The number of replicas of `decide`."""
        return self.decide(metrics, current_replicas).replicas

    @abstractmethod
    def decide(self, metrics: Mapping[str, float], current_replicas: int) -> ScalingDecision:
        """How many replicas there should be, and why."""


class GPUAutoscaler(GPUAutoscalerBase):
    """One up when a signal is high, one down when all are low, nothing inside the cooldown."""

    def decide(self, metrics: Mapping[str, float], current_replicas: int) -> ScalingDecision:
        """Decide once; a decision to change starts the cooldown.

        Args:
            metrics: `num_requests_waiting`, `num_requests_running`, `kv_cache_utilization` (0 to
                1) and `ttft_p95_ms`. Others are ignored.
            current_replicas: replicas there are now.

        Raises:
            ValueError: a metric is missing, NaN, negative or above what it can be. Nothing has
                changed then.
        """
        current = whole_number("current_replicas", current_replicas, at_least=0)
        step, reason = _wanted_step(_checked(metrics), current)
        now = self.clock()
        if step and self.last_change_s is not None:
            passed = now - self.last_change_s
            if passed < self.cooldown_s:
                step = 0
                reason = (
                    f"cooldown, {passed:g} s of {self.cooldown_s:g} s passed; otherwise {reason}"
                )

        replicas = current + step
        if replicas > self.max_replicas:
            replicas, reason = self.max_replicas, f"max_replicas {self.max_replicas}; {reason}"
        elif replicas < self.min_replicas:
            replicas, reason = self.min_replicas, f"min_replicas {self.min_replicas}; {reason}"
        if replicas != current:
            self.last_change_s = now
        return ScalingDecision(replicas, reason)


def _wanted_step(metrics: Mapping[str, float], current: int) -> tuple[int, str]:
    waiting, running = metrics["num_requests_waiting"], metrics["num_requests_running"]
    utilization, ttft_p95_ms = metrics["kv_cache_utilization"], metrics["ttft_p95_ms"]
    if waiting > MAX_WAITING:
        return 1, f"num_requests_waiting {waiting:g} > {MAX_WAITING}"
    if utilization > MAX_KV_CACHE_UTILIZATION:
        return 1, f"kv_cache_utilization {utilization:g} > {MAX_KV_CACHE_UTILIZATION:g}"
    if ttft_p95_ms > MAX_TTFT_P95_MS:
        return 1, f"ttft_p95_ms {ttft_p95_ms:g} > {MAX_TTFT_P95_MS}"
    few = max(1, current // 2)
    if waiting == 0 and running <= few and utilization < QUIET_KV_CACHE_UTILIZATION:
        return -1, (
            f"quiet: nobody waits, num_requests_running {running:g} <= {few}, "
            f"kv_cache_utilization {utilization:g} < {QUIET_KV_CACHE_UTILIZATION:g}"
        )
    return 0, "no signal is high and not all are low"


def _checked(metrics: Mapping[str, float]) -> dict[str, float]:
    names = ("num_requests_waiting", "num_requests_running", "kv_cache_utilization", "ttft_p95_ms")
    missing = [name for name in names if name not in metrics]
    if missing:
        raise ValueError(f"metrics lack {', '.join(missing)}; expected {', '.join(names)}")
    return {
        name: number(
            name, metrics[name], at_least=0, at_most=1 if name == "kv_cache_utilization" else None
        )
        for name in names
    }
