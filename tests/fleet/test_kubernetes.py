import functools
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.fleet.kubernetes import (
    Behavior,
    ExternalMetric,
    HorizontalPodAutoscaler,
    PodsMetric,
    ScaleDown,
    ScaleUp,
    ScalingPolicy,
)
from course_lib.fleet.metrics import FleetMetrics, ReplicaMetrics
from tests.fleet.controllers import AT_ONCE, RUNNING, WAITING, Clock, loads, pods, replicas_of


@pytest.fixture
def clock():
    return Clock()


def hpa(clock, *metrics, **options):
    options = {"max_replicas": 1000, **options}
    return HorizontalPodAutoscaler(
        metrics or [ExternalMetric(WAITING, average_value=10)], clock=clock, **options
    )


# The ratio and the tolerance.


@pytest.mark.parametrize(
    ("total", "current", "replicas"),
    [
        (40, 4, 4),  # at target
        (41, 4, 4),  # 1.025
        (44, 4, 4),  # 1.1 is still within
        (45, 4, 5),  # 1.125; ceil(4.5)
        (44.1, 4, 5),
        (35, 4, 4),  # 0.875, but ceil(3.5) is 4
        (90, 10, 10),  # 0.9 is still within
        (89, 10, 9),
        (30, 4, 3),
        (0, 4, 1),  # the minimum
        (200, 4, 20),
    ],
)
def test_an_average_value_asks_for_total_over_target_outside_the_tolerance(
    clock, total, current, replicas
):
    behavior = Behavior(ScaleUp(policies=[ScalingPolicy("Pods", 100, 15)]), AT_ONCE.scale_down)
    autoscaler = hpa(clock, behavior=behavior)
    assert autoscaler.decide({WAITING: total}, current).replicas == replicas


def test_the_tolerance_is_an_option(clock):
    assert hpa(clock, tolerance=0.5).decide({WAITING: 60}, 4).replicas == 4
    assert hpa(clock, tolerance=0).decide({WAITING: 41}, 4).replicas == 5


def test_replicas_that_are_still_loading_do_not_compound_with_an_average_value(clock):
    counts = replicas_of(hpa(clock), clock, 4, [{WAITING: 80, "num_replicas_ready": 4}] * 5)
    assert counts == [8, 8, 8, 8, 8]


@pytest.mark.parametrize(
    ("total", "ready", "current", "replicas"),
    [
        (20, 4, 4, 8),  # twice the target
        (20, 4, 6, 8),  # two are loading: 2 x 4, not 2 x 6
        (11, 4, 4, 4),  # 1.1 is within
        (12, 4, 4, 5),  # ceil(4.8)
        (12, 3, 4, 4),  # ceil(3.6)
    ],
)
def test_a_value_multiplies_the_replicas_that_are_ready(clock, total, ready, current, replicas):
    autoscaler = hpa(clock, ExternalMetric(WAITING, value=10))
    seen = {WAITING: total, "num_replicas_ready": ready}
    assert autoscaler.decide(seen, current).replicas == replicas
    fleet = [ReplicaMetrics(str(i), i < ready) for i in range(current)]
    autoscaler = hpa(clock, ExternalMetric(WAITING, value=10))
    assert autoscaler.decide(FleetMetrics({WAITING: total}, fleet), current).replicas == replicas


def test_without_word_of_readiness_all_replicas_are_ready(clock):
    autoscaler = hpa(clock, ExternalMetric(WAITING, value=10))
    assert autoscaler.decide({WAITING: 20}, 3).replicas == 6


def test_amounts_are_compared_in_thousandths_so_that_rounding_asks_for_nobody(clock):
    # In floats (0.1 + 0.2) / 0.1 is above 3.
    autoscaler = hpa(clock, ExternalMetric("load", average_value=0.1))
    assert autoscaler.decide({"load": 0.1 + 0.2}, 2).replicas == 3


def test_metrics_joined_by_a_plus_are_added(clock):
    autoscaler = hpa(clock, ExternalMetric(f"{WAITING} + {RUNNING}", average_value=10))
    assert autoscaler.decide({WAITING: 20, RUNNING: 41}, 4).replicas == 7
    assert "could not be measured" in autoscaler.decide({WAITING: 20}, 4).reason


