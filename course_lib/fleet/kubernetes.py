"""Kubernetes' two autoscalers, as they behave: `HorizontalPodAutoscaler` (HPA) and `Keda`.

The HPA goes from 1 to N replicas by the ratio of a metric to its target, tempered by a tolerance,
stabilization windows and rate policies. KEDA adds 0 to 1 and back to 0, and runs an HPA for the
rest. Field names are those of the YAML in snake_case. `decide` is one sync of the controller,
which Kubernetes makes every 15 s.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from course_lib.fleet.autoscaler import ScalingDecision
from course_lib.fleet.metrics import FleetMetrics, ReplicaMetrics
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
        ready = [replica for replica in _replicas(metrics) if replica.ready]
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
            values += [0.0] * (len(_replicas(metrics)) - len(values))
        if _within(sum(values), target * len(values), tolerance):
            return ScalingDecision(current, f"{reason}, within the tolerance")
        wanted = _ceil_ratio(sum(values), target)
        if mean > target and wanted < current:
            return ScalingDecision(current, f"{reason}, but zero for those without a value")
        return ScalingDecision(wanted, reason)


def measured(metrics: Mapping[str, float], name: str) -> float | None:
    """The metric, or the sum of several joined by `" + "`.

    None if one of them is absent, NaN or infinite.
    """
    values = [metrics.get(part, math.nan) for part in name.split(" + ")]
    return sum(values) if all(math.isfinite(value) for value in values) else None


def _replicas(metrics: Mapping[str, float]) -> Sequence[ReplicaMetrics]:
    return metrics.replicas if isinstance(metrics, FleetMetrics) else ()


def _ready(metrics: Mapping[str, float], current: int) -> int:
    """Replicas that are ready, or all if nothing tells; at 0 replicas the HPA reckons with one."""
    if not current:
        return 1
    if replicas := _replicas(metrics):
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


@dataclass(frozen=True)
class PrometheusTrigger:
    """One trigger of type `prometheus`.

    Args:
        metric: what the query returns: a name of `METRICS`, or several joined by `" + "`.
        threshold: the HPA's target.
        activation_threshold: active while the value is strictly greater.
        ignore_null_values: a metric that is absent is 0 and no failure. This is KEDA's default,
            and it scales down when the metrics are lost.
        metric_type: `AverageValue` (for each replica) or `Value` (of the fleet).

    Raises:
        ValueError: a threshold or the type is none of these.
    """

    metric: str
    threshold: float
    activation_threshold: float = 0
    ignore_null_values: bool = True
    metric_type: str = "AverageValue"

    def __post_init__(self) -> None:
        """Refuse what KEDA refuses."""
        number("threshold", self.threshold, at_least=SMALLEST_TARGET)
        number("activation_threshold", self.activation_threshold)
        known = known_name("metric_type", self.metric_type, ("AverageValue", "Value"))
        object.__setattr__(self, "metric_type", known)

    def read(self, metrics: Mapping[str, float]) -> float | None:
        """The value; None is a failure."""
        value = measured(metrics, self.metric)
        return 0.0 if value is None and self.ignore_null_values else value


@dataclass(frozen=True)
class Fallback:
    """What KEDA reports while a trigger fails: as much as `replicas` replicas would need.

    Args:
        failure_threshold: failures in a row that pass before it starts.
        replicas: to report.

    Raises:
        ValueError: one of them is not a whole number of at least 0.
    """

    failure_threshold: int
    replicas: int

    def __post_init__(self) -> None:
        """Refuse what KEDA refuses."""
        whole_number("failure_threshold", self.failure_threshold, at_least=0)
        whole_number("replicas", self.replicas, at_least=0)


class Keda:
    """KEDA: an operator between 0 and 1, an HPA of its own from 1 to N.

    Every `polling_interval_s` the operator activates a fleet at zero when a trigger is active, and
    takes a fleet without an active trigger to zero once the cooldown has passed: directly from N,
    past the HPA's windows and rates. A trigger that fails keeps it from that, since to fail is not
    to be inactive. At zero the HPA is disabled, so no fallback starts there.

    Source: keda.sh, "ScaledObject specification", and KEDA's own pkg/scaling/executor and
    pkg/fallback.

    Args:
        triggers: at least one; the largest answer wins.
        min_replica_count: 0 lets the fleet go to zero; the HPA's minimum is at least 1.
        max_replica_count: never more.
        polling_interval_s: of the operator.
        cooldown_period_s: since the last poll that saw an active trigger; for zero only.
        initial_cooldown_period_s: the same, since the start, if no trigger was active yet.
        idle_replica_count: where an inactive fleet goes in place of zero, below
            `min_replica_count`. The HPA raises any number but 0 to its minimum again, which is why
            KEDA's documentation supports 0 alone.
        fallback: for triggers of type `AverageValue`.
        behavior: of the HPA.
        clock: returns seconds; only differences matter.

    Raises:
        ValueError: there are no triggers, an argument is out of its range, or there is a fallback
            for a trigger of type `Value`.
    """

    def __init__(
        self,
        triggers: Sequence[PrometheusTrigger],
        min_replica_count: int = 0,
        max_replica_count: int = 100,
        polling_interval_s: float = 30,
        cooldown_period_s: float = 300,
        initial_cooldown_period_s: float = 0,
        idle_replica_count: int | None = None,
        fallback: Fallback | None = None,
        behavior: Behavior | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not triggers:
            raise ValueError("triggers is empty; give at least one PrometheusTrigger")
        self.triggers = tuple(triggers)
        self.min_replica_count = whole_number("min_replica_count", min_replica_count, at_least=0)
        self.polling_interval_s = number("polling_interval_s", polling_interval_s, above=0)
        self.cooldown_period_s = number("cooldown_period_s", cooldown_period_s, at_least=0)
        self.initial_cooldown_period_s = number(
            "initial_cooldown_period_s", initial_cooldown_period_s, at_least=0
        )
        if idle_replica_count is not None:
            whole_number("idle_replica_count", idle_replica_count, at_least=0)
            if idle_replica_count >= min_replica_count:
                raise ValueError(
                    "idle_replica_count must be below min_replica_count, got "
                    f"{idle_replica_count} and {min_replica_count}"
                )
        self.idle_replica_count = idle_replica_count
        if fallback and any(trigger.metric_type == "Value" for trigger in self.triggers):
            raise ValueError("fallback needs metric_type AverageValue in every trigger, got Value")
        self.fallback = fallback
        self.clock = clock
        self._names = [f"s{i}-{t.metric.replace(' + ', '+')}" for i, t in enumerate(self.triggers)]
        self._hpa = HorizontalPodAutoscaler(
            [
                ExternalMetric(name, average_value=trigger.threshold)
                if trigger.metric_type == "AverageValue"
                else ExternalMetric(name, value=trigger.threshold)
                for name, trigger in zip(self._names, self.triggers, strict=True)
            ],
            max(1, self.min_replica_count),
            max_replica_count,
            behavior,
            clock=clock,
        )
        self._failures = dict.fromkeys(self._names, 0)
        self._started_s: float | None = None
        self._polled_s: float | None = None
        self._last_active_s: float | None = None

    def decide(self, metrics: Mapping[str, float], current_replicas: int) -> ScalingDecision:
        """The operator's decision if it is due and has one, otherwise one sync of the HPA.

        Args:
            metrics: of the fleet.
            current_replicas: those there are, loading ones included, draining ones not.

        Raises:
            ValueError: `current_replicas` is not a whole number of at least 0.
        """
        current = whole_number("current_replicas", current_replicas, at_least=0)
        now = self.clock()
        if self._started_s is None:
            self._started_s = now
        values = [trigger.read(metrics) for trigger in self.triggers]
        if self._polled_s is None or now - self._polled_s >= self.polling_interval_s:
            self._polled_s = now
            decision = self._operate(values, current, now)
            if decision is not None:
                return decision
        if current == 0:
            return ScalingDecision(0, f"at zero: {self._inactive(values)}")
        return self._sync(values, metrics, current)

    def _operate(
        self, values: Sequence[float | None], current: int, now: float
    ) -> ScalingDecision | None:
        """What the operator changes, if anything."""
        for trigger, value in zip(self.triggers, values, strict=True):
            if value is not None and value > trigger.activation_threshold:
                self._last_active_s = now
                if current == 0:
                    return ScalingDecision(
                        max(1, self.min_replica_count),
                        f"activated: {trigger.metric} {value:g} > activation_threshold "
                        f"{trigger.activation_threshold:g}",
                    )
                return None
        if None in values:
            return None
        idle = self.idle_replica_count
        if idle is None and self.min_replica_count > 0:
            if current == 0:
                return ScalingDecision(self.min_replica_count, "0 is below min_replica_count")
            return None
        if current <= (idle or 0) or not self._cooled_down(now):
            return None
        return ScalingDecision(idle or 0, f"cooldown over, {self._inactive(values)}")

    def _cooled_down(self, now: float) -> bool:
        if self._last_active_s is not None:
            return now - self._last_active_s >= self.cooldown_period_s
        assert self._started_s is not None
        return now - self._started_s >= self.initial_cooldown_period_s

    def _inactive(self, values: Sequence[float | None]) -> str:
        return ", ".join(
            f"{trigger.metric} could not be measured"
            if value is None
            else f"{trigger.metric} {value:g}, activation_threshold "
            f"{trigger.activation_threshold:g}"
            for trigger, value in zip(self.triggers, values, strict=True)
        )

    def _sync(
        self, values: Sequence[float | None], metrics: Mapping[str, float], current: int
    ) -> ScalingDecision:
        """Publish the triggers' values, or the fallback's, and let the HPA decide."""
        published, fallen_back = dict(metrics), []
        for name, trigger, value in zip(self._names, self.triggers, values, strict=True):
            self._failures[name] = 0 if value is not None else self._failures[name] + 1
            if self.fallback and self._failures[name] > self.fallback.failure_threshold:
                value = trigger.threshold * self.fallback.replicas
                fallen_back.append(f"{trigger.metric} failed {self._failures[name]} times")
            if value is not None:
                published[name] = value
        decision = self._hpa.decide(FleetMetrics(published, _replicas(metrics)), current)
        if fallen_back:
            reason = f"fallback, {', '.join(fallen_back)}: {decision.reason}"
            return replace(decision, reason=reason)
        return decision

    @classmethod
    def from_scaled_object(
        cls,
        spec: Mapping[str, Any],
        metric_of_query: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> "Keda":
        """From the `spec` of a ScaledObject.

        What says where to ask and whom to scale has no effect here; any other field that is not
        modelled is refused.

        Args:
            spec: by the fields of the CRD, such as `minReplicaCount` and `triggers`.
            metric_of_query: for each Prometheus query, its `PrometheusTrigger.metric`.
            clock: returns seconds; only differences matter.

        Raises:
            ValueError: a field is unknown or its value is not good, a trigger is not of type
                `prometheus`, or `metric_of_query` lacks a query.
        """
        arguments = _renamed("spec", spec, _SPEC_FIELDS, required=["triggers"])
        arguments["triggers"] = [_trigger(t, metric_of_query) for t in arguments["triggers"]]
        if "fallback" in arguments:
            fallback = arguments["fallback"]
            arguments["fallback"] = Fallback(
                **_renamed("fallback", fallback, _FALLBACK_FIELDS, required=[*_FALLBACK_FIELDS])
            )
        advanced = _renamed("advanced", arguments.pop("advanced", {}), _ADVANCED_FIELDS)
        hpa = _renamed("horizontalPodAutoscalerConfig", advanced.get("hpa", {}), _HPA_FIELDS)
        if "behavior" in hpa:
            arguments["behavior"] = _behavior(hpa["behavior"])
        return cls(**arguments, clock=clock)


# The CRD's fields and our names for them; None where a field has no effect here.
_SPEC_FIELDS = {
    "scaleTargetRef": None,
    "minReplicaCount": "min_replica_count",
    "maxReplicaCount": "max_replica_count",
    "pollingInterval": "polling_interval_s",
    "cooldownPeriod": "cooldown_period_s",
    "initialCooldownPeriod": "initial_cooldown_period_s",
    "idleReplicaCount": "idle_replica_count",
    "fallback": "fallback",
    "advanced": "advanced",
    "triggers": "triggers",
}
_FALLBACK_FIELDS = {"failureThreshold": "failure_threshold", "replicas": "replicas"}
_ADVANCED_FIELDS = {
    "horizontalPodAutoscalerConfig": "hpa",
    "restoreToOriginalReplicaCount": None,
}
_HPA_FIELDS = {"behavior": "behavior", "name": None}
_BEHAVIOR_FIELDS = {"scaleUp": "scale_up", "scaleDown": "scale_down"}
_RULES_FIELDS = {
    "stabilizationWindowSeconds": "stabilization_window_seconds",
    "selectPolicy": "select_policy",
    "policies": "policies",
}
_POLICY_FIELDS = {"type": "type", "value": "value", "periodSeconds": "period_seconds"}
_TRIGGER_FIELDS = {
    "type": "type",
    "metadata": "metadata",
    "metricType": "metric_type",
    "name": None,
    "authenticationRef": None,
}
_METADATA_FIELDS = {
    "query": "metric",
    "threshold": "threshold",
    "activationThreshold": "activation_threshold",
    "ignoreNullValues": "ignore_null_values",
    "serverAddress": None,
    "unsafeSsl": None,
    "timeout": None,
    "customHeaders": None,
    "namespace": None,
    "authModes": None,
}


def _renamed(
    where: str,
    fields: Mapping[str, Any],
    names: Mapping[str, str | None],
    required: Sequence[str] = (),
) -> dict[str, Any]:
    for name in fields:
        if name not in names:
            raise ValueError(f"{where} has {name!r}, which is not modelled; remove it")
    for name in required:
        if name not in fields:
            raise ValueError(f"{where} lacks {name!r}")
    return {new: fields[old] for old, new in names.items() if new is not None and old in fields}


def _trigger(trigger: Mapping[str, Any], metric_of_query: Mapping[str, str]) -> PrometheusTrigger:
    arguments = _renamed("trigger", trigger, _TRIGGER_FIELDS, required=["type", "metadata"])
    known_name("type of trigger", arguments.pop("type"), ("prometheus",))
    # The values of `metadata` are texts.
    metadata = _renamed(
        "metadata", arguments.pop("metadata"), _METADATA_FIELDS, required=["query", "threshold"]
    )
    query = metadata["metric"]
    if query not in metric_of_query:
        raise ValueError(
            f"metric_of_query lacks the query {query!r}; say which of METRICS it returns"
        )
    metadata["metric"] = metric_of_query[query]
    for name in ("threshold", "activation_threshold"):
        if name in metadata:
            metadata[name] = float(metadata[name])
    if "ignore_null_values" in metadata:
        text = known_name("ignoreNullValues", metadata["ignore_null_values"], ("true", "false"))
        metadata["ignore_null_values"] = text == "true"
    return PrometheusTrigger(**metadata, **arguments)


def _behavior(fields: Mapping[str, Any]) -> Behavior:
    kinds: dict[str, type[ScalingRules]] = {"scale_up": ScaleUp, "scale_down": ScaleDown}
    directions: dict[str, Any] = {}
    for name, rules in _renamed("behavior", fields, _BEHAVIOR_FIELDS).items():
        arguments = _renamed(name, rules, _RULES_FIELDS)
        if "policies" in arguments:
            arguments["policies"] = tuple(
                ScalingPolicy(**_renamed("policy", policy, _POLICY_FIELDS, [*_POLICY_FIELDS]))
                for policy in arguments["policies"]
            )
        directions[name] = kinds[name](**arguments)
    return Behavior(**directions)
