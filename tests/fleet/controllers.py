"""What the tests of Kubernetes' controllers share: a clock, fleets, and a run of syncs."""

from hypothesis import strategies as st

from course_lib.fleet.kubernetes import Behavior, ScaleDown
from course_lib.fleet.metrics import FleetMetrics, ReplicaMetrics

WAITING, RUNNING = "num_requests_waiting", "num_requests_running"
AT_ONCE = Behavior(scale_down=ScaleDown(stabilization_window_seconds=0))

#: What waits at each sync; None where it could not be measured.
loads = st.lists(st.one_of(st.none(), st.integers(0, 400)), min_size=1, max_size=40)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def replicas_of(autoscaler, clock, current, seen, step_s=15):
    """The replicas after each sync, every decision being carried out at once."""
    counts = []
    for metrics in seen:
        current = autoscaler.decide(
            metrics if isinstance(metrics, dict) else {WAITING: metrics}, current
        ).replicas
        counts.append(current)
        clock.now_s += step_s
    return counts


def pods(*values, loading=0, name="kv_cache_utilization"):
    """A fleet whose replicas report these values (None: the scrape failed), some still loading."""
    replicas = [
        ReplicaMetrics(f"r{i}", True, {} if value is None else {name: value})
        for i, value in enumerate(values)
    ]
    replicas += [ReplicaMetrics(f"l{i}", False) for i in range(loading)]
    return FleetMetrics({}, replicas)
