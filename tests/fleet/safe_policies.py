"""The policies of the simulator, made safe: each as a loop, a replay and a simulation take it."""

from course_lib.fleet.autoscaler import GPUAutoscaler
from course_lib.fleet.control_loop import SafeAutoscaler
from course_lib.fleet.keda import Fallback, Keda
from course_lib.fleet.kubernetes import (
    Behavior,
    ExternalMetric,
    HorizontalPodAutoscaler,
    PodsMetric,
    ScaleDown,
)
from course_lib.fleet.planners import PredictiveAutoscaler, SaturationAutoscaler, SloPlanner
from course_lib.fleet.prometheus import promql

LOAD = "num_requests_waiting + num_requests_running"
JOB = {"job": "chat"}
FALLBACK = Fallback(failure_threshold=3, replicas=3)

#: What the cluster would get, for a fleet whose job is `chat`. It goes down at once, to zero too.
SCALED_OBJECT = {
    "minReplicaCount": 0,
    "maxReplicaCount": 8,
    "pollingInterval": 1,
    "cooldownPeriod": 2,
    "advanced": {
        "horizontalPodAutoscalerConfig": {
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": 0}}
        }
    },
    "triggers": [
        {
            "type": "prometheus",
            "metadata": {
                "serverAddress": "http://prometheus:9090",
                "query": promql(LOAD, JOB),
                "threshold": "2",
            },
        }
    ],
}


def _keda(clock):
    return Keda.from_scaled_object(SCALED_OBJECT, {promql(LOAD, JOB): LOAD}, clock)


def _hpa(clock):
    metrics = [ExternalMetric(LOAD, 2), PodsMetric("num_requests_waiting", 3)]
    behavior = Behavior(scale_down=ScaleDown(stabilization_window_seconds=0))
    return HorizontalPodAutoscaler(metrics, max_replicas=8, behavior=behavior, clock=clock)


def _slo(clock):
    return SloPlanner(lambda prompt, output: 0.05, 50, 100, interval_s=2, clock=clock)


def _predictive(clock):
    return PredictiveAutoscaler(2, 5, LOAD, season_s=3600, step_s=60, clock=clock)


_RULES = {
    "gpu": (
        lambda clock: GPUAutoscaler(cooldown_s=3, clock=clock),
        [LOAD, "kv_cache_utilization", "ttft_p95_ms"],
    ),
    "hpa": (_hpa, [LOAD]),
    "keda": (_keda, [LOAD]),
    "saturation": (lambda clock: SaturationAutoscaler(clock=clock), [LOAD]),
    "slo": (_slo, ["request_rate_per_s", "ttft_p95_ms", "tpot_p95_ms"]),
    "predictive": (_predictive, [LOAD]),
}


def _safe(rule, needs):
    return lambda clock: SafeAutoscaler(rule(clock), needs, FALLBACK)


#: By name, what makes it with a clock.
POLICIES = {name: _safe(rule, needs) for name, (rule, needs) in _RULES.items()}
