"""What replicas report, and what the policy inside Ray makes of it; no Ray is needed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from prometheus_client import Counter, Gauge, Histogram

from course_lib.fleet.autoscaler import ScalingDecision
from course_lib.fleet.control_loop import LoopDecision, NoMetrics, SafeAutoscaler
from course_lib.fleet.metrics import METRICS
from course_lib.fleet.ray_policy import (
    RECEIVED,
    TTFT,
    ReplicaReport,
    ServePolicy,
    fleet_metrics,
)
from course_lib.fleet.replica import VirtualClock
from course_lib.serving.metrics import Metrics


class Engine:
    """A registry as a replica has it, with values that are set by hand."""

    def __init__(self, clock: VirtualClock | None = None) -> None:
        registry = Metrics("model", 4096).registry
        self.waiting = Gauge("vllm:num_requests_waiting", "", registry=registry)
        self.running = Gauge("vllm:num_requests_running", "", registry=registry)
        self.kv_cache = Gauge("vllm:kv_cache_usage_perc", "", registry=registry)
        age = "course:oldest_waiting_request_age_seconds"
        self.age = Gauge(age, "", registry=registry)
        self.ttft = Histogram(TTFT, "", buckets=(0.1, 1, 10), registry=registry)
        self.received = Counter(RECEIVED, "", registry=registry)
        self.clock = clock or VirtualClock()
        self.report = ReplicaReport(registry, self.clock)

    def read(self, at_s: float) -> dict[str, float]:
        self.clock.now_s = at_s
        return self.report.read()


def test_a_report_has_the_gauges_of_now_and_the_last_minute_of_the_rest() -> None:
    engine = Engine()
    engine.waiting.set(3)
    engine.kv_cache.set(0.5)
    engine.received.inc(10)
    engine.ttft.observe(5)
    first = engine.read(30)
    assert (first["num_requests_waiting"], first["kv_cache_utilization"]) == (3, 0.5)
    assert (first["received"], first["window_s"]) == (10, 30)
    assert (first["ttft_p95_ms<=1.0"], first["ttft_p95_ms<=10.0"]) == (0, 1)

    engine.waiting.set(0)
    engine.received.inc(2)
    engine.ttft.observe(0.5)
    later = engine.read(90)  # what came before second 30 is older than a minute
    assert (later["num_requests_waiting"], later["received"], later["window_s"]) == (0, 2, 60)
    assert (later["ttft_p95_ms<=1.0"], later["ttft_p95_ms<=10.0"]) == (1, 1)
    assert all(isinstance(value, int | float) for value in later.values())


def test_the_fleet_is_the_sum_of_its_replicas() -> None:
    one, two = Engine(), Engine()
    one.waiting.set(4)
    one.running.set(8)
    one.kv_cache.set(0.6)
    one.age.set(7)
    two.running.set(2)
    two.kv_cache.set(0.2)
    one.received.inc(50)
    two.received.inc(10)
    for _ in range(19):
        one.ttft.observe(0.5)
    two.ttft.observe(5)
    found = fleet_metrics({"a": one.read(60), "b": two.read(60)}, ["c"], at_gateway=5)
    assert set(found) < set(METRICS)
    assert found["num_requests_waiting"] == 9
    assert found["num_requests_running"] == 10
    assert found["kv_cache_utilization"] == pytest.approx(0.4)
    assert found["request_rate_per_s"] == 1
    assert found["num_replicas_ready"] == 2
    # All requests count together: 19 of 20 took up to a second. It is no mean of two quantiles.
    assert found["ttft_p95_ms"] == 1000
    assert found["tpot_p95_ms"] == 0
    assert [(r.name, r.ready) for r in found.replicas] == [("a", True), ("b", True), ("c", False)]
    assert found.replicas[0].values["num_requests_waiting"] == 4
    assert found.replicas[1].values["ttft_p95_ms"] > 5000


def test_nobody_tells_how_old_requests_at_the_gateway_are() -> None:
    engine = Engine()
    engine.age.set(7)
    report = {"a": engine.read(1)}
    assert fleet_metrics(report, [], at_gateway=0)["queue_age_s"] == 7
    assert "queue_age_s" not in fleet_metrics(report, [], at_gateway=1)


@dataclass
class Context:
    """Of Ray's `AutoscalingContext` what the policy reads."""

    target_num_replicas: int
    running: Mapping[str, dict[str, float]]  # reports by replica
    reported_s: float
    total_queued_requests: float = 0.0
    running_replicas: list[SimpleNamespace] = field(init=False)
    raw_metrics: dict[str, dict[object, list[SimpleNamespace]]] = field(init=False)

    def __post_init__(self) -> None:
        ids = {name: _Id(name) for name in self.running}
        self.running_replicas = list(ids.values())
        self.raw_metrics = {}
        for name, report in self.running.items():
            for metric, value in report.items():
                sample = SimpleNamespace(timestamp=self.reported_s, value=value)
                self.raw_metrics.setdefault(metric, {})[ids[name]] = [sample]


