"""KEDA, as it behaves: zero replicas and back, and an HPA for the rest.

`Keda` takes its settings by name, or reads the ScaledObject that a cluster would get:
`Keda.from_scaled_object`. It decides here as KEDA's operator and its HPA would there, on the
clock it is given.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from course_lib.fleet.autoscaler import ScalingDecision
from course_lib.fleet.kubernetes import (
    SMALLEST_TARGET,
    Behavior,
    ExternalMetric,
    HorizontalPodAutoscaler,
    ScaleDown,
    ScaleUp,
    ScalingPolicy,
    ScalingRules,
)
from course_lib.fleet.metrics import FleetMetrics, measured, replicas_in
from course_lib.validation import known_name, number, whole_number


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


_FALLBACK_BEHAVIORS: Mapping[str, Callable[[int, int], int]] = {
    "static": lambda replicas, current: replicas,
    "currentReplicas": lambda replicas, current: current,
    "currentReplicasIfHigher": max,
    "currentReplicasIfLower": min,
}


@dataclass(frozen=True)
class Fallback:
    """What KEDA reports while a trigger fails: as much as so many replicas would need.

    Args:
        failure_threshold: failures in a row that pass before it starts.
        replicas: so many, if it is `static`.
        behavior: `static`; `currentReplicas`, those there are, whatever `replicas` says;
            `currentReplicasIfHigher`, the larger of both; `currentReplicasIfLower`, the smaller.

    Raises:
        ValueError: a number is not whole or below 0, or the behavior is none of these.
    """

    failure_threshold: int
    replicas: int
    behavior: str = "static"

    def __post_init__(self) -> None:
        """Refuse what KEDA refuses."""
        whole_number("failure_threshold", self.failure_threshold, at_least=0)
        whole_number("replicas", self.replicas, at_least=0)
        known = known_name("behavior of a fallback", self.behavior, _FALLBACK_BEHAVIORS)
        object.__setattr__(self, "behavior", known)

    def replicas_at(self, current: int) -> int:
        """How many it stands for while there are `current`."""
        return _FALLBACK_BEHAVIORS[self.behavior](self.replicas, current)


class Keda:
    """KEDA: an operator between 0 and 1, an HPA of its own from 1 to N.

    Every `polling_interval_s` the operator activates a fleet at zero when a trigger is active, and
    takes a fleet without an active trigger to zero once the cooldown has passed: directly from N,
    past the HPA's windows and rates. A trigger that fails keeps it from that, since to fail is not
    to be inactive, unless the fallback is zero replicas. At zero the HPA is disabled, so no
    fallback starts there. (Before pull request 6520 of 2025 the operator itself scaled to the
    fallback's replicas, at the first failure.)

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
        if None in values and (self.fallback is None or self.fallback.replicas > 0):
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
                value = trigger.threshold * self.fallback.replicas_at(current)
                fallen_back.append(f"{trigger.metric} failed {self._failures[name]} times")
            if value is not None:
                published[name] = value
        decision = self._hpa.decide(FleetMetrics(published, replicas_in(metrics)), current)
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
                **_renamed("fallback", fallback, _FALLBACK_FIELDS, ["failureThreshold", "replicas"])
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
_FALLBACK_FIELDS = {
    "failureThreshold": "failure_threshold",
    "replicas": "replicas",
    "behavior": "behavior",
}
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
