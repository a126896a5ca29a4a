import functools
import pickle
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.fleet.metrics import FleetMetrics, ReplicaMetrics
from course_lib.fleet.planners import (
    PredictiveAutoscaler,
    SaturationAutoscaler,
    SloPlanner,
    seasonal_forecast,
)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def fleet(*loads, loading=0):
    """A fleet of replicas with this KV cache use and queue (None: the scrape failed)."""
    replicas = [
        ReplicaMetrics(
            f"r{i}",
            True,
            {}
            if load is None
            else {"kv_cache_utilization": load[0], "num_requests_waiting": load[1]},
        )
        for i, load in enumerate(loads)
    ]
    replicas += [ReplicaMetrics(f"l{i}", False) for i in range(loading)]
    return FleetMetrics({}, replicas)


# llm-d's rule.


@pytest.mark.parametrize(
    ("loads", "replicas"),
    [
        # Spare KV cache is 0.8 - 0.71 = 0.09 < 0.1.
        ([(0.71, 0)] * 3, 4),
        # 0.1 is enough to stay, but with one fewer 0.8 - 0.7 x 3/2 < 0.1.
        ([(0.70, 0)] * 3, 3),
        # Spare queue is 5 - 2.33 = 2.67 < 3.
        ([(0.1, 3), (0.1, 2), (0.1, 2)], 4),
        # 5 - 2 = 3 is enough to stay; with one fewer 5 - 2 x 3/2 = 2 < 3.
        ([(0.1, 2)] * 3, 3),
        # With one fewer of two: 0.35 x 2 = 0.7, which leaves 0.1.
        ([(0.35, 1), (0.35, 1)], 1),
        ([(0.36, 1), (0.36, 1)], 2),
        ([(0.35, 1), (0.35, 1.1)], 2),
        # With one fewer of three: 0.46 x 3/2 = 0.69 and 1 x 3/2 = 1.5.
        ([(0.46, 1)] * 3, 2),
        # The mean decides, not the fullest.
        ([(0.79, 0), (0.1, 0), (0.1, 0)], 2),
        # 0.56 x 5/4 is 0.7, whatever the rounding of floats.
        ([(0.56, 0)] * 5, 4),
        # Saturated ones are left out: 0.35 x 2 and 1 x 2 leave enough.
        ([(0.35, 0), (0.35, 0), (0.80, 0)], 2),
        ([(0.1, 1), (0.1, 1), (0.1, 5)], 2),
        # They take no load either: 0.45 x 2, not 0.45 x 3/2.
        ([(0.45, 0), (0.45, 0), (0.9, 0)], 3),
        # The one that is left has 0.8 - 0.1, but nobody could take its load.
        ([(0.1, 0), (0.9, 0), (0.9, 9)], 3),
        ([(0.9, 0), (0.1, 6)], 3),
        ([(0.80, 0)], 2),
        ([(0.0, 0)], 1),
    ],
)
def test_saturation(loads, replicas):
    assert SaturationAutoscaler().recommend(fleet(*loads), len(loads)) == replicas


def test_nothing_moves_while_a_replica_is_not_ready():
    decision = SaturationAutoscaler().decide(fleet((0.9, 9), (0.9, 9), loading=1), 3)
    assert decision.replicas == 3
    assert decision.reason == "in transition: 2 of 3 are ready"
    # One was ordered and is not there yet.
    assert SaturationAutoscaler().recommend(fleet((0.9, 9)), 2) == 2


def test_a_failed_scrape_blocks_scaling_down_only():
    assert SaturationAutoscaler().recommend(fleet((0.0, 0), (0.0, 0), None), 3) == 3
    assert SaturationAutoscaler().recommend(fleet((0.9, 9), (0.9, 9), None), 3) == 4
    assert SaturationAutoscaler().recommend(fleet(None, None), 2) == 2
    assert SaturationAutoscaler().recommend({"kv_cache_utilization": 0.9}, 2) == 2


def test_saturation_stays_within_its_limits():
    autoscaler = SaturationAutoscaler(min_replicas=2, max_replicas=3)
    assert autoscaler.recommend(fleet((0.9, 9), (0.9, 9), (0.9, 9)), 3) == 3
    assert autoscaler.recommend(fleet((0.0, 0), (0.0, 0)), 2) == 2
    with pytest.raises(ValueError, match="min_replicas must be a whole number of at least 1"):
        SaturationAutoscaler(min_replicas=0)