def test_waiting_alone_asks_for_the_minimum_while_every_replica_is_full(clock):
    full = {WAITING: 0, RUNNING: 80}
    alone = hpa(clock, behavior=AT_ONCE)
    both = hpa(clock, ExternalMetric(f"{WAITING} + {RUNNING}", average_value=10), behavior=AT_ONCE)
    assert replicas_of(alone, clock, 8, [full])[-1] == 1
    assert replicas_of(both, clock, 8, [full])[-1] == 8


# Metrics of each replica. The target is 0.5 throughout.


@pytest.mark.parametrize(
    ("fleet", "current", "replicas"),
    [
        (pods(1.0, 1.0), 2, 4),  # ratio 2
        (pods(0.6, 0.6, 0.6), 3, 4),  # ratio 1.2, ceil(3.6)
        (pods(0.55, 0.55), 2, 2),  # 1.1 is within
        (pods(0.2, 0.2, 0.2, 0.2), 4, 2),  # ratio 0.4, ceil(1.6)
        # Down, one without a value counts as at target: (0.2 + 0.2 + 0.2 + 0.5) / 0.5 = 2.2.
        (pods(0.2, 0.2, 0.2, None), 4, 3),
        # Up, it counts as zero: 3 / 0.5 over four.
        (pods(1.0, 1.0, 1.0, None), 4, 6),
        # Up, loading ones count as zero: 2 / 0.5 = 4 for the four there are, ratio 1.
        (pods(1.0, 1.0, loading=2), 4, 4),
        (pods(1.0, 1.0, loading=1), 3, 4),
        # Down, loading ones are not counted: 0.2 x 2 / 0.5 = 0.8.
        (pods(0.2, 0.2, loading=2), 4, 1),
        # Up, with the loading one as zero 9 x 0.6 / 10 is 1.08 of the target: within.
        (pods(*[0.6] * 9, loading=1), 10, 10),
        # Up, but with the silent ones as zero 2 replicas would do: turned round.
        (pods(1.0, None, None), 3, 3),
        (pods(1.0, loading=2), 3, 3),
        # Ratio 0.8 and with the silent ones at target 0.92, within the tolerance.
        (pods(0.4, 0.4, None, None, None), 5, 5),
        # At target with a silent one: no direction, no change.
        (pods(0.5, 0.5, None, None), 4, 4),
    ],
)
def test_a_metric_of_each_replica(clock, fleet, current, replicas):
    autoscaler = hpa(clock, PodsMetric("kv_cache_utilization", 0.5), behavior=AT_ONCE)
    assert autoscaler.decide(fleet, current).replicas == replicas


@pytest.mark.parametrize("fleet", [pods(None, None), pods(loading=2), {}, FleetMetrics({})])
def test_a_metric_that_no_ready_replica_reports_moves_nothing(clock, fleet):
    autoscaler = hpa(clock, PodsMetric("kv_cache_utilization", 0.5))
    decision = autoscaler.decide(fleet, 2)
    assert decision.replicas == 2
    assert decision.reason == "kv_cache_utilization could not be measured: nothing moves"


# Several metrics.


def two(clock):
    return hpa(
        clock,
        ExternalMetric(WAITING, average_value=10),
        ExternalMetric(RUNNING, average_value=20),
        behavior=AT_ONCE,
    )


@pytest.mark.parametrize(
    ("waiting", "running", "replicas"),
    [(60, 100, 6), (40, 140, 7), (10, 40, 2), (0, 100, 5)],
)
def test_the_largest_answer_wins(clock, waiting, running, replicas):
    assert two(clock).decide({WAITING: waiting, RUNNING: running}, 4).replicas == replicas


@pytest.mark.parametrize(
    ("seen", "replicas"),
    [
        ({RUNNING: 20}, 4),  # would be 1
        ({RUNNING: 140}, 7),
        ({WAITING: float("nan"), RUNNING: 20}, 4),
        ({WAITING: float("inf"), RUNNING: 20}, 4),
        ({}, 4),
    ],
)
def test_a_metric_that_failed_blocks_scaling_down_only(clock, seen, replicas):
    assert two(clock).decide(seen, 4).replicas == replicas


def test_the_reason_names_the_metric_that_failed(clock):
    assert two(clock).decide({RUNNING: 20}, 4).reason == (
        "num_requests_running 20, target 20 x 4 replicas: 1 wanted, "
        "but num_requests_waiting could not be measured: no scaling down"
    )


