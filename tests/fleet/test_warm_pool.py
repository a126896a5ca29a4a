"""The arithmetic of a cold start, the size of a warm pool, and a plan that looks ahead."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.fleet.autoscaler import AutoscalerBase, ScalingDecision
from course_lib.fleet.cold_start import ColdStart, Duration
from course_lib.fleet.simulator import simulate
from course_lib.fleet.spec import FleetSpec, ReplicaSpec
from course_lib.fleet.warm_pool import ColdStartPlan, WarmPoolCost, backlog, warm_pool_for
from course_lib.traces.trace import Trace, TraceRequest
from tests.fleet.random_fleets import STEP_TIME

COLD = {
    "node_s": 95,
    "image_gb": 10,
    "network_gbit_per_s": 2,
    "weights_gib": 15,
    "disk_gb_per_s": 1,
    "warm_up_s": 12,
}


def test_a_backlog_by_hand() -> None:
    found = backlog(
        **COLD, arrivals_per_min=120, served_before_per_min=60, served_after_per_min=180
    )
    assert found.ready_s == pytest.approx(95 + 40 + 16.106 + 12, abs=1e-3)
    assert found.queue == pytest.approx(found.ready_s)  # one more waits each second
    assert found.drain_s == pytest.approx(found.queue)  # one fewer each second


@pytest.mark.parametrize(
    ("before", "after", "queue", "drain_s"),
    [(120, 120, 0, 0), (200, 260, 0, 0), (0, 120, 326.2, math.inf), (0, 60, 326.2, math.inf)],
)
def test_no_queue_is_gone_at_once_and_a_queue_without_surplus_never(
    before: float, after: float, queue: float, drain_s: float
) -> None:
    found = backlog(
        **COLD, arrivals_per_min=120, served_before_per_min=before, served_after_per_min=after
    )
    assert found.queue == pytest.approx(queue, abs=0.1) and found.drain_s == drain_s


@pytest.mark.parametrize("name", ["node_s", "network_gbit_per_s", "disk_gb_per_s"])
def test_a_backlog_refuses_what_cannot_be(name: str) -> None:
    rates = {"arrivals_per_min": 1, "served_before_per_min": 1, "served_after_per_min": 1}
    with pytest.raises(ValueError, match=f"{name} must be a number"):
        backlog(**{**COLD, name: -1}, **rates)


def test_a_warm_pool_by_hand() -> None:
    # 165 customers/min for 5 minutes, each asks twice a minute: 27.5 requests/s, 7 replicas of 4.
    pool = warm_pool_for(165, 6, 2, 300, 4, usd_per_hour=1.5)
    assert pool == WarmPoolCost(7, 7 * 1.5 * 24)
    assert warm_pool_for(165, 2, 2, 300, 4, 1.5, hours_per_day=1) == WarmPoolCost(3, 4.5)
    with pytest.raises(ValueError, match="hours_per_day must be a number at least 0 and at most"):
        warm_pool_for(165, 6, 2, 300, 4, 1.5, hours_per_day=25)


@given(
    slope_per_s=st.integers(1, 40).map(lambda n: n / 64),
    ramp_s=st.integers(1, 40),
    ready_s=st.integers(1, 60),
    load_before=st.integers(0, 64).map(lambda n: n / 8),
)
def test_a_pool_of_that_size_is_never_short_whatever_the_load_before(
    slope_per_s: float, ramp_s: int, ready_s: int, load_before: float
) -> None:
    """Second by second: what is taken from the pool comes back after `ready_s`."""
    pool = warm_pool_for(60 * 60 * slope_per_s, ramp_s / 60, 1, ready_s, 1, 1).replicas
    needed = [math.ceil(load_before + slope_per_s * min(t, ramp_s)) for t in range(200)]
    taken = [n - needed[0] for n in needed]
    shortest = min(
        pool - taken[t] + (taken[t - ready_s] if t >= ready_s else 0) for t in range(200)
    )
    assert shortest >= 0
    fullest = math.ceil(slope_per_s * min(ready_s, ramp_s))
    assert pool == fullest  # and with a load before that is a whole number, all of it is used


def plan_at(now_s: float, **settings: float) -> ColdStartPlan:
    given = {"forecast": [1, 1, 8, 2], "step_s": 60, "capacity_per_replica": 2, "ready_time_s": 90}
    return ColdStartPlan(**{**given, **settings}, clock=lambda: now_s)


@pytest.mark.parametrize(
    ("now_s", "standby"),
    [(0, 0), (29, 0), (30, 3), (119, 3), (179, 3), (180, 0), (239, 0), (270, 3), (4 * 3600, 0)],
)
def test_the_plan_has_warm_what_the_steps_until_ready_need(now_s: float, standby: int) -> None:
    decision = plan_at(now_s).decide(1)
    assert decision.replicas == standby
    assert "requests/s expected in the next 90 s" in decision.reason


def test_the_plan_stays_within_its_limits() -> None:
    assert plan_at(60, max_standby=2).decide(1).replicas == 2
    assert plan_at(60).decide(9).replicas == 0
    assert plan_at(200, min_standby=1).decide(9).replicas == 1
    assert plan_at(60, min_standby=1).decide(1).replicas == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"forecast": []}, "forecast is empty"),
        ({"forecast": [1, -1]}, "forecast must be a number at least 0"),
        ({"min_standby": 3, "max_standby": 2}, "max_standby must be a whole number of at least 3"),
        ({"step_s": 0}, "step_s must be a number above 0"),
    ],
)
def test_the_plan_refuses_what_is_no_plan(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_at(0, **settings)


class Wants(AutoscalerBase):
    """One replica, three from minute 3 on, one again from minute 5 on."""

    def recommend(self, metrics, current_replicas):
        return 3 if 180 <= self.clock() < 300 else 1


def test_a_planned_pool_loads_before_the_rush_and_goes_when_it_is_over() -> None:
    minute = Duration(20, 20)
    fleet = FleetSpec(
        ReplicaSpec(STEP_TIME, num_blocks=50, max_model_len=64),
        autoscaler=lambda clock: Wants(clock=clock),
        cold_start=ColdStart(minute, minute, minute, Duration(0, 0)),
        warm_pool=lambda clock: ColdStartPlan([1, 1, 1, 3, 3, 1, 1, 1], 60, 1, 75, clock=clock),
    )
    trace = Trace("one", (TraceRequest(0.0, 4, 2),))
    result = simulate(trace, fleet, until_s=460, record_events=True)
    timeline = result.timeline.set_index("time_s")
    standby, ready = timeline.replicas_standby, timeline.replicas_ready
    assert standby[90] == 0 and standby[165] == 2  # decided at 105 s, ready at 165 s
    assert ready[195] == 3 and standby[195] == 0  # no cold start in the rush
    assert timeline.replicas_loading[195] == 0
    assert ready[330] == 1 and standby[330] == 0
    planned = [event for event in result.events if event[1] == "warm_pool"]
    assert [(at_s, size) for at_s, _, _, size, _ in planned] == [(105, 2), (180, 0)]
    assert result.starts == 2


def test_a_plan_that_gives_no_number_of_replicas_is_refused() -> None:
    class Wrong:
        def decide(self, current_replicas):
            return ScalingDecision(-1, "wrong")

    fleet = FleetSpec(ReplicaSpec(STEP_TIME, 50, 64), warm_pool=lambda clock: Wrong())
    with pytest.raises(ValueError, match="warm pool's plan must be a whole number of at least 0"):
        simulate(Trace("one", (TraceRequest(0.0, 4, 2),)), fleet)
