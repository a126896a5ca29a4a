"""What a loop does to its fleet while all is well, and above all while it is not."""

import io
import logging
import threading

import pytest

from course_lib.fleet.autoscaler import GPUAutoscaler, ScalingDecision
from course_lib.fleet.control_loop import (
    ControlLoop,
    LoopDecision,
    NoMetrics,
    SafeAutoscaler,
    read_record,
    replay,
)
from course_lib.fleet.keda import Fallback, Keda, PrometheusTrigger
from course_lib.fleet.kubernetes import ExternalMetric, HorizontalPodAutoscaler
from course_lib.fleet.metrics import METRICS, FleetMetrics, ReplicaMetrics
from course_lib.fleet.prometheus import QUERIES, Prometheus, PrometheusMetrics, promql
from course_lib.fleet.simulator import simulate
from course_lib.fleet.spec import FleetSpec, ReplicaSpec
from course_lib.fleet.step_time import FittedStepTime
from course_lib.traces.generators import steady
from tests.fleet.fake_prometheus import FakePrometheus, one
from tests.fleet.safe_policies import LOAD, POLICIES
from tests.serving.servers import wait_until

LOST = NoMetrics("http://prometheus does not answer: refused")


def load(waiting=0, running=0, ready=None):
    values = {"num_requests_waiting": waiting, "num_requests_running": running}
    if ready is not None:
        values["num_replicas_ready"] = ready
    return FleetMetrics(values)


class Scripted:
    """Decides what it is told; an exception is raised."""

    def __init__(self, *decisions):
        self.decisions = list(decisions)
        self.saw = []

    def decide(self, metrics, current_replicas):
        self.saw.append((dict(metrics), current_replicas))
        decision = self.decisions.pop(0)
        if isinstance(decision, Exception):
            raise decision
        return ScalingDecision(decision, "scripted")


def safe(*decisions, fallback=None):
    return SafeAutoscaler(Scripted(*decisions), [LOAD], fallback)


def keda(clock=lambda: 0.0, **options):
    trigger = PrometheusTrigger(LOAD, threshold=4)
    return Keda([trigger], max_replica_count=10, clock=clock, **options)


# The decision.


def test_with_its_metrics_the_autoscaler_decides():
    autoscaler = safe(3, 2, 0)
    assert autoscaler.decide(load(9, ready=2), 2) == ScalingDecision(3, "scripted")
    assert autoscaler.decide(load(ready=3), 3).replicas == 2
    assert autoscaler.decide(load(ready=2), 2).replicas == 0
    assert autoscaler.autoscaler.saw[0][1] == 2


def test_without_metrics_the_last_decision_holds_and_the_reason_is_logged(caplog):
    autoscaler = safe(4)
    assert autoscaler.decide(load(9), 2).replicas == 4
    with caplog.at_level(logging.WARNING):
        decision = autoscaler.decide(LOST, 4)
    assert decision.replicas == 4
    assert decision.reason == f"4 held, failure 1 in a row: {LOST.reason}"
    assert [record.getMessage() for record in caplog.records] == [decision.reason]
    # A replica was lost meanwhile: it is ordered again. One more than decided is left alone.
    assert autoscaler.decide(LOST, 3).replicas == 4
    assert autoscaler.decide(LOST, 5).replicas == 5
    assert len(autoscaler.autoscaler.saw) == 1


def test_before_the_first_decision_the_fleet_stays_as_it_is():
    assert safe().decide(LOST, 3).replicas == 3
    assert safe().decide(LOST, 0).replicas == 0


@pytest.mark.parametrize(
    "metrics",
    [
        FleetMetrics({}),
        FleetMetrics({"num_requests_waiting": 0}),
        FleetMetrics({"num_requests_waiting": 0, "num_requests_running": float("nan")}),
    ],
)
def test_a_metric_that_is_missing_is_not_zero(metrics):
    # KEDA alone takes it for zero by default, and goes there.
    assert keda().decide(metrics, 3).replicas == 0
    decision = SafeAutoscaler(keda(), [LOAD]).decide(metrics, 3)
    assert decision.replicas == 3
    assert decision.reason == f"3 held, failure 1 in a row: {LOAD} could not be measured"


def test_zero_on_purpose_is_still_possible_and_is_left_again():
    autoscaler = SafeAutoscaler(keda(), [LOAD], Fallback(0, 5))
    assert autoscaler.decide(load(0, 0, ready=2), 2).replicas == 0
    # At zero there are no series, which is no failure.
    decision = autoscaler.decide(FleetMetrics({}), 0)
    assert decision == ScalingDecision(0, f"at zero, where no replica reports {LOAD}")
    assert autoscaler.failures == 0


