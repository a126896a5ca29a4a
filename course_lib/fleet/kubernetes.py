"""Kubernetes' `HorizontalPodAutoscaler` (HPA), as it behaves.

It goes from 1 to N replicas by the ratio of a metric to its target, tempered by a tolerance,
stabilization windows and rate policies. Field names are those of the YAML in snake_case. `decide`
is one sync of the controller, which Kubernetes makes every 15 s. KEDA, which adds zero, is in
`keda`.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from course_lib.fleet.autoscaler import ScalingDecision
from course_lib.fleet.metrics import measured, replicas_in
from course_lib.validation import known_name, number, whole_number

# --horizontal-pod-autoscaler-tolerance of kube-controller-manager.
TOLERANCE = 0.1

# A Quantity has thousandths; targets and values are compared in them.
SMALLEST_TARGET = 0.001

# Without `behavior`, one sync goes up to twice the replicas, or to 4 if that is more:
# scaleUpLimitFactor and scaleUpLimitMinimum of the HPA controller.
LEGACY_UP_FACTOR = 2
LEGACY_UP_MINIMUM = 4


class Metric(Protocol):
    """One entry of an HPA's `metrics`."""

    @property
    def name(self) -> str:
        """What to call it when it could not be measured."""
        ...

    def propose(
        self, metrics: Mapping[str, float], current: int, tolerance: float
    ) -> ScalingDecision | None:
        """The replicas that bring the metric to its target; None if it could not be measured."""
        ...


@dataclass(frozen=True)
class ExternalMetric:
    """A number over the whole fleet. Readiness is ignored with `average_value`.

    Args:
        name: of `METRICS`, or several joined by `" + "`, whose sum it then is.
        average_value: the target for each replica: ceil(total / target) replicas.
        value: in place of `average_value`, the target of the fleet: ceil(total / target x ready
            replicas).

    Raises:
        ValueError: not exactly one target is given, or it is below 0.001.
    """

    name: str
    average_value: float | None = None
    value: float | None = None

    def __post_init__(self) -> None:
        """Refuse what Kubernetes refuses."""
        targets = {"average_value": self.average_value, "value": self.value}
        given = {name: target for name, target in targets.items() if target is not None}
        if len(given) != 1:
            raise ValueError(
                f"{self.name} needs either average_value (for each replica) or value (of the "
                f"fleet), got {given or 'neither'}"
            )
        for name, target in given.items():
            number(name, target, at_least=SMALLEST_TARGET)

    def propose(
        self, metrics: Mapping[str, float], current: int, tolerance: float
    ) -> ScalingDecision | None:
        """As `Metric.propose`; at 0 replicas there is no ratio, so no tolerance either."""
        total = measured(metrics, self.name)
        if total is None:
            return None
        if self.average_value is not None:
            target, factor, at_target = self.average_value, 1, self.average_value * current
            reason = f"{self.name} {total:g}, target {target:g} x {current} replicas"
        else:
            assert self.value is not None
            target, factor, at_target = self.value, _ready(metrics, current), self.value
            reason = f"{self.name} {total:g}, target {target:g} with {factor} ready"
        if current and _within(total, at_target, tolerance):
            return ScalingDecision(current, f"{reason}, within the tolerance")
        return ScalingDecision(_ceil_ratio(total * factor, target), reason)