def test_the_reason_of_saturation_tells_what_is_spare():
    reasons = [
        SaturationAutoscaler().decide(fleet(*[load] * 3), 3).reason
        for load in [(0.75, 1), (0.9, 1), (0.0, 0)]
    ]
    assert reasons == [
        "spare kv_cache_utilization 0.05 (at least 0.1) and num_requests_waiting 4 (at least 3) "
        "of 3 replicas",
        "all 3 replicas are saturated",
        "with one fewer still spare kv_cache_utilization 0.8 (at least 0.1) and "
        "num_requests_waiting 5 (at least 3)",
    ]


# The forecast.


def test_one_season_repeats():
    assert seasonal_forecast([1, 9, 5], 3, 2) == pytest.approx([1, 9])
    assert seasonal_forecast([1, 9, 5, 1], 3, 2) == pytest.approx([9, 5])


def test_a_surprise_moves_the_level_by_a_fifth_and_its_season_by_three_tenths():
    # Level 5 and seasons -4 and 4. Then 3 comes for the 1: level 0.2 (3 + 4) + 0.8 x 5 = 5.4,
    # season 0.3 (3 - 5) + 0.7 x -4 = -3.4.
    assert seasonal_forecast([1, 9, 3], 2, 1) == pytest.approx([5.4 + 4])
    # 9 is below 9.4: level 0.2 (9 - 4) + 0.8 x 5.4 = 5.32.
    assert seasonal_forecast([1, 9, 3, 9], 2, 1) == pytest.approx([5.32 - 3.4])


def test_a_forecast_is_never_negative():
    # Level 5 and seasons -5 and 5. Then 0 comes as expected, and 0 for the 10: the level is
    # 0.2 (0 - 5) + 0.8 x 5 = 3, and 3 - 5 is below 0.
    assert seasonal_forecast([0, 10, 0, 0], 2, 1) == [0]


def holt_winters(history, season, horizon):
    """Hyndman and Athanasopoulos, 8.3: additive, without a trend."""
    level = sum(history[:season]) / season
    seasons = [value - level for value in history[:season]]
    for t, value in enumerate(history):
        before = level
        level = 0.2 * (value - seasons[t % season]) + 0.8 * before
        seasons[t % season] = 0.3 * (value - before) + 0.7 * seasons[t % season]
    return [level + seasons[(len(history) + h) % season] for h in range(horizon)]


@given(st.lists(st.floats(0, 100), min_size=4, max_size=24), st.integers(2, 4))
def test_the_forecast_is_holt_winters(history, season):
    wanted = [max(0, value) for value in holt_winters(history, season, season - 1)]
    assert seasonal_forecast(history, season, season - 1) == pytest.approx(wanted, abs=1e-6)


def test_less_than_a_season_is_refused():
    with pytest.raises(ValueError, match="history must have at least 3 values, got 2"):
        seasonal_forecast([1, 2], 3, 1)
    with pytest.raises(ValueError, match="horizon must be a whole number from 1 to 2, got 3"):
        seasonal_forecast([1, 2, 3], 3, 3)


def test_without_statsmodels_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "statsmodels.tsa.holtwinters", None)
    with pytest.raises(ImportError, match=r"gpu-serving-labs\[fleet\]"):
        seasonal_forecast([1, 2], 2, 1)


# The predictive autoscaler: a season of four steps of 100 s, 2 requests/s for each replica.

QUIET_THEN_RUSH = [2, 2, 20, 2]


def predictive(clock, **options):
    options = {
        "capacity_per_replica": 2,
        "ready_time_s": 50,
        "season_s": 400,
        "step_s": 100,
        **options,
    }
    return PredictiveAutoscaler(clock=clock, **options)


def replicas_of(autoscaler, clock, current, rates, step_s=10):
    counts = []
    for rate in rates:
        seen = {} if rate is None else {"request_rate_per_s": rate}
        current = autoscaler.decide(seen, current).replicas
        counts.append(current)
        clock.now_s += step_s
    return counts


def test_before_a_full_season_only_the_load_now_counts(clock):
    autoscaler = predictive(clock)
    assert replicas_of(autoscaler, clock, 1, [2, 3, 7, 7.9, 8]) == [1, 2, 4, 4, 4]
    assert "no full season is known yet" in autoscaler.decide({"request_rate_per_s": 1}, 1).reason


def test_yesterday_starts_the_rush_of_today_a_ready_time_ahead(clock):
    # The rush begins at 200 s and is forecast as 20, so 10 replicas; they are asked for at 150 s.
    counts = replicas_of(predictive(clock, history=QUIET_THEN_RUSH), clock, 1, [2] * 20)
    assert counts == [1] * 15 + [10] * 5


