import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.fleet.cold_start import CapacityPlan, Readiness, capacity_plan, readiness

PHASES = {"node provisioning": 95, "container pull": 22, "weight loading": 78, "runtime warmup": 12}


@pytest.mark.parametrize(
    ("warm", "plan"),
    [
        (1, CapacityPlan(20, 19, 95)),
        (3, CapacityPlan(20, 17, 85)),
        (20, CapacityPlan(20, 0, 0)),
        (30, CapacityPlan(20, 0, 0)),
    ],
)
def test_a_hundred_users_at_five_a_replica(warm, plan):
    assert capacity_plan(100, 5, warm) == plan


@given(st.integers(0, 500), st.integers(1, 20), st.integers(0, 60))
def test_the_target_serves_everyone_and_one_fewer_would_not(requests, per_replica, warm):
    plan = capacity_plan(requests, per_replica, warm)
    assert (plan.target_replicas - 1) * per_replica < max(1, requests)
    assert plan.target_replicas * per_replica >= requests
    started = plan.replicas_to_start * per_replica
    assert plan.requests_waiting_for_cold_capacity <= started


def test_two_minutes_are_too_short_and_four_are_enough():
    assert readiness(PHASES, 120) == Readiness(207, -87, False)
    assert readiness(PHASES, 240) == Readiness(207, 33, True)
    assert readiness(PHASES, 207).ready_before_surge


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: capacity_plan(-1, 5, 1), "concurrent_requests must be a whole number"),
        (lambda: capacity_plan(100, 0, 1), "requests_per_replica must be .* at least 1, got 0"),
        (lambda: capacity_plan(100, 5, -1), "warm_replicas must be a whole number"),
        (lambda: capacity_plan(100, True, 1), "requests_per_replica must be a whole number"),
        (lambda: readiness({}, 120), "phase_seconds must have at least one phase"),
        (lambda: readiness({"pull": -1}, 120), r"phase_seconds\['pull'\] must be a number"),
        (lambda: readiness({"pull": math.nan}, 120), r"phase_seconds\['pull'\] must be a number"),
        (lambda: readiness(PHASES, "240"), "lead_time_s must be a number at least 0"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
