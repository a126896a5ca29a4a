import math

import numpy as np
import pytest

from course_lib.fleet.spot import SpotMarket


def lifetimes_s(market, count=40_000):
    rng = np.random.default_rng(1)
    return np.array([market.draw_lifetime_s(rng) for _ in range(count)])


def test_lifetimes_have_the_mean_of_the_reclaim_rate():
    assert lifetimes_s(SpotMarket(reclaims_per_hour=0.5)).mean() == pytest.approx(7200, rel=0.02)


def test_an_old_machine_lasts_as_long_again_as_a_new_one():
    lifetimes = lifetimes_s(SpotMarket(reclaims_per_hour=2))
    left_of_old = lifetimes[lifetimes > 3600] - 3600
    assert np.mean(left_of_old) == pytest.approx(1800, rel=0.05)
    assert np.mean(left_of_old > 1800) == pytest.approx(math.exp(-1), abs=0.02)


def test_a_machine_that_is_never_reclaimed_lasts_for_ever():
    assert SpotMarket(reclaims_per_hour=0).draw_lifetime_s(np.random.default_rng(0)) == math.inf


def test_the_same_seed_gives_the_same_lifetime():
    draws = [SpotMarket().draw_lifetime_s(np.random.default_rng(seed)) for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_demand_replicas": -1}, "on_demand_replicas must be a whole number of at least 0"),
        ({"on_demand_replicas": 1.5}, "on_demand_replicas must be a whole number"),
        ({"price_factor": 1.2}, "price_factor must be a number at least 0 and at most 1, got 1.2"),
        ({"reclaims_per_hour": -0.1}, "reclaims_per_hour must be a number at least 0, got -0.1"),
        ({"warning_s": math.nan}, "warning_s must be a number at least 0, got nan"),
    ],
)
def test_what_no_market_has_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        SpotMarket(**arguments)
