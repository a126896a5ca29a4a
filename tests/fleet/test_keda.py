import functools
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.fleet.keda import Fallback, Keda, PrometheusTrigger
from course_lib.fleet.kubernetes import Behavior, ScaleDown
from course_lib.fleet.metrics import FleetMetrics, ReplicaMetrics
from tests.fleet.controllers import AT_ONCE, RUNNING, WAITING, Clock, loads, replicas_of


@pytest.fixture
def clock():
    return Clock()


def keda(clock, *triggers, **options):
    return Keda(triggers or [PrometheusTrigger(WAITING, 10)], clock=clock, **options)


def test_keda_activates_at_a_poll_and_only_above_the_activation_threshold(clock):
    autoscaler = keda(clock, PrometheusTrigger(WAITING, 10, activation_threshold=2))
    # Polls are at 0, 30, 60 s; 2 is not strictly greater, and the 3 of 45 s waits for 60 s.
    assert replicas_of(autoscaler, clock, 0, [0, 0, 2, 3, 3]) == [0, 0, 0, 0, 1]


def test_from_one_on_the_hpa_decides_at_every_sync(clock):
    # Activated at 0 s; then the older cap: 4, 8, 16, and ceil(200 / 10).
    assert replicas_of(keda(clock), clock, 0, [200] * 6) == [1, 4, 8, 16, 20, 20]


def test_the_activation_threshold_is_no_part_of_the_hpa(clock):
    autoscaler = keda(clock, PrometheusTrigger(WAITING, 10, activation_threshold=50))
    assert replicas_of(autoscaler, clock, 1, [40], step_s=15) == [0]
    clock.now_s += 600
    autoscaler = keda(
        clock, PrometheusTrigger(WAITING, 10, activation_threshold=50), min_replica_count=1
    )
    assert replicas_of(autoscaler, clock, 1, [40]) == [4]


def test_going_to_zero_waits_for_the_cooldown_and_goes_there_directly(clock):
    # Active at the poll of 0 s; the polls of 30 to 270 s wait, that of 300 s does not.
    autoscaler = keda(clock, behavior=Behavior(scale_down=ScaleDown(3600)))
    assert replicas_of(autoscaler, clock, 8, [80] + [0] * 21) == [8] * 20 + [0] * 2


def test_the_cooldown_does_not_delay_the_hpa(clock):
    autoscaler = keda(clock, cooldown_period_s=600, behavior=AT_ONCE)
    assert replicas_of(autoscaler, clock, 8, [80, 40, 20]) == [8, 4, 2]


def test_with_a_minimum_the_operator_never_goes_to_zero(clock):
    autoscaler = keda(clock, min_replica_count=2)
    assert replicas_of(autoscaler, clock, 8, [80] + [0] * 40)[-1] == 2
    up_only = Behavior(scale_down=ScaleDown(select_policy="Disabled"))
    autoscaler = keda(clock, min_replica_count=2, behavior=up_only)
    assert replicas_of(autoscaler, clock, 8, [80] + [0] * 40)[-1] == 8
    assert keda(clock, min_replica_count=2).decide({WAITING: 0}, 0).replicas == 2


def test_activation_starts_the_minimum(clock):
    assert keda(clock, min_replica_count=3).decide({WAITING: 1}, 0).replicas == 3


def test_a_fleet_that_was_never_active_waits_for_the_initial_cooldown_only(clock):
    assert keda(clock).decide({WAITING: 0}, 3).replicas == 0
    autoscaler = keda(clock, initial_cooldown_period_s=60)
    assert replicas_of(autoscaler, clock, 3, [0] * 5) == [3, 3, 3, 3, 0]


def test_an_idle_fleet_goes_to_the_idle_count_and_back_to_the_minimum(clock):
    autoscaler = keda(clock, min_replica_count=4, idle_replica_count=0, cooldown_period_s=60)
    # Active at 0 s, to idle at 60 s, active again at the poll of 90 s.
    counts = replicas_of(autoscaler, clock, 6, [60, 0, 0, 0, 0, 5, 5, 5])
    assert counts == [6, 6, 6, 6, 0, 0, 4, 4]


def test_an_idle_count_above_zero_is_raised_again_by_the_hpa(clock):
    autoscaler = keda(clock, min_replica_count=3, idle_replica_count=1, cooldown_period_s=30)
    assert replicas_of(autoscaler, clock, 3, [30, 0, 0, 0, 0]) == [3, 3, 1, 3, 1]


def test_the_operator_polls_at_its_own_interval(clock):
    autoscaler = keda(clock, polling_interval_s=60)
    assert replicas_of(autoscaler, clock, 0, [0, 5, 5, 5, 5]) == [0, 0, 0, 0, 1]


def test_of_several_triggers_one_activates_and_the_largest_answer_wins(clock):
    triggers = PrometheusTrigger(WAITING, 10), PrometheusTrigger(RUNNING, 20)
    assert keda(clock, *triggers).decide({WAITING: 0, RUNNING: 1}, 0).replicas == 1
    assert keda(clock, *triggers).decide({WAITING: 50, RUNNING: 120}, 4).replicas == 6


