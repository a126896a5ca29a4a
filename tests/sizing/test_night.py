import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.sizing.night import NightCost, quiet_night

times = st.floats(0, 5000, allow_subnormal=False)


def test_one_customer_pays_for_the_start_the_service_and_the_time_out():
    night = quiet_night([1000], 28_800, cold_start_s=120, busy_s=30, idle_timeout_s=300,
                        usd_per_hour=8.0)  # fmt: skip
    assert night == NightCost(1, 450.0, 1.0, 120.0)


def test_who_comes_while_a_replica_starts_or_stays_shares_it():
    night = quiet_night([0, 50, 409], 28_800, 100, 10, 300, 3600)
    assert (night.cold_starts, night.billed_s, night.waited_s) == (1, 409 + 310, 150)


def test_at_the_last_second_of_the_time_out_it_is_still_there_and_after_it_is_not():
    assert quiet_night([0, 400], 28_800, 100, 0, 300, 1).cold_starts == 1
    assert quiet_night([0, 400.5], 28_800, 100, 0, 300, 1).cold_starts == 2


def test_a_night_ends():
    assert quiet_night([900], 1000, 500, 10, 300, 3600).usd == 100


def test_a_night_without_customers_costs_nothing():
    assert quiet_night([], 28_800, 100, 10, 300, 3.5) == NightCost(0, 0.0, 0.0, 0.0)


@given(st.lists(times, max_size=20), times, times, times)
def test_it_is_never_dearer_than_staying_and_every_start_has_a_customer(arrivals, cold, busy, idle):
    night = quiet_night(sorted(arrivals), 5000, cold, busy, idle, 3600)
    assert 0 <= night.billed_s <= 5000 + 1e-6
    assert bool(arrivals) <= night.cold_starts <= len(arrivals)
    assert night.waited_s <= cold * len(arrivals) + 1e-6


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"arrivals_s": [20, 10]}, "arrivals_s"),
        ({"arrivals_s": [2000]}, "arrivals_s"),
        ({"night_s": 0}, "night_s"),
        ({"cold_start_s": -1}, "cold_start_s"),
        ({"busy_s": -1}, "busy_s"),
        ({"idle_timeout_s": -1}, "idle_timeout_s"),
        ({"usd_per_hour": -1}, "usd_per_hour"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, says):
    right = {"arrivals_s": [1], "night_s": 1000, "cold_start_s": 1, "busy_s": 1}
    right |= {"idle_timeout_s": 1, "usd_per_hour": 1}
    with pytest.raises(ValueError, match=says):
        quiet_night(**right | change)