@dataclass(frozen=True)
class PodsMetric:
    """A number that each replica reports; its mean is brought to `average_value`.

    Going down, a replica without a value counts as being at the target. Going up, it and one that
    is not ready count as zero; if that turns the direction round, nothing changes.

    Args:
        name: of `METRICS`; read from `FleetMetrics.replicas`.
        average_value: target of the mean.

    Raises:
        ValueError: the target is below 0.001.
    """

    name: str
    average_value: float

    def __post_init__(self) -> None:
        """Refuse what Kubernetes refuses."""
        number("average_value", self.average_value, at_least=SMALLEST_TARGET)

    def propose(
        self, metrics: Mapping[str, float], current: int, tolerance: float
    ) -> ScalingDecision | None:
        """As `Metric.propose`; not measured if no ready replica has a value."""
        target = self.average_value
        ready = [replica for replica in replicas_in(metrics) if replica.ready]
        values = [
            value for replica in ready if (value := measured(replica.values, self.name)) is not None
        ]
        if not values:
            return None
        mean = sum(values) / len(values)
        reason = f"{self.name} {mean:g} on average over {len(values)} replicas, target {target:g}"
        if mean < target:
            values += [target] * (len(ready) - len(values))
        elif mean > target:
            values += [0.0] * (len(replicas_in(metrics)) - len(values))
        if _within(sum(values), target * len(values), tolerance):
            return ScalingDecision(current, f"{reason}, within the tolerance")
        wanted = _ceil_ratio(sum(values), target)
        if mean > target and wanted < current:
            return ScalingDecision(current, f"{reason}, but zero for those without a value")
        return ScalingDecision(wanted, reason)


def _ready(metrics: Mapping[str, float], current: int) -> int:
    """Replicas that are ready, or all if nothing tells; at 0 replicas the HPA reckons with one."""
    if not current:
        return 1
    if replicas := replicas_in(metrics):
        return sum(replica.ready for replica in replicas)
    return int(metrics.get("num_replicas_ready", current))


def _milli(value: float) -> int:
    return round(value * 1000)