class _Id(SimpleNamespace):
    def __init__(self, unique_id: str) -> None:
        super().__init__(unique_id=unique_id)

    def __hash__(self) -> int:
        return hash(self.unique_id)


class OneForEach:
    """As many replicas as requests."""

    def decide(self, metrics: Mapping[str, float], current: int) -> ScalingDecision:
        return ScalingDecision(int(metrics["num_requests_running"]), "one for each")


class Tried:
    """A policy and what it has told, on a clock of its own."""

    def __init__(self, interval_s: float = 5) -> None:
        self.clock = VirtualClock()
        self.told: list[LoopDecision] = []
        self.policy = ServePolicy(
            lambda _: SafeAutoscaler(OneForEach(), ["num_requests_running"]),
            interval_s, self.told.append, self.clock,
        )  # fmt: skip

    def at(self, time_s: float, target: int, reported_s: float | None = None, **running: float):
        """The replicas that Ray is told, where each of these reports so many running requests."""
        self.clock.now_s = time_s
        reports = {}
        for name, value in running.items():
            engine = Engine()
            engine.running.set(value)
            reports[name] = engine.read(1)
        when = time_s if reported_s is None else reported_s
        replicas, state = self.policy(Context(target, reports, when))
        assert state == {}
        return replicas


def test_it_decides_once_an_interval_and_otherwise_leaves_what_is() -> None:
    tried = Tried(interval_s=5)
    assert tried.at(100, 1, a=3) == 3
    assert tried.at(100.1, 3, a=9) == 3
    assert tried.at(104.9, 3, a=9) == 3
    assert tried.at(105, 3, a=9) == 9
    assert [(s.current, s.decision) for s in tried.told] == [
        (1, ScalingDecision(3, "one for each")),
        (3, ScalingDecision(9, "one for each")),
    ]


def test_it_begins_with_the_first_report() -> None:
    tried = Tried()
    assert tried.at(100, 2) == 2
    assert not tried.told
    assert tried.at(101, 2, a=3) == 3


def test_without_reports_the_last_decision_holds() -> None:
    tried = Tried()
    assert tried.at(100, 1, a=3) == 3
    assert tried.at(105, 3) == 3  # none is running
    assert tried.at(110, 3, reported_s=90, a=0) == 3  # one is, and its report is old
    assert tried.at(115, 3, a=2, b=0, c=0) == 2
    lost = tried.told[1:3]
    assert all(isinstance(step.metrics, NoMetrics) for step in lost)
    assert lost[1].decision.reason == (
        "3 held, failure 2 in a row: no replica has reported in the last 15 s"
    )


def test_a_machine_that_is_gone_does_not_look_like_less_to_do() -> None:
    tried = Tried()
    assert tried.at(100, 3, a=1, b=1, c=1) == 3
    assert tried.at(105, 3, a=1) == 3
    assert tried.told[-1].decision.reason.startswith("1 of 3 replicas report, so no scaling down")
    assert [(r.name, r.ready) for r in tried.told[-1].metrics.replicas] == [
        ("a", True), ("loading-0", False), ("loading-1", False),
    ]  # fmt: skip


def test_zero_is_not_reached_by_accident() -> None:
    tried = Tried()
    assert tried.at(100, 2, a=1, b=1) == 2
    assert tried.at(105, 2, a=0) == 2  # the other one may have something to do
    assert tried.at(110, 2, a=0, b=0) == 0  # this is no accident; Ray's minimum stands above it