def test_after_a_season_of_its_own_it_foresees_too(clock):
    rates = [rate for rate in QUIET_THEN_RUSH for _ in range(10)]
    first = replicas_of(predictive(clock), clock, 1, rates + rates)
    assert first[15:20] == [1] * 5
    assert first[40 + 10 : 40 + 20] == [1] * 5 + [10] * 5


def test_the_mean_of_a_step_is_what_is_remembered(clock):
    autoscaler = predictive(clock, ready_time_s=0)
    replicas_of(autoscaler, clock, 1, [10, 30] * 5 + [2] * 30)
    # The first step was 20 on average; nothing has come yet.
    assert replicas_of(autoscaler, clock, 1, [0]) == [10]


def test_it_is_never_below_the_need_of_now(clock):
    autoscaler = predictive(clock, history=QUIET_THEN_RUSH)
    assert replicas_of(autoscaler, clock, 1, [9, 15]) == [5, 8]


def test_what_was_needed_is_kept_for_the_ready_time(clock):
    assert replicas_of(predictive(clock), clock, 1, [8] + [2] * 6) == [4] * 5 + [1] * 2


def test_a_load_that_could_not_be_measured_gives_nothing_back_and_is_as_a_season_before(clock):
    assert replicas_of(predictive(clock), clock, 5, [None] * 12) == [5] * 12
    # The whole second season is unseen; the third still rushes at 200 s.
    autoscaler = predictive(clock, history=QUIET_THEN_RUSH)
    autoscaler.decide({}, 1)
    clock.now_s += 400
    assert replicas_of(autoscaler, clock, 1, [2] * 20) == [1] * 15 + [10] * 5


def test_a_step_that_nobody_measured_is_as_the_step_before(clock):
    autoscaler = predictive(clock, ready_time_s=0)
    replicas_of(autoscaler, clock, 1, [8] * 10 + [None] * 20 + [2] * 10)
    # A season of 8, 8, 8, 2 is known; as long as it holds, its forecast does.
    assert replicas_of(autoscaler, clock, 1, [8] * 10 + [0]) == [4] * 11


def test_a_rush_within_the_lead_is_not_given_up_for_a_quiet_after_it(clock):
    # The lead of 150 s reaches past the rush of one step from 250 s on.
    autoscaler = predictive(clock, history=QUIET_THEN_RUSH, ready_time_s=150)
    assert replicas_of(autoscaler, clock, 1, [2] * 30)[5:] == [10] * 25


def test_concurrency_may_be_the_metric(clock):
    both = "num_requests_waiting + num_requests_running"
    autoscaler = predictive(clock, metric=both, capacity_per_replica=5)
    seen = {"num_requests_waiting": 60, "num_requests_running": 40}
    assert autoscaler.decide(seen, 1).replicas == 20


def test_the_reason_of_a_forecast(clock):
    autoscaler = predictive(clock, history=QUIET_THEN_RUSH, max_replicas=8)
    assert autoscaler.decide({"request_rate_per_s": 3}, 1).reason == (
        "request_rate_per_s 3, 2 for each replica; up to 2 forecast for the next 50 s: 2 needed"
    )
    clock.now_s += 150
    assert autoscaler.decide({"request_rate_per_s": 3}, 1).reason.startswith("max_replicas 8; ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity_per_replica": 0}, "capacity_per_replica must be a number above 0"),
        ({"ready_time_s": -1}, "ready_time_s must be"),
        ({"season_s": 250}, "season_s must be a whole number of step_s"),
        ({"ready_time_s": 200}, "longer than ready_time_s and two steps, got 400 s, steps of 100"),
        ({"history": [1, -1]}, "history must be a number at least 0"),
    ],
)
def test_a_forecast_that_cannot_be_is_refused(clock, options, message):
    with pytest.raises(ValueError, match=message):
        predictive(clock, **options)


# The planner. One engine serves 2 requests/s, less with long outputs.


def one_engine(prompt_tokens: float, output_tokens: float) -> float:
    return 2.0 if output_tokens <= 200 and prompt_tokens <= 1000 else 1.0


def planner(clock, **options):
    return SloPlanner(one_engine, 1000, 50, **{"interval_s": 60, **options}, clock=clock)


def seen(rate=6.0, prompt=500.0, output=100.0, ttft=400.0, tpot=20.0, **more):
    return {
        "request_rate_per_s": rate,
        "prompt_tokens_mean": prompt,
        "output_tokens_mean": output,
        "ttft_p95_ms": ttft,
        "tpot_p95_ms": tpot,
        **more,
    }