# Stabilization.


def test_down_waits_until_the_highest_recommendation_of_300_s_has_left(clock):
    counts = replicas_of(hpa(clock), clock, 8, [80] + [10] * 25)
    assert counts == [8] * 20 + [1] * 6  # the 80 was at 0 s, the first 1 comes at 300 s


def test_down_goes_to_the_highest_of_the_window_not_to_the_last(clock):
    counts = replicas_of(hpa(clock), clock, 8, [80] * 2 + [40] * 3 + [10] * 22)
    # 8 was asked for until 15 s, 4 until 60 s.
    assert counts == [8] * 21 + [4] * 3 + [1] * 3


def test_the_replicas_at_the_start_count_as_a_recommendation(clock):
    assert replicas_of(hpa(clock), clock, 8, [10] * 21) == [8] * 20 + [1]


def test_up_is_immediate_by_default_and_the_lowest_of_its_window_otherwise(clock):
    assert replicas_of(hpa(clock), clock, 4, [40, 80])[-1] == 8
    slow = hpa(clock, behavior=Behavior(ScaleUp(stabilization_window_seconds=60)))
    # 40 is asked for at 0 s, 60 until 45 s, 80 from 60 s on; each is forgotten in 60 s.
    counts = replicas_of(slow, clock, 4, [40, 60, 60, 60, 80, 80, 80, 80, 80])
    assert counts == [4, 4, 4, 4, 6, 6, 6, 8, 8]


def test_a_spike_shorter_than_the_up_window_starts_nothing(clock):
    slow = hpa(clock, behavior=Behavior(ScaleUp(stabilization_window_seconds=60)))
    assert replicas_of(slow, clock, 4, [40, 400, 400, 400, 40, 40]) == [4] * 6


def test_a_swing_within_the_windows_leaves_the_replicas_where_they_are(clock):
    calm = hpa(clock, behavior=Behavior(ScaleUp(stabilization_window_seconds=300)))
    assert set(replicas_of(calm, clock, 4, [20, 80] * 8)) == {4}


# Rates.


def test_with_behavior_the_default_adds_four_or_doubles_each_15_s(clock):
    assert replicas_of(hpa(clock, behavior=Behavior()), clock, 1, [1000] * 7) == [
        5,
        10,
        20,
        40,
        80,
        100,
        100,
    ]


def test_without_behavior_an_older_cap_doubles_but_reaches_four_at_once(clock):
    assert replicas_of(hpa(clock), clock, 1, [300] * 6) == [4, 8, 16, 30, 30, 30]


def test_more_frequent_syncs_do_not_scale_faster_than_the_policy(clock):
    counts = replicas_of(hpa(clock, behavior=Behavior()), clock, 1, [1000] * 7, step_s=5)
    assert counts == [5, 5, 5, 10, 10, 10, 20]


def test_a_policy_counts_the_changes_of_its_whole_period(clock):
    behavior = Behavior(ScaleUp(policies=[ScalingPolicy("Pods", 3, 60)]))
    autoscaler = hpa(clock, behavior=behavior)
    # 2 are added at 0 s and 1 at 15 s; the two are forgotten at 60 s, the one at 75 s.
    seen = [30, 100, 100, 100, 100, 100, 100]
    assert replicas_of(autoscaler, clock, 1, seen) == [3, 4, 4, 4, 6, 7, 7]


def test_removals_within_the_period_give_room_to_add(clock):
    behavior = Behavior(
        ScaleUp(policies=[ScalingPolicy("Pods", 1, 60)]), ScaleDown(stabilization_window_seconds=0)
    )
    # The period started with 6; 3 left, so 6 + 1 are allowed.
    assert replicas_of(hpa(clock, behavior=behavior), clock, 6, [30, 100]) == [3, 7]


def test_what_was_taken_too_much_is_not_given_back(clock):
    behavior = Behavior(
        ScaleUp(policies=[ScalingPolicy("Pods", 6, 15)]),
        ScaleDown(0, "Max", [ScalingPolicy("Pods", 1, 60)]),
    )
    # 6 are added at 0 s, so the period started with 5 and may end with 4. At 60 s the 6 are
    # forgotten and the 7 that left are not: 11 at the start, 10 allowed, and 4 stay 4.
    counts = replicas_of(hpa(clock, behavior=behavior), clock, 5, [110, 0, 0, 0, 0, 0])
    assert counts == [11, 4, 4, 4, 4, 3]