def test_a_value_trigger_counts_ready_replicas(clock):
    autoscaler = keda(clock, PrometheusTrigger(WAITING, 10, metric_type="Value"))
    fleet = [ReplicaMetrics(str(i), i < 2) for i in range(4)]
    assert autoscaler.decide(FleetMetrics({WAITING: 30}, fleet), 4).replicas == 6


NO_NULLS = PrometheusTrigger(WAITING, 10, ignore_null_values=False)


def test_the_fallback_starts_after_so_many_failures_in_a_row(clock):
    autoscaler = keda(clock, NO_NULLS, fallback=Fallback(3, 6))
    # Three failures pass, the fourth reports 60.
    assert replicas_of(autoscaler, clock, 4, [40, {}, {}, {}, {}, {}]) == [4, 4, 4, 4, 6, 6]


@pytest.mark.parametrize(
    ("behavior", "few", "many"),
    [
        ("static", 6, 6),
        ("currentReplicas", 4, 9),
        ("currentReplicasIfHigher", 6, 9),
        ("currentReplicasIfLower", 4, 6),
    ],
)
def test_a_fallback_may_look_at_the_replicas_there_are(clock, behavior, few, many):
    for current, replicas in ((4, few), (9, many)):
        fallback = Fallback(1, 6, behavior)
        autoscaler = keda(clock, NO_NULLS, fallback=fallback, behavior=AT_ONCE)
        assert replicas_of(autoscaler, clock, current, [{}] * 5) == [current] + [replicas] * 4


def test_a_success_resets_the_failures(clock):
    autoscaler = keda(clock, NO_NULLS, fallback=Fallback(2, 6))
    seen = [40, {}, {}, 40, {}, {}, {}]
    assert replicas_of(autoscaler, clock, 4, seen) == [4, 4, 4, 4, 4, 4, 6]


def test_the_reason_of_a_fallback_says_so(clock):
    autoscaler = keda(clock, NO_NULLS, fallback=Fallback(0, 6))
    assert autoscaler.decide({}, 4).reason == (
        "fallback, num_requests_waiting failed 1 times: "
        "s0-num_requests_waiting 60, target 10 x 4 replicas: 6 wanted"
    )


def test_without_a_fallback_a_failure_moves_nothing_not_even_to_zero(clock):
    autoscaler = keda(clock, NO_NULLS)
    assert replicas_of(autoscaler, clock, 4, [40] + [{}] * 40) == [4] * 41


def test_a_fallback_of_zero_replicas_lets_a_failure_pass_for_inactivity(clock):
    autoscaler = keda(clock, NO_NULLS, fallback=Fallback(9, 0), initial_cooldown_period_s=60)
    assert replicas_of(autoscaler, clock, 4, [{}] * 5) == [4, 4, 4, 4, 0]


def test_at_zero_no_fallback_starts(clock):
    autoscaler = keda(clock, NO_NULLS, fallback=Fallback(1, 6))
    assert replicas_of(autoscaler, clock, 0, [{}] * 10) == [0] * 10


def test_a_null_that_is_ignored_is_zero_so_the_fallback_never_starts(clock):
    autoscaler = keda(clock, PrometheusTrigger(WAITING, 10), fallback=Fallback(3, 6))
    assert replicas_of(autoscaler, clock, 4, [40] + [{}] * 21)[-1] == 0


def test_one_failed_trigger_blocks_going_to_zero_and_down(clock):
    autoscaler = keda(clock, NO_NULLS, PrometheusTrigger(RUNNING, 10), behavior=AT_ONCE)
    seen = [{WAITING: 40, RUNNING: 40}] + [{RUNNING: 0}] * 30
    assert replicas_of(autoscaler, clock, 4, seen) == [4] * 31


def test_a_metric_that_only_replicas_report_never_activates(clock):
    # At zero nobody exposes the series: the trap of which the fix is the gateway's own queue.
    trigger = PrometheusTrigger(RUNNING, 10)
    assert replicas_of(keda(clock, trigger), clock, 0, [{WAITING: 50}] * 10) == [0] * 10


def test_keda_gives_reasons(clock):
    autoscaler = keda(clock)
    assert autoscaler.decide({WAITING: 0}, 0).reason == (
        "at zero: num_requests_waiting 0, activation_threshold 0"
    )
    clock.now_s += 30
    assert autoscaler.decide({WAITING: 3}, 0).reason == (
        "activated: num_requests_waiting 3 > activation_threshold 0"
    )
    clock.now_s += 300
    assert autoscaler.decide({WAITING: 0}, 2).reason == (
        "cooldown over, num_requests_waiting 0, activation_threshold 0"
    )