def test_a_fleet_that_lost_all_its_replicas_is_not_one_at_zero():
    autoscaler = safe(3)
    autoscaler.decide(load(9), 2)
    assert autoscaler.decide(FleetMetrics({}), 0).replicas == 3


def test_the_fallback_starts_after_more_failures_than_its_threshold():
    autoscaler = safe(2, 2, fallback=Fallback(3, 5))
    autoscaler.decide(load(1), 2)
    assert [autoscaler.decide(LOST, 2).replicas for _ in range(4)] == [2, 2, 2, 5]
    assert autoscaler.decide(LOST, 5).reason == (f"5 held, failure 5 in a row: {LOST.reason}")
    # It ends with the first answer, and the count begins anew.
    assert autoscaler.decide(load(1), 5).replicas == 2
    assert [autoscaler.decide(LOST, 2).replicas for _ in range(4)] == [2, 2, 2, 5]


def test_the_fallbacks_failures_are_those_of_keda():
    """KEDA's own model goes up at the same failure; that of an HPA limits how far at once."""
    fallback = Fallback(3, 3)
    trigger = PrometheusTrigger(LOAD, 4, ignore_null_values=False)
    model = Keda([trigger], 1, 10, fallback=fallback, clock=lambda: 0.0)
    autoscaler = safe(fallback=fallback)
    for _ in range(5):
        assert autoscaler.decide(LOST, 2).replicas == model.decide(LOST, 2).replicas


def test_the_fallback_takes_nothing_away():
    autoscaler = safe(8, fallback=Fallback(0, 5))
    autoscaler.decide(load(9), 8)
    assert autoscaler.decide(LOST, 8).replicas == 8


def test_the_fallback_serves_a_fleet_at_zero_that_nobody_can_see():
    autoscaler = safe(0, fallback=Fallback(1, 2))
    assert autoscaler.decide(load(), 0).replicas == 0
    assert [autoscaler.decide(LOST, 0).replicas for _ in range(2)] == [0, 2]


def test_a_replica_that_vanished_blocks_scaling_down_only():
    autoscaler = safe(2, 0, 4, 2)
    decision = autoscaler.decide(load(1, ready=2), 3)
    assert decision.replicas == 3
    assert decision.reason == "2 of 3 replicas report, so no scaling down; otherwise scripted"
    assert autoscaler.decide(load(0, ready=1), 3).replicas == 3
    assert autoscaler.decide(load(9, ready=2), 3).replicas == 4
    assert autoscaler.decide(load(1, ready=3), 3).replicas == 2


@pytest.mark.parametrize("mistake", [ValueError("a mistake"), ZeroDivisionError(), -1, None, 1.5])
def test_an_autoscaler_with_a_mistake_moves_nothing(mistake):
    autoscaler = safe(4, mistake, 1)
    autoscaler.decide(load(9), 2)
    decision = autoscaler.decide(load(0), 4)
    assert decision.replicas == 4
    assert "Scripted failed with " in decision.reason
    assert autoscaler.decide(load(0), 4).replicas == 1


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="needs must be a list of metrics that the rule reads"):
        SafeAutoscaler(Scripted(), [])
    with pytest.raises(ValueError, match="got 'ttft_p95_ms'"):
        SafeAutoscaler(Scripted(), "ttft_p95_ms")
    with pytest.raises(
        ValueError, match=r"fallback\.replicas must be a whole number of at least 1"
    ):
        SafeAutoscaler(Scripted(), [LOAD], Fallback(3, 0))
    with pytest.raises(ValueError, match="current_replicas"):
        safe(1).decide(load(), -1)


# The loop.


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        self.now_s += 0.001  # no two readings are equal
        return self.now_s


class FakeFleet:
    def __init__(self, replicas=1):
        self.replicas = replicas
        self.orders = []
        self.broken = False
        self.unknown = False

    def current_replicas(self):
        if self.unknown:
            raise ConnectionError("no API server")
        return self.replicas

    def scale_to(self, replicas):
        if self.broken:
            raise OSError("quota exceeded")
        self.orders.append(replicas)
        self.replicas = replicas


class FakeSource:
    def __init__(self, *found):
        self.found = list(found)

    def read(self):
        found = self.found.pop(0) if len(self.found) > 1 else self.found[0]
        if isinstance(found, Exception):
            raise found
        return found


