import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.sizing.cost import (
    ColdStart,
    DeploymentOption,
    cold_start_usd,
    compare_deployments,
    deployment_options,
    example_cold_start,
    usd_per_hour,
    usd_per_million_tokens,
)

OPTIONS = {
    "rented": DeploymentOption("rented", 1.0, 0.0, "always", 0),
    "on demand": DeploymentOption("on demand", 2.0, 0.5, "busy", 360),
}


def test_prices_of_a_replica():
    assert usd_per_hour(3.5, 4) == 14
    assert usd_per_million_tokens(3.6, 1000) == pytest.approx(1.0)
    assert cold_start_usd(3.6, 207) == pytest.approx(0.207)


def test_a_cold_start_is_its_phases_and_the_weights():
    assert ColdStart(95, 22, 12, 2.0).seconds(156) == 95 + 22 + 78 + 12
    assert example_cold_start().seconds(140) > example_cold_start().seconds(14)


def test_a_day_of_each_option():
    rented, on_demand = compare_deployments(2.0, 2, 6, 3, 240, OPTIONS)
    assert (rented.billed_hours_per_day, rented.usd_per_day) == (24, 96)
    assert rented.usd_per_busy_hour == 16
    # 6 hours, and 3 x (240 + 360) s around them, at twice the price, and the cluster's own 12 $.
    assert on_demand.billed_hours_per_day == 6.5
    assert on_demand.usd_per_day == 6.5 * 8 + 12


def test_a_day_without_work_has_no_price_a_busy_hour():
    costs = compare_deployments(2.0, 1, 0, 0, 200)
    assert all(cost.usd_per_busy_hour is None for cost in costs)


def test_serverless_wins_when_there_is_little_work_and_loses_when_there_is_much():
    assert list(deployment_options()) == ["serverless GPU", "GPU cloud", "managed Kubernetes"]
    for busy_hours, cheapest in ((1, "serverless GPU"), (24, "GPU cloud")):
        costs = compare_deployments(3.5, 1, busy_hours, 1, 200)
        assert min(costs, key=lambda cost: cost.usd_per_day).name == cheapest


@given(st.floats(0, 24), st.integers(0, 200), st.floats(0, 600))
def test_no_day_is_billed_more_than_24_hours_or_less_than_its_work(busy, starts, cold_s):
    for cost in compare_deployments(3.5, 2, busy, starts, cold_s):
        assert busy <= cost.billed_hours_per_day <= 24


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: usd_per_hour(-1), "gpu_usd_per_hour must be a number at least 0"),
        (lambda: usd_per_hour(1, 0), "gpus must be a whole number of at least 1"),
        (lambda: usd_per_million_tokens(1, 0), "tokens_per_s must be a number above 0"),
        (lambda: cold_start_usd(1, float("nan")), "cold_start_s must be a number at least 0"),
        (lambda: compare_deployments(1, 1, 25, 0, 0), "busy_hours_per_day .* at most 24, got 25"),
        (lambda: compare_deployments(1, 1, 2, -1, 0), "starts_per_day must be a whole number"),
        (lambda: DeploymentOption("x", 1, 0, "never", 0), "known are always, busy"),
        (lambda: ColdStart(1, 1, 1, 1).seconds(0), "weights_gb must be a number above 0"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