def _ceil_ratio(value: float, target: float) -> int:
    return -(-_milli(value) // _milli(target))


def _within(value: float, at_target: float, tolerance: float) -> bool:
    ratio = _milli(value) / _milli(at_target)
    return 1 - tolerance <= ratio <= 1 + tolerance


@dataclass(frozen=True)
class ScalingPolicy:
    """How much one period may change.

    Args:
        type: `Pods` or `Percent` (of the replicas at the start of the period).
        value: so many of them.
        period_seconds: 1 to 1800.

    Raises:
        ValueError: an argument is none of these.
    """

    type: str
    value: int
    period_seconds: int

    def __post_init__(self) -> None:
        """Refuse what Kubernetes refuses."""
        object.__setattr__(self, "type", known_name("type", self.type, ("Pods", "Percent")))
        whole_number("value", self.value)
        whole_number("period_seconds", self.period_seconds, at_most=1800)


@dataclass(frozen=True)
class ScalingRules(ABC):
    """One direction of `behavior`; the two directions differ in their defaults.

    Args:
        stabilization_window_seconds: 0 to 3600.
        select_policy: the policy that allows the `Max` or the `Min` of change, or `Disabled`.
        policies: at least one.

    Raises:
        ValueError: an argument is none of these.
    """

    stabilization_window_seconds: int = 0
    select_policy: str = "Max"
    policies: Sequence[ScalingPolicy] = ()

    def __post_init__(self) -> None:
        """Refuse what Kubernetes refuses."""
        whole_number(
            "stabilization_window_seconds",
            self.stabilization_window_seconds,
            at_least=0,
            at_most=3600,
        )
        known = known_name("select_policy", self.select_policy, ("Max", "Min", "Disabled"))
        object.__setattr__(self, "select_policy", known)
        if not self.policies:
            raise ValueError("policies is empty; give one, or leave it out for the defaults")

    def limit(self, current: int, replicas_before: Callable[[int], int]) -> int:
        """The farthest that this sync may go from `current` replicas.

        Args:
            current: replicas now.
            replicas_before: how many there were so many seconds ago, by the changes since.
        """
        if self.select_policy == "Disabled":
            return current
        limits = [self.allows(p, replicas_before(p.period_seconds)) for p in self.policies]
        return self.farthest(current, limits)

    @abstractmethod
    def allows(self, policy: ScalingPolicy, start: int) -> int:
        """The replicas to which one policy lets a period go that started with `start`."""

    @abstractmethod
    def farthest(self, current: int, limits: Sequence[int]) -> int:
        """The limit that `select_policy` picks, never back past `current`."""


@dataclass(frozen=True)
class ScaleUp(ScalingRules):
    """`behavior.scaleUp`: by default 4 replicas or 100 %, whichever is more, each 15 s."""

    policies: Sequence[ScalingPolicy] = (
        ScalingPolicy("Pods", 4, 15),
        ScalingPolicy("Percent", 100, 15),
    )

    def allows(self, policy: ScalingPolicy, start: int) -> int:
        """Percent rounds up, so that one replica can grow."""
        if policy.type == "Pods":
            return start + policy.value
        return -(-start * (100 + policy.value) // 100)

    def farthest(self, current: int, limits: Sequence[int]) -> int:
        """The highest for `Max`, the lowest for `Min`."""
        return max(current, min(limits) if self.select_policy == "Min" else max(limits))


@dataclass(frozen=True)
class ScaleDown(ScalingRules):
    """`behavior.scaleDown`: by default to any number at once, after 300 s of stabilization."""

    stabilization_window_seconds: int = 300
    policies: Sequence[ScalingPolicy] = (ScalingPolicy("Percent", 100, 15),)

    def allows(self, policy: ScalingPolicy, start: int) -> int:
        """Percent rounds down what stays."""
        if policy.type == "Pods":
            return start - policy.value
        return start * (100 - policy.value) // 100

    def farthest(self, current: int, limits: Sequence[int]) -> int:
        """The lowest for `Max`, the highest for `Min`."""
        return min(current, max(limits) if self.select_policy == "Min" else min(limits))


@dataclass(frozen=True)
class Behavior:
    """`behavior` of an HPA."""

    scale_up: ScaleUp = field(default_factory=ScaleUp)
    scale_down: ScaleDown = field(default_factory=ScaleDown)


class HorizontalPodAutoscaler:
    """Kubernetes' HPA: the largest answer of its metrics, stabilized, then limited.

    The order of effects is that of the controller: clamp the current number between the lowest
    recommendation of the scale-up window and the highest of the scale-down window, then the rate
    policies, then the minimum and the maximum. A metric that could not be measured blocks scaling
    down; if none could, nothing moves.

    Source: kubernetes.io, "Horizontal Pod Autoscaling", and Kubernetes' own
    pkg/controller/podautoscaler.

    Args:
        metrics: at least one.
        min_replicas: never fewer. At 0 replicas the HPA is disabled unless this is 0.
        max_replicas: never more.
        behavior: windows and rates. Without it the windows are the same and an older limit holds:
            max(2 x current, 4) going up, none going down.
        tolerance: no change while the ratio of metric and target is within 1 - and 1 + this.
        clock: returns seconds; only differences matter.

    Raises:
        ValueError: there are no metrics, a bound is not a whole number, the minimum is above the
            maximum, or the tolerance is not from 0 to 1.
    """

    def __init__(
        self,
        metrics: Sequence[Metric],
        min_replicas: int = 1,
        max_replicas: int = 20,
        behavior: Behavior | None = None,
        tolerance: float = TOLERANCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not metrics:
            raise ValueError("metrics is empty; give at least one ExternalMetric or PodsMetric")
        self.metrics = tuple(metrics)
        self.min_replicas = whole_number("min_replicas", min_replicas, at_least=0)
        self.max_replicas = whole_number(
            "max_replicas", max_replicas, at_least=max(1, self.min_replicas)
        )
        self.behavior = behavior
        self.tolerance = number("tolerance", tolerance, at_least=0, at_most=1)
        self.clock = clock
        self._rules = behavior or Behavior()
        self._recommendations: list[tuple[float, int]] | None = None  # when, replicas
        self._changes: list[tuple[float, int]] = []  # when, replicas added

    def decide(self, metrics: Mapping[str, float], current_replicas: int) -> ScalingDecision:
        """One sync.

        Args:
            metrics: of the fleet; `PodsMetric` reads those of its replicas.
            current_replicas: those there are, loading ones included, draining ones not.

        Raises:
            ValueError: `current_replicas` is not a whole number of at least 0.
        """
        current = whole_number("current_replicas", current_replicas, at_least=0)
        now = self.clock()
        if self._recommendations is None:
            self._recommendations = [(now, current)]
        if current == 0 and self.min_replicas > 0:
            return ScalingDecision(0, "disabled: there are 0 replicas")
        if current > self.max_replicas:
            decision = ScalingDecision(
                self.max_replicas, f"{current} replicas are above max_replicas {self.max_replicas}"
            )
        elif current < self.min_replicas:
            decision = ScalingDecision(
                self.min_replicas, f"{current} replicas are below min_replicas {self.min_replicas}"
            )
        else:
            decision = self._by_metrics(metrics, current, now)
        if decision.replicas != current:
            longest_s = max(
                policy.period_seconds
                for rules in (self._rules.scale_up, self._rules.scale_down)
                for policy in rules.policies
            )
            self._changes = _since(self._changes, now, longest_s)
            self._changes.append((now, decision.replicas - current))
        return decision

    def _by_metrics(
        self, metrics: Mapping[str, float], current: int, now: float
    ) -> ScalingDecision:
        answers = [(m.name, m.propose(metrics, current, self.tolerance)) for m in self.metrics]
        failed = ", ".join(name for name, answer in answers if answer is None)
        proposals = [answer for _, answer in answers if answer is not None]
        if not proposals:
            return ScalingDecision(current, f"{failed} could not be measured: nothing moves")
        largest = max(proposals, key=lambda proposal: proposal.replicas)
        wanted, reason = largest.replicas, f"{largest.reason}: {largest.replicas} wanted"
        if failed and wanted < current:
            return ScalingDecision(
                current, f"{reason}, but {failed} could not be measured: no scaling down"
            )

        stable = self._stabilized(wanted, current, now)
        if stable != wanted:
            reason += f"; {stable} by the stabilization window"
        allowed = self._rate_limited(stable, current, now)
        if allowed != stable:
            reason += f"; {allowed} by the limit of change"
        replicas = min(max(allowed, self.min_replicas), self.max_replicas)
        if replicas != allowed:
            reason += f"; {replicas} by min_replicas and max_replicas"
        return ScalingDecision(replicas, reason)

    def _stabilized(self, wanted: int, current: int, now: float) -> int:
        up_s = self._rules.scale_up.stabilization_window_seconds
        down_s = self._rules.scale_down.stabilization_window_seconds
        recent = _since(self._recommendations or [], now, max(up_s, down_s))
        lowest = min([wanted] + [replicas for _, replicas in _since(recent, now, up_s)])
        highest = max([wanted] + [replicas for _, replicas in _since(recent, now, down_s)])
        self._recommendations = recent + [(now, wanted)]
        return min(max(current, lowest), highest)

    def _rate_limited(self, wanted: int, current: int, now: float) -> int:
        def replicas_before(seconds: int) -> int:
            return current - sum(change for _, change in _since(self._changes, now, seconds))

        if wanted > current:
            if self.behavior is None:
                return min(wanted, max(LEGACY_UP_FACTOR * current, LEGACY_UP_MINIMUM))
            return min(wanted, self._rules.scale_up.limit(current, replicas_before))
        if wanted < current and self.behavior is not None:
            return max(wanted, self._rules.scale_down.limit(current, replicas_before))
        return wanted


def _since(events: list[tuple[float, int]], now: float, seconds: float) -> list[tuple[float, int]]:
    """Those younger than that; one that is exactly as old has left the window."""
    return [event for event in events if now - event[0] < seconds]
