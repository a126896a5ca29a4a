import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.fleet.kubernetes import (
    Behavior,
    ExternalMetric,
    HorizontalPodAutoscaler,
    ScaleUp,
    ScalingPolicy,
)
from course_lib.fleet.proportional import ProportionalAutoscaler
from course_lib.fleet.proportional_base import StabilizationWindow, replicas_for_load


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def load(waiting=0.0, running=0.0, cache=0.0, ready=1.0):
    return {
        "num_requests_waiting": waiting,
        "num_requests_running": running,
        "kv_cache_utilization": cache,
        "num_replicas_ready": ready,
    }


def test_a_full_fleet_without_a_queue_is_not_idle():
    assert replicas_for_load(load(waiting=0, running=20), 5, target_per_replica=4) == 5


def test_the_worked_example_of_100_users_asks_for_all_20_at_once():
    assert replicas_for_load(load(waiting=95, running=5), 1, target_per_replica=5) == 20


@pytest.mark.parametrize(("requests", "expected"), [(36, 10), (44, 10), (45, 12), (35, 9)])
def test_a_load_within_the_tolerance_changes_nothing(requests, expected):
    assert replicas_for_load(load(running=requests), 10, target_per_replica=4) == expected


def test_the_kv_cache_counts_for_the_ready_replicas_alone():
    assert replicas_for_load(load(cache=0.9, ready=1), 1, 4) == 2
    assert replicas_for_load(load(cache=0.9, ready=1), 2, 4) == 2


def test_a_cache_at_its_target_needs_no_more_whatever_floats_say():
    assert 3 * 0.8 / 0.8 > 3
    assert replicas_for_load(load(cache=0.8, ready=3), 3, 4, tolerance=0) == 3


def test_the_window_goes_up_at_once_and_down_to_the_most_that_was_wanted():
    clock = Clock()
    window = StabilizationWindow(60, clock)
    assert window.stabilize(8, 2) == 8
    clock.now_s = 30
    assert window.stabilize(3, 8) == 8
    clock.now_s = 60  # the 8 is as old as the window
    assert window.stabilize(2, 8) == 3
    clock.now_s = 90
    assert window.stabilize(2, 3) == 2


def test_a_metric_that_is_missing_makes_nothing_smaller():
    scaler = ProportionalAutoscaler(window_s=0)
    known = load(waiting=0, running=4)
    assert scaler.decide(known, 5).replicas == 1
    del known["num_requests_waiting"]
    decision = scaler.decide(known, 5)
    assert decision.replicas == 5
    assert "num_requests_waiting could not be measured" in decision.reason
    assert scaler.decide({"num_requests_running": 40.0}, 5).replicas == 10


def test_the_reason_says_what_was_needed_and_which_limit_held():
    decision = ProportionalAutoscaler(max_replicas=6).decide(load(waiting=36, running=4), 2)
    assert decision.replicas == 6
    assert decision.reason.startswith("max_replicas 6; num_requests_waiting 36")
    assert "10 needed" in decision.reason


@given(
    st.lists(
        st.tuples(st.sampled_from([15, 30, 120]), st.integers(0, 200)), min_size=1, max_size=30
    )
)
def test_it_agrees_with_kubernetes_hpa_on_the_same_metric_where_rates_do_not_bind(samples):
    clock = Clock()
    free = Behavior(scale_up=ScaleUp(policies=(ScalingPolicy("Pods", 1000, 15),)))
    metric = ExternalMetric("num_requests_waiting + num_requests_running", average_value=4)
    hpa = HorizontalPodAutoscaler([metric], 1, 20, free, clock=clock)
    ours = ProportionalAutoscaler(target_per_replica=4, window_s=300, clock=clock)
    current = 1
    for passed_s, requests in samples:
        # The HPA remembers where it began; from one replica on that is the minimum.
        metrics = load(waiting=requests)
        wanted = hpa.decide(metrics, current).replicas
        assert ours.decide(metrics, current).replicas == wanted
        current = wanted
        clock.now_s += passed_s