@given(loads, st.integers(0, 3), st.integers(0, 10))
def test_keda_stays_within_zero_or_its_minimum_and_its_maximum(seen, low, more):
    clock = Clock()
    high = max(1, low + more)
    autoscaler = keda(clock, NO_NULLS, min_replica_count=low, max_replica_count=high)
    seen = [{} if load is None else {WAITING: load} for load in seen]
    for replicas in replicas_of(autoscaler, clock, low, seen):
        assert low <= replicas <= high


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrometheusTrigger(WAITING, 0), "threshold must be"),
        (lambda: PrometheusTrigger(WAITING, 5, metric_type="Utilization"), "metric_type"),
        (lambda: Fallback(-1, 2), "failure_threshold"),
        (lambda: Keda([]), "triggers is empty"),
        (
            lambda: Keda([PrometheusTrigger(WAITING, 5)], 1, idle_replica_count=1),
            "idle_replica_count must be below min_replica_count, got 1 and 1",
        ),
        (
            lambda: Keda(
                [PrometheusTrigger(WAITING, 5, metric_type="Value")], fallback=Fallback(3, 2)
            ),
            "fallback needs metric_type AverageValue",
        ),
    ],
)
def test_what_keda_would_refuse_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ScaledObjects.

SPEC = {
    "scaleTargetRef": {"name": "llm"},
    "minReplicaCount": 0,
    "maxReplicaCount": 12,
    "pollingInterval": 15,
    "cooldownPeriod": 45,
    "fallback": {"failureThreshold": 1, "replicas": 6},
    "advanced": {
        "horizontalPodAutoscalerConfig": {
            "behavior": {
                "scaleUp": {
                    "stabilizationWindowSeconds": 0,
                    "policies": [{"type": "Pods", "value": 3, "periodSeconds": 15}],
                },
                "scaleDown": {"selectPolicy": "Disabled"},
            }
        }
    },
    "triggers": [
        {
            "type": "prometheus",
            "metricType": "AverageValue",
            "metadata": {
                "serverAddress": "http://prometheus:9090",
                "query": "sum(queue)",
                "threshold": "10",
                "activationThreshold": "2.5",
                "ignoreNullValues": "false",
            },
        }
    ],
}


def scaled_object(clock, **changes):
    return Keda.from_scaled_object({**SPEC, **changes}, {"sum(queue)": WAITING}, clock)


def test_a_scaled_object_says_it_all(clock):
    autoscaler = scaled_object(clock)
    seen = [2, 3, 100, 100, 500, 0, {}, {}]
    # 2 does not activate; 3 a sync; at most 12; down is disabled; the fallback of 6 is below.
    assert replicas_of(autoscaler, clock, 0, seen) == [0, 1, 4, 7, 10, 10, 10, 10]
    assert replicas_of(autoscaler, clock, 10, [500, 0, 0, 0]) == [12, 12, 12, 0]


def test_the_fallback_of_a_scaled_object(clock):
    assert replicas_of(scaled_object(clock), clock, 4, [{}, {}]) == [4, 6]


def test_a_fallback_that_keeps_what_runs(clock):
    fallback = {"failureThreshold": 1, "replicas": 6, "behavior": "currentReplicasIfHigher"}
    autoscaler = scaled_object(clock, fallback=fallback)
    assert replicas_of(autoscaler, clock, 9, [{}] * 3) == [9, 9, 9]


def test_what_a_scaled_object_leaves_out_has_kedas_defaults(clock):
    triggers = [
        {"type": "prometheus", "metadata": {"query": "sum(queue)", "threshold": "10"}},
    ]
    bare = Keda.from_scaled_object({"triggers": triggers}, {"sum(queue)": WAITING}, clock)
    assert (bare.min_replica_count, bare.polling_interval_s, bare.cooldown_period_s) == (0, 30, 300)
    assert replicas_of(bare, clock, 0, [10000] * 9)[-1] == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pollInterval": 5}, "spec has 'pollInterval', which is not modelled"),
        ({"triggers": []}, "triggers is empty"),
        ({"triggers": [{"type": "cpu", "metadata": {}}]}, "unknown type of trigger 'cpu'"),
        ({"triggers": [{"type": "prometheus"}]}, "trigger lacks 'metadata'"),
        (
            {"triggers": [{"type": "prometheus", "metadata": {"query": "sum(queue)"}}]},
            "metadata lacks 'threshold'",
        ),
        (
            {"triggers": [{"type": "prometheus", "metadata": {"query": "x", "threshold": "1"}}]},
            "metric_of_query lacks the query 'x'",
        ),
        ({"fallback": {"replicas": 2}}, "fallback lacks 'failureThreshold'"),
        ({"advanced": {"scalingModifiers": {}}}, "advanced has 'scalingModifiers'"),
        (
            {"fallback": {"failureThreshold": 1, "replicas": 2, "behavior": "scalingModifiers"}},
            "unknown behavior of a fallback 'scalingModifiers'; known are static",
        ),
    ],
)
def test_a_scaled_object_that_is_not_understood_is_refused(clock, changes, message):
    with pytest.raises(ValueError, match=message):
        scaled_object(clock, **changes)


def test_how_to_make_one_travels_between_processes(clock):
    make = functools.partial(Keda, [PrometheusTrigger(WAITING, 10)], fallback=Fallback(3, 2))
    assert pickle.loads(pickle.dumps(make))(clock=clock).decide({WAITING: 50}, 2).replicas == 4