@pytest.mark.parametrize(
    ("select", "counts"),
    [("Max", [20, 40]), ("Min", [14, 18]), ("Disabled", [10, 10]), ("max", [20, 40])],
)
def test_select_policy_going_up(clock, select, counts):
    behavior = Behavior(ScaleUp(select_policy=select))
    assert replicas_of(hpa(clock, behavior=behavior), clock, 10, [2000] * 2) == counts


@pytest.mark.parametrize(
    ("select", "counts"), [("Max", [10, 5, 1]), ("Min", [16, 12, 8]), ("Disabled", [20, 20, 20])]
)
def test_select_policy_going_down(clock, select, counts):
    policies = [ScalingPolicy("Pods", 4, 15), ScalingPolicy("Percent", 50, 15)]
    behavior = Behavior(scale_down=ScaleDown(0, select, policies))
    # Max: half of 20, half of 10, then 4 fewer. Min: 4 fewer, 4 fewer, 4 fewer.
    assert replicas_of(hpa(clock, behavior=behavior), clock, 20, [0] * 3) == counts


def test_percent_rounds_up_going_up_and_what_stays_down_going_down(clock):
    up = Behavior(ScaleUp(policies=[ScalingPolicy("Percent", 10, 15)]))
    assert replicas_of(hpa(clock, behavior=up), clock, 1, [990] * 3) == [2, 3, 4]
    down = Behavior(scale_down=ScaleDown(0, "Max", [ScalingPolicy("Percent", 10, 15)]))
    assert replicas_of(hpa(clock, behavior=down), clock, 15, [0] * 3) == [13, 11, 9]


def test_stabilization_comes_before_the_rate(clock):
    behavior = Behavior(
        scale_down=ScaleDown(60, "Max", [ScalingPolicy("Pods", 1, 15)]),
    )
    # 3 are allowed from 60 s on and 1 from 75 s on, one at a time.
    counts = replicas_of(hpa(clock, behavior=behavior), clock, 6, [60, 30] + [10] * 8)
    assert counts == [6, 6, 6, 6, 5, 4, 3, 2, 1, 1]


# Limits.


def test_replicas_stay_within_the_limits(clock):
    autoscaler = hpa(clock, min_replicas=2, max_replicas=6, behavior=AT_ONCE)
    assert replicas_of(autoscaler, clock, 4, [1000, 1000, 0, 0]) == [6, 6, 2, 2]


@pytest.mark.parametrize(("current", "replicas"), [(9, 6), (1, 2)])
def test_replicas_outside_the_limits_are_brought_back_whatever_the_metrics_say(
    clock, current, replicas
):
    autoscaler = hpa(clock, min_replicas=2, max_replicas=6)
    assert autoscaler.decide({}, current).replicas == replicas


def test_at_zero_replicas_it_is_disabled(clock):
    decision = hpa(clock).decide({WAITING: 1000}, 0)
    assert (decision.replicas, decision.reason) == (0, "disabled: there are 0 replicas")


@pytest.mark.parametrize("target", [{"average_value": 10}, {"value": 10}])
def test_with_a_minimum_of_zero_it_scales_from_zero(clock, target):
    autoscaler = hpa(clock, ExternalMetric(WAITING, **target), min_replicas=0)
    assert autoscaler.decide({WAITING: 0}, 0).replicas == 0
    assert autoscaler.decide({WAITING: 25}, 0).replicas == 3


