import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.fleet.cold_start import (
    LEVERS,
    PHASES,
    CapacityPlan,
    ColdStart,
    Duration,
    Readiness,
    capacity_plan,
    readiness,
)

MEASURED = {
    "node provisioning": 95,
    "container pull": 22,
    "weight loading": 78,
    "runtime warmup": 12,
}


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
    assert readiness(MEASURED, 120) == Readiness(207, -87, False)
    assert readiness(MEASURED, 240) == Readiness(207, 33, True)
    assert readiness(MEASURED, 207).ready_before_surge


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
        (lambda: readiness(MEASURED, "240"), "lead_time_s must be a number at least 0"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_draws_have_the_quantiles_they_were_asked_for():
    draws = Duration(60, 150).draws(np.random.default_rng(1), 50_000)
    assert np.quantile(draws, [0.5, 0.95]) == pytest.approx([60, 150], rel=0.02)
    assert np.mean(draws < 60) == pytest.approx(0.5, abs=0.01)
    assert np.mean(draws < 150) == pytest.approx(0.95, abs=0.01)
    logs = np.log(draws)  # normal: the other tail is as far away
    assert np.quantile(logs, 0.05) == pytest.approx(math.log(60 * 60 / 150), abs=0.03)


def test_single_draws_are_those_of_the_same_generator():
    one, many = np.random.default_rng(7), np.random.default_rng(7)
    duration = Duration(30, 75)
    assert [duration.draw(one) for _ in range(5)] == duration.draws(many, 5).tolist()


@pytest.mark.parametrize("seconds", [0, 42.5])
def test_equal_quantiles_are_a_constant(seconds):
    assert {Duration(seconds, seconds).draw(np.random.default_rng(s)) for s in range(20)} == {
        seconds
    }


def test_a_draw_has_every_phase_in_order_and_readiness_adds_it_up():
    drawn = ColdStart().draw(np.random.default_rng(3))
    assert tuple(drawn) == PHASES
    assert readiness(drawn, 1000).ready_s == pytest.approx(sum(drawn.values()))


def test_the_same_seed_draws_the_same_start():
    first, again, other = (ColdStart().draw(np.random.default_rng(s)) for s in (3, 3, 4))
    assert first == again != other


def test_ready_times_are_quantiles_of_the_sum():
    cold_start = ColdStart()
    rng = np.random.default_rng(11)
    starts_s = [sum(cold_start.draw(rng).values()) for _ in range(20_000)]
    for quantile in (0.5, 0.95):
        assert cold_start.ready_time_s(quantile) == pytest.approx(
            np.quantile(starts_s, quantile), rel=0.02
        )
    assert cold_start.ready_time_s(0.95) < sum(d.p95_s for d in cold_start.phases.values())


def test_constant_phases_are_ready_after_their_sum():
    seconds = (95, 22, 78, 12)
    cold_start = ColdStart(*(Duration(s, s) for s in seconds))
    assert cold_start.ready_time_s(0.05) == cold_start.ready_time_s(1) == 207


def test_the_defaults_lie_in_the_ranges_that_the_course_gives():
    ranges_s = ((30, 180), (10, 90), (30, 180), (5, 30))
    for duration, (lowest_s, highest_s) in zip(ColdStart().phases.values(), ranges_s, strict=True):
        assert lowest_s <= duration.p50_s < duration.p95_s <= highest_s


@pytest.mark.parametrize(
    ("name", "phase"),
    [
        ("lazy_pulling", "container_pull"),
        ("local_nvme", "weight_loading"),
        ("snapshots", "runtime_warm_up"),
    ],
)
def test_a_lever_shortens_its_own_phase_alone(name, phase):
    before, after = ColdStart().phases, ColdStart().with_levers(name).phases
    assert {p for p in PHASES if before[p] != after[p]} == {phase}
    factor = LEVERS[name].factor
    assert 0 < factor < 1
    assert after[phase].p50_s == pytest.approx(before[phase].p50_s * factor)
    assert after[phase].p95_s == pytest.approx(before[phase].p95_s * factor)


def test_levers_add_up_and_each_counts_once():
    two = ColdStart().with_levers("local_nvme", "lazy_pulling")
    assert (
        two.with_levers("local_nvme") == two == ColdStart().with_levers("lazy_pulling", *two.levers)
    )
    one = ColdStart().with_levers("local_nvme")
    assert two.ready_time_s(0.5) < one.ready_time_s(0.5) < ColdStart().ready_time_s(0.5)


def test_levers_do_not_shift_the_draws_of_the_other_phases():
    plain, levers = (
        start.draw(np.random.default_rng(5))
        for start in (ColdStart(), ColdStart().with_levers("lazy_pulling"))
    )
    assert levers["weight_loading"] == plain["weight_loading"]
    assert levers["container_pull"] == pytest.approx(0.25 * plain["container_pull"])


def test_a_phase_that_does_not_happen_takes_no_time():
    without = replace(ColdStart(), node_provisioning=Duration(0, 0))
    assert without.draw(np.random.default_rng(0))["node_provisioning"] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Duration(-1, 5), "p50_s must be a number at least 0, got -1"),
        (lambda: Duration(60, 50), "p95_s must be a number at least 60, got 50"),
        (lambda: Duration(math.nan, 50), "p50_s must be a number"),
        (lambda: Duration(0, 5), "p50_s is 0 and p95_s 5"),
        (lambda: ColdStart(container_pull=30), "container_pull must be a Duration, .* got 30"),
        (lambda: ColdStart().with_levers("faster"), "unknown lever 'faster'; known are lazy_pull"),
        (lambda: ColdStart().ready_time_s(0), "quantile must be a number above 0"),
        (lambda: ColdStart().ready_time_s(95), "quantile must be a number above 0 and at most 1"),
    ],
)
def test_what_is_no_cold_start_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
