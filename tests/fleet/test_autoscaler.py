import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.fleet.autoscaler import GPUAutoscaler, ScalingDecision

CALM = {
    "num_requests_waiting": 2,
    "num_requests_running": 8,
    "kv_cache_utilization": 0.5,
    "ttft_p95_ms": 500,
}
SPIKE = {
    "num_requests_waiting": 42,
    "num_requests_running": 8,
    "kv_cache_utilization": 0.72,
    "ttft_p95_ms": 1200,
}
QUIET = {
    "num_requests_waiting": 0,
    "num_requests_running": 1,
    "kv_cache_utilization": 0.12,
    "ttft_p95_ms": 450,
}


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def test_a_spike_takes_one_more():
    decision = GPUAutoscaler(cooldown_s=0).decide(SPIKE, 4)
    assert decision == ScalingDecision(5, "num_requests_waiting 42 > 10")


def test_cache_pressure_takes_one_more():
    pressed = {
        "num_requests_waiting": 2,
        "num_requests_running": 7,
        "kv_cache_utilization": 0.91,
        "ttft_p95_ms": 900,
    }
    decision = GPUAutoscaler(cooldown_s=0).decide(pressed, 5)
    assert decision == ScalingDecision(6, "kv_cache_utilization 0.91 > 0.85")


def test_slow_first_tokens_take_one_more():
    decision = GPUAutoscaler().decide({**CALM, "ttft_p95_ms": 1501}, 3)
    assert decision == ScalingDecision(4, "ttft_p95_ms 1501 > 1500")


def test_a_quiet_fleet_gives_one_back():
    decision = GPUAutoscaler(cooldown_s=0).decide(QUIET, 5)
    assert decision.replicas == 4
    assert decision.reason.startswith("quiet")


@pytest.mark.parametrize(
    "change",
    [
        {"num_requests_waiting": 10},
        {"kv_cache_utilization": 0.85},
        {"ttft_p95_ms": 1500},
    ],
)
def test_a_signal_at_its_limit_is_not_above_it(change):
    assert GPUAutoscaler().recommend({**CALM, **change}, 3) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"num_requests_waiting": 1},
        {"num_requests_running": 3},
        {"kv_cache_utilization": 0.20},
    ],
)
def test_one_signal_that_is_not_low_keeps_the_replicas(change):
    assert GPUAutoscaler().recommend({**QUIET, **change}, 5) == 5


def test_the_first_call_is_never_inside_a_cooldown(clock):
    clock.now_s = 0.0
    assert GPUAutoscaler(clock=clock).recommend(SPIKE, 4) == 5


@pytest.mark.parametrize("first", [SPIKE, QUIET])
@pytest.mark.parametrize("second", [SPIKE, QUIET])
def test_the_cooldown_counts_from_the_last_change_in_either_direction(clock, first, second):
    scaler = GPUAutoscaler(cooldown_s=300, clock=clock)
    replicas = scaler.recommend(first, 4)
    assert replicas != 4

    clock.now_s += 299
    held = scaler.decide(second, replicas)
    assert held.replicas == replicas
    assert held.reason.startswith("cooldown, 299 s of 300 s passed; otherwise")
    clock.now_s += 1
    assert scaler.recommend(second, replicas) != replicas


def test_a_decision_that_changes_nothing_starts_no_cooldown(clock):
    scaler = GPUAutoscaler(max_replicas=4, clock=clock)
    assert scaler.recommend(CALM, 4) == 4
    assert scaler.decide(SPIKE, 4) == ScalingDecision(
        4, "max_replicas 4; num_requests_waiting 42 > 10"
    )
    assert scaler.recommend(QUIET, 4) == 3


def test_replicas_stay_within_the_bounds():
    scaler = GPUAutoscaler(min_replicas=2, max_replicas=6, cooldown_s=0)
    assert scaler.recommend(QUIET, 2) == 2
    assert scaler.recommend(CALM, 0) == 2
    assert scaler.recommend(CALM, 9) == 6


metrics = st.fixed_dictionaries(
    {
        "num_requests_waiting": st.integers(0, 50),
        "num_requests_running": st.integers(0, 50),
        "kv_cache_utilization": st.floats(0, 1),
        "ttft_p95_ms": st.floats(0, 5000),
    }
)


@given(st.lists(st.tuples(metrics, st.floats(0, 400)), max_size=30))
def test_changes_are_single_steps_within_bounds_and_a_cooldown_apart(day):
    clock = Clock()
    scaler = GPUAutoscaler(2, 5, cooldown_s=300, clock=clock)
    replicas, last_change_s = 3, -math.inf
    for now, passed_s in day:
        clock.now_s += passed_s
        wanted = scaler.recommend(now, replicas)
        assert 2 <= wanted <= 5
        assert abs(wanted - replicas) <= 1
        if wanted != replicas:
            assert clock.now_s - last_change_s >= 300
            replicas, last_change_s = wanted, clock.now_s


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ttft_p95_ms": math.nan}, "ttft_p95_ms must be a number at least 0, got nan"),
        ({"num_requests_waiting": -1}, "num_requests_waiting must be a number at least 0"),
        ({"num_requests_running": True}, "num_requests_running must be a number"),
        ({"kv_cache_utilization": 91}, "kv_cache_utilization .* at most 1, got 91"),
        ({"kv_cache_utilization": "0.9"}, "kv_cache_utilization must be a number"),
    ],
)
def test_bad_metrics_are_refused_and_change_nothing(change, message, clock):
    scaler = GPUAutoscaler(clock=clock)
    with pytest.raises(ValueError, match=message):
        scaler.decide({**SPIKE, **change}, 4)
    assert scaler.recommend(SPIKE, 4) == 5  # no cooldown has begun


def test_a_missing_metric_is_named():
    with pytest.raises(ValueError, match="metrics lack ttft_p95_ms; expected num_requests_waiting"):
        GPUAutoscaler().decide({key: SPIKE[key] for key in list(SPIKE)[:3]}, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_replicas": 5, "max_replicas": 4}, "min_replicas must be at most max_replicas"),
        ({"min_replicas": 0}, "min_replicas must be a whole number of at least 1"),
        ({"max_replicas": 2.5}, "max_replicas must be a whole number"),
        ({"cooldown_s": -1}, "cooldown_s must be a number at least 0"),
        ({"cooldown_s": math.nan}, "cooldown_s must be a number at least 0"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GPUAutoscaler(**arguments)


@pytest.mark.parametrize("current", [-1, 2.5, True, "4"])
def test_a_bad_count_of_replicas_is_refused(current):
    with pytest.raises(ValueError, match="current_replicas must be a whole number of at least 0"):
        GPUAutoscaler().decide(CALM, current)