def test_the_reason_tells_metric_value_target_and_what_held_it(clock):
    autoscaler = hpa(clock)
    assert autoscaler.decide({WAITING: 300}, 1).reason == (
        "num_requests_waiting 300, target 10 x 1 replicas: 30 wanted; 4 by the limit of change"
    )
    clock.now_s += 15
    assert autoscaler.decide({WAITING: 10}, 4).reason == (
        "num_requests_waiting 10, target 10 x 4 replicas: 1 wanted; 4 by the stabilization window"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": []}, "metrics is empty"),
        ({"min_replicas": 5, "max_replicas": 4}, "max_replicas must be a whole number of at least"),
        ({"tolerance": -0.1}, "tolerance must be a number at least 0"),
    ],
)
def test_an_hpa_that_kubernetes_would_refuse_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        HorizontalPodAutoscaler(**{"metrics": [ExternalMetric(WAITING, 10)], **arguments})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExternalMetric(WAITING), "average_value .* or value .* got neither"),
        (lambda: ExternalMetric(WAITING, 1, 2), "average_value"),
        (lambda: ExternalMetric(WAITING, 0), "average_value must be a number at least 0.001"),
        (lambda: PodsMetric(WAITING, 0), "average_value must be"),
        (lambda: ScalingPolicy("Replicas", 1, 15), "unknown type 'Replicas'; known are Pods"),
        (lambda: ScalingPolicy("Pods", 0, 15), "value must be a whole number of at least 1"),
        (lambda: ScalingPolicy("Pods", 1, 1801), "period_seconds must be .* 1 to 1800"),
        (lambda: ScaleUp(3601), "stabilization_window_seconds must be .* 0 to 3600"),
        (lambda: ScaleUp(policies=[]), "policies is empty"),
        (lambda: ScaleDown(select_policy="Average"), "unknown select_policy"),
    ],
)
def test_a_specification_that_would_be_refused_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Properties.

policies = st.lists(
    st.builds(
        ScalingPolicy, st.sampled_from(["Pods", "Percent"]), st.integers(1, 200), st.integers(1, 60)
    ),
    min_size=1,
    max_size=3,
)
selects = st.sampled_from(["Max", "Min", "Disabled"])
windows = st.sampled_from([0, 15, 40, 120])
behaviors = st.one_of(
    st.none(),
    st.builds(
        Behavior,
        st.builds(ScaleUp, windows, selects, policies),
        st.builds(ScaleDown, windows, selects, policies),
    ),
)


@given(loads, behaviors, st.integers(1, 5), st.integers(0, 20))
def test_replicas_are_always_within_the_limits(seen, behavior, low, more):
    clock = Clock()
    autoscaler = hpa(clock, behavior=behavior, min_replicas=low, max_replicas=low + more)
    seen = [{} if load is None else {WAITING: load} for load in seen]
    assert all(low <= n <= low + more for n in replicas_of(autoscaler, clock, low, seen))


@given(loads, behaviors, st.integers(1, 30))
def test_it_never_scales_down_while_a_metric_failed(seen, behavior, current):
    clock = Clock()
    autoscaler = hpa(
        clock,
        ExternalMetric(WAITING, 10),
        ExternalMetric(RUNNING, 10),
        behavior=behavior,
    )
    for load in seen:
        metrics = {RUNNING: 0} if load is None else {RUNNING: 0, WAITING: load}
        replicas = autoscaler.decide(metrics, current).replicas
        assert load is not None or replicas >= current
        current = replicas
        clock.now_s += 15


@given(st.lists(st.integers(0, 400), min_size=1, max_size=40), behaviors, st.integers(1, 30))
def test_scaling_down_never_goes_below_what_the_window_asked_for(seen, behavior, current):
    clock = Clock()
    autoscaler = hpa(clock, behavior=behavior)
    window_s = behavior.scale_down.stabilization_window_seconds if behavior else 300
    asked = [(clock.now_s, current)]
    for load in seen:
        within = current * 9 <= load <= current * 11
        asked.append((clock.now_s, current if within else -(-load // 10)))
        replicas = autoscaler.decide({WAITING: load}, current).replicas
        recent = [n for asked_s, n in asked if clock.now_s - asked_s < window_s]
        assert replicas >= current or replicas >= max([*recent, 1])
        current = replicas
        clock.now_s += 15


@pytest.mark.parametrize(
    ("make", "replicas"),
    [
        (
            functools.partial(HorizontalPodAutoscaler, [ExternalMetric(WAITING, 10)], 1, 9),
            4,
        ),
        (
            functools.partial(
                HorizontalPodAutoscaler, [PodsMetric(WAITING, 10)], 1, 9, behavior=Behavior()
            ),
            5,
        ),
    ],
)
def test_how_to_make_one_travels_between_processes(clock, make, replicas):
    made = pickle.loads(pickle.dumps(make))(clock=clock)
    seen = FleetMetrics({WAITING: 50}, pods(25, 25, name=WAITING).replicas)
    assert made.decide(seen, 2).replicas == replicas