def interval(autoscaler, clock, current, *samples):
    """The replicas at the end of an interval of 60 s with these four samples."""
    for metrics in samples * (4 // len(samples)):
        clock.now_s += 15
        current = autoscaler.decide(metrics, current).replicas
    return current


@pytest.fixture
def started(clock):
    """A planner that has seen one interval of 6 requests/s, so it plans 3 replicas."""
    autoscaler = planner(clock)
    autoscaler.decide(seen(), 3)
    assert interval(autoscaler, clock, 3, seen()) == 3
    return autoscaler


def test_nothing_is_planned_before_an_interval_is_over(clock):
    autoscaler = planner(clock)
    counts = []
    for _ in range(5):
        counts.append(autoscaler.decide(seen(rate=20), 1).replicas)
        clock.now_s += 15
    assert counts == [1, 1, 1, 1, 10]


def test_a_rise_is_continued_by_one_interval(clock, started):
    # Means 6 and 10, so 14 next: ceil(14 / 2).
    assert interval(started, clock, 3, seen(rate=10)) == 7


def test_a_rise_is_the_line_through_the_last_five_intervals(clock, started):
    for rate in (100, 6, 6, 6, 6):
        interval(started, clock, 20, seen(rate=rate))
    # 6, 6, 6, 6 and 8.5: the line has slope 0.5 and mean 6.5 at 2, so 8 at 5; not below 8.5.
    assert interval(started, clock, 3, seen(rate=8.5)) == 5
    # 6, 6, 6, 8.5, 12: slope 1.45, mean 7.7, so 7.7 + 3 x 1.45 = 12.05.
    assert interval(started, clock, 3, seen(rate=12)) == 7


def test_a_fall_is_followed_but_not_continued(clock, started):
    # Means 6 and 4; the line would say 2.
    assert interval(started, clock, 3, seen(rate=4)) == 2


def test_longer_requests_need_more_engines(clock, started):
    assert interval(started, clock, 3, seen(output=300)) == 6
    assert interval(started, clock, 3, seen(prompt=1500)) == 6


def test_a_mean_of_no_requests_tells_nothing_about_lengths(clock, started):
    assert interval(started, clock, 6, seen(output=300), seen(output=0)) == 6


def test_a_prompt_mean_of_no_requests_tells_nothing_either(clock, started):
    assert interval(started, clock, 6, seen(prompt=1500), seen(prompt=0)) == 6


def test_the_plan_goes_further_than_one_more(clock, started):
    # Means 6 and 20, so 34 next, while each of the three samples before added one.
    assert interval(started, clock, 3, seen(rate=20, ttft=2000.0)) == 17


def test_when_no_engine_keeps_the_objectives_all_are_asked_for(clock):
    autoscaler = SloPlanner(lambda p, o: 0.0, 1000, 50, interval_s=60, clock=clock)
    autoscaler.decide(seen(), 1)
    assert interval(autoscaler, clock, 1, seen()) == 20


@pytest.mark.parametrize("late", [{"ttft": 1001.0}, {"tpot": 51.0}])
def test_latency_above_an_objective_adds_one_at_once(clock, started, late):
    clock.now_s += 15
    assert started.decide(seen(**late), 3).replicas == 4


@pytest.mark.parametrize("good", [{"ttft": 1000.0}, {"tpot": 50.0}])
def test_latency_at_its_objective_is_kept(clock, started, good):
    clock.now_s += 15
    assert started.decide(seen(**good), 3).replicas == 3


def test_none_is_added_while_one_is_loading(clock, started):
    clock.now_s += 15
    late = seen(ttft=2000.0)
    assert started.decide({**late, "num_replicas_ready": 3}, 4).replicas == 4
    replicas = [ReplicaMetrics(str(i), i < 3) for i in range(4)]
    assert started.decide(FleetMetrics(late, replicas), 4).replicas == 4
    replicas = [ReplicaMetrics(str(i), True) for i in range(4)]
    assert started.decide(FleetMetrics(late, replicas), 4).replicas == 5


def test_the_plan_is_not_delayed_by_loading(clock, started):
    loading = seen(rate=10, ttft=2000.0, num_replicas_ready=1)
    assert interval(started, clock, 3, loading) == 7


def test_what_latency_added_stays_until_an_interval_in_order_is_over(clock, started):
    late, fine = seen(ttft=2000.0), seen()
    assert interval(started, clock, 3, late, fine, fine, fine) == 4
    # The interval with the breach ended with 4, the next one is in order.
    assert interval(started, clock, 4, fine) == 3


@pytest.mark.parametrize("lacking", ["ttft_p95_ms", "tpot_p95_ms", "request_rate_per_s"])
def test_it_never_scales_down_after_an_interval_in_which_a_metric_failed(clock, started, lacking):
    partly = {name: value for name, value in seen(rate=2).items() if name != lacking}
    fine = seen(rate=2)
    assert interval(started, clock, 3, partly, fine, fine, fine) == 3
    assert interval(started, clock, 3, fine) == 1


def test_what_was_never_measured_is_not_planned(clock):
    autoscaler = planner(clock)
    autoscaler.decide({}, 4)
    assert interval(autoscaler, clock, 4, {}) == 4


def test_a_replica_that_went_away_is_replaced_by_the_plan(clock, started):
    clock.now_s += 15
    assert started.decide(seen(), 2).replicas == 3


def test_the_planner_stays_within_its_limits(clock):
    autoscaler = planner(clock, min_replicas=2, max_replicas=4)
    autoscaler.decide(seen(), 2)
    assert interval(autoscaler, clock, 2, seen(rate=100)) == 4
    clock.now_s += 15
    assert autoscaler.decide(seen(rate=100, ttft=5000.0), 4).replicas == 4
    for _ in range(6):
        low = interval(autoscaler, clock, 4, seen(rate=0.1))
    assert low == 2


def test_the_planner_gives_reasons(clock, started):
    clock.now_s += 15
    assert started.decide(seen(ttft=2000.0), 3).reason == "ttft_p95_ms 2000 > 1000: one more"
    clock.now_s += 15
    assert started.decide(seen(), 4).reason == (
        "fewer only after an interval in order; request_rate_per_s 6, prompt_tokens_mean 500 and "
        "output_tokens_mean 100 expected, 2 per s for each engine: 3 needed"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ttft_objective_ms": 0}, "ttft_objective_ms must be a number above 0"),
        ({"tpot_objective_ms": -1}, "tpot_objective_ms must be a number above 0"),
        ({"interval_s": 0}, "interval_s must be a number above 0"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas must be a whole number of at least"),
    ],
)
def test_a_planner_that_cannot_be_is_refused(options, message):
    arguments = {"ttft_objective_ms": 1000, "tpot_objective_ms": 50, **options}
    with pytest.raises(ValueError, match=message):
        SloPlanner(one_engine, **arguments)


def test_a_rate_that_cannot_be_is_refused(clock):
    autoscaler = SloPlanner(lambda p, o: -1.0, 1000, 50, interval_s=60, clock=clock)
    autoscaler.decide(seen(), 1)
    with pytest.raises(ValueError, match=r"max_rate_per_s\(\) must be a number at least 0"):
        interval(autoscaler, clock, 1, seen())


# All of them.

MAKERS = [
    functools.partial(SaturationAutoscaler, 2, 9),
    functools.partial(
        PredictiveAutoscaler,
        2.0,
        45.0,
        season_s=120,
        step_s=30,
        history=(1, 9, 30, 2),
        min_replicas=2,
        max_replicas=9,
    ),
    functools.partial(
        SloPlanner, one_engine, 1000, 50, interval_s=60, min_replicas=2, max_replicas=9
    ),
]


@pytest.mark.parametrize("make", MAKERS)
@given(data=st.data())
def test_replicas_are_within_the_limits_and_do_not_fall_while_nothing_is_measured(make, data):
    clock = Clock()
    autoscaler, current = make(clock=clock), 2
    metric = st.floats(0, 100)
    for _ in range(20):
        values = data.draw(
            st.one_of(
                st.just({}),
                st.builds(
                    lambda rate, length, ms: seen(rate, length, length, ms, ms),
                    metric,
                    metric,
                    st.floats(0, 2000),
                ),
            )
        )
        loads = [(0.0, 0.0) if values else None] * current
        replicas = autoscaler.decide(FleetMetrics(values, fleet(*loads).replicas), current).replicas
        assert 2 <= replicas <= 9
        assert values or replicas >= current
        current = replicas
        clock.now_s += 15


@pytest.mark.parametrize(("make", "replicas"), [*zip(MAKERS, [3, 5, 3], strict=True)])
def test_how_to_make_one_travels_between_processes(clock, make, replicas):
    made = pickle.loads(pickle.dumps(make))(clock=clock)
    strained = FleetMetrics(seen(ttft=2000.0), fleet((0.9, 9), (0.9, 9)).replicas)
    assert made.decide(strained, 2).replicas == replicas


@pytest.mark.parametrize("make", MAKERS)
def test_replicas_that_cannot_be_are_refused(clock, make):
    with pytest.raises(ValueError, match="current_replicas must be a whole number"):
        make(clock=clock).decide(seen(), -1)