def gpu_autoscaler(clock):
    return SafeAutoscaler(
        GPUAutoscaler(cooldown_s=60, clock=clock), ["num_requests_waiting"], Fallback(3, 3)
    )


def full(waiting=20):
    values = {"kv_cache_utilization": 0.5, "ttft_p95_ms": 100.0, "num_replicas_ready": 1.0}
    return FleetMetrics({**load(waiting, 8), **values})


def test_a_step_reads_decides_and_applies(caplog):
    fleet = FakeFleet()
    loop = ControlLoop(FakeSource(full()), gpu_autoscaler, fleet, Clock())
    with caplog.at_level(logging.INFO):
        step = loop.step()
    assert fleet.orders == [2]
    assert step.current == 1 and step.decision.replicas == 2
    assert caplog.messages == ["scaled from 1 to 2 replicas, num_requests_waiting 20 > 10"]
    loop.step()  # cooldown: nothing is ordered
    assert fleet.orders == [2]


def test_an_order_that_fails_is_not_forgotten_in_the_cooldown(caplog):
    fleet, clock = FakeFleet(), Clock()
    loop = ControlLoop(FakeSource(full()), gpu_autoscaler, fleet, clock)
    fleet.broken = True
    assert loop.step().decision.replicas == 2
    assert "not scaled from 1 to 2 replicas" in caplog.text
    assert "OSError: quota exceeded" in caplog.text
    assert loop.step().decision.replicas == 2
    fleet.broken = False
    assert "cooldown" in loop.step().decision.reason
    assert fleet.orders == [2]
    assert loop.step().current == 2
    # Once carried out, it counts no longer.
    fleet.replicas = 1
    assert loop.step().current == 1


def test_an_order_of_fewer_that_fails_is_decided_anew():
    fleet, source = FakeFleet(4), FakeSource(load(ready=4), ConnectionError("lost"))
    loop = ControlLoop(source, lambda clock: safe(2), fleet, Clock())
    fleet.broken = True
    assert loop.step().decision.replicas == 2
    fleet.broken = False
    assert loop.step().decision.replicas == 4
    assert fleet.orders == []


def test_whatever_the_source_raises_is_a_loss_of_metrics(caplog):
    fleet = FakeFleet(3)
    errors = [RuntimeError("Prometheus is gone"), OSError(), KeyError("x")]
    loop = ControlLoop(FakeSource(*errors), lambda clock: safe(), fleet, Clock())
    reasons = [loop.step().metrics.reason for _ in errors]
    assert reasons == ["Prometheus is gone", "OSError", "'x'"]
    assert fleet.orders == []
    assert "3 held, failure 1 in a row: Prometheus is gone" in caplog.text


def test_it_runs_until_it_is_stopped_whatever_the_fleet_says(caplog):
    fleet, stop = FakeFleet(), threading.Event()
    fleet.unknown = True
    loop = ControlLoop(FakeSource(full()), gpu_autoscaler, fleet)
    thread = threading.Thread(target=loop.run, args=(0.01, stop))
    thread.start()
    try:
        wait_until(lambda: "no step: ConnectionError: no API server" in caplog.text)
        fleet.unknown = False
        wait_until(lambda: fleet.orders)
    finally:
        stop.set()
        thread.join()
    assert fleet.orders == [2]


def test_one_region_loses_its_prometheus_and_the_other_goes_on():
    with FakePrometheus() as here, FakePrometheus() as there:
        fleets = {"here": FakeFleet(2), "there": FakeFleet(2)}
        loops = {
            name: ControlLoop(
                PrometheusMetrics(Prometheus(server.url)),
                lambda clock: SafeAutoscaler(keda(clock), [LOAD], Fallback(3, 3)),
                fleets[name],
                Clock(),
            )
            for name, server in (("here", here), ("there", there))
        }
        for server in (here, there):
            server.answers = {
                promql("num_requests_waiting"): one("10"),
                promql("num_requests_running"): one("6"),
                promql("num_replicas_ready"): one("2"),
            }
        assert [loop.step().decision.replicas for loop in loops.values()] == [4, 4]
        here.status = 503
        there.answers[promql("num_requests_waiting")] = one("26")
        there.answers[promql("num_replicas_ready")] = one("4")
        steps = [(loops["here"].step(), loops["there"].step()) for _ in range(5)]
    assert {step.decision.replicas for step, _ in steps} == {4}
    assert all("503" in step.decision.reason for step, _ in steps)
    assert [step.decision.replicas for _, step in steps][-1] == 8
    assert fleets["here"].orders == [4] and fleets["there"].orders == [4, 8]


# Records.


def recorded(make, source, fleet, steps):
    record = io.StringIO()
    loop = ControlLoop(source, make, fleet, Clock(), record)
    for _ in range(steps):
        loop.step()
        loop.clock.now_s += 15
    return record.getvalue().splitlines()


def test_a_record_replays_to_the_same_decisions_failures_included():
    found = [
        full(),
        full(12),
        OSError("gone"),
        full(20),
        FleetMetrics({}),
        *[OSError("gone")] * 5,
        full(0),
    ]
    lines = recorded(gpu_autoscaler, FakeSource(*found), FakeFleet(), len(found))
    steps = read_record(lines)
    decided = [step.decision for step in steps]
    assert replay(steps, gpu_autoscaler) == decided
    assert [decision.replicas for decision in decided] == [2] * 7 + [3] * 4
    assert "cooldown" in decided[1].reason and "gone" in decided[2].reason


def test_a_record_that_was_tampered_with_gives_other_decisions():
    lines = recorded(gpu_autoscaler, FakeSource(full()), FakeFleet(), 6)
    decided = [step.decision for step in read_record(lines)]
    for old, new in [
        ('"num_requests_waiting": 20', '"num_requests_waiting": 2'),
        ('"time_s": 1060.0', '"time_s": 1030.0'),
        ('"current": 2', '"current": 1'),
    ]:
        tampered = [line.replace(old, new) for line in lines]
        assert tampered != lines, old
        assert replay(read_record(tampered), gpu_autoscaler) != decided, old


def test_a_line_holds_all_of_a_step():
    replicas = [ReplicaMetrics("a:1", True, {"num_requests_waiting": 0.1 + 0.2})]
    for metrics in (FleetMetrics({"ttft_p95_ms": 1 / 3}, replicas), NoMetrics("gone")):
        step = LoopDecision(12.5, metrics, 3, ScalingDecision(4, "because"))
        again = LoopDecision.from_json(step.to_json())
        assert (again.time_s, again.current, again.decision) == (12.5, 3, step.decision)
        assert type(again.metrics) is type(metrics)
        assert dict(again.metrics) == dict(metrics)
        assert again.metrics.replicas == metrics.replicas
    assert again.metrics.reason == "gone"


@pytest.mark.parametrize("line", ["", "{}", "[1]", '{"time_s": 1}'])
def test_lines_of_another_kind_are_refused(line):
    with pytest.raises(ValueError, match="expected a step of a control loop, got"):
        read_record([line])


def test_another_autoscaler_reads_the_same_record():
    lines = recorded(gpu_autoscaler, FakeSource(full(), OSError("gone")), FakeFleet(), 2)
    hpa = replay(
        read_record(lines),
        lambda clock: HorizontalPodAutoscaler([ExternalMetric(LOAD, average_value=4)], clock=clock),
    )
    assert [decision.replicas for decision in hpa] == [4, 2]
    assert "nothing moves" in hpa[1].reason


# The simulator runs the same objects on the same names.


class Recorder:
    """An autoscaler whose steps are kept as those of a loop are."""

    def __init__(self, autoscaler, clock, steps):
        self.autoscaler, self.clock, self.steps = autoscaler, clock, steps

    def decide(self, metrics, current_replicas):
        decision = self.autoscaler.decide(metrics, current_replicas)
        step = LoopDecision(self.clock(), metrics, current_replicas, decision)
        self.steps.append(step.to_json())
        return decision


@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_what_a_simulation_decided_replays_too(make):
    lines = []
    fleet = FleetSpec(
        ReplicaSpec(FittedStepTime(step_s=0.05), 300, 512, max_num_seqs=2),
        initial_replicas=2,
        autoscaler=lambda clock: Recorder(make(clock), clock, lines),
        scrape_interval_s=2,
    )
    trace = steady(2, 60, seed=1, prompt_tokens=(5, 50), output_tokens=(5, 50))
    result = simulate(trace, fleet)
    steps = read_record(lines)
    assert len({step.decision for step in steps}) > 1
    assert set(steps[0].metrics) == set(METRICS) > set(QUERIES)
    decisions = replay(steps, make)
    assert decisions == [step.decision for step in steps]
    assert [(decision.replicas, decision.reason) for decision in decisions] == [
        (row["wanted"], row["reason"]) for row in result.decision_rows
    ]
