"""The simulator: no request is lost, times are those of the step-time model, replicas come and go.

The engine's side is compared with a plain loop around the scheduler, written here.
"""

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from course_lib.engine.batch import StepResult
from course_lib.engine.block_pool import BlockPool
from course_lib.engine.request import Request
from course_lib.engine.sampling_params import SamplingParams
from course_lib.engine.scheduler import Scheduler
from course_lib.fleet.autoscaler import AutoscalerBase, GPUAutoscaler
from course_lib.fleet.cold_start import ColdStart, Duration
from course_lib.fleet.regions import Outage, Region, RegionFailover
from course_lib.fleet.router import LeastOutstanding, RoundRobin
from course_lib.fleet.simulator import simulate
from course_lib.fleet.spec import FleetSpec, Gateway, ReplicaSpec
from course_lib.fleet.spot import SpotMarket
from course_lib.fleet.step_time import FittedStepTime, StepWork
from course_lib.serving.admission import AdmissionPolicy
from course_lib.serving.lifecycle import DrainPolicy
from course_lib.traces.generators import concurrent_users, steady
from course_lib.traces.trace import (
    Segment,
    Trace,
    TraceRequest,
    content_ids,
    prompt_contents,
)
from tests.fleet.random_fleets import STEP_TIME, random_fleet, random_trace

REPLICA = ReplicaSpec(STEP_TIME, num_blocks=2000, max_model_len=4096)
#: A step takes 10 ms whatever it computes, so times can be counted.
TEN_MS = replace(REPLICA, step_time=FittedStepTime(step_s=0.01))
LOADS_IN_20_S = ColdStart(*(Duration(s, s) for s in (10, 4, 5, 1)))


def trace_of(*rows: tuple[float, int, int]) -> Trace:
    return Trace("made by hand", tuple(TraceRequest(*row) for row in rows))


class Wants(AutoscalerBase):
    """Follows a plan: pairs of a time and a number of replicas."""

    plan: tuple[tuple[float, int], ...] = ()

    def recommend(self, metrics, current_replicas):
        return [count for at_s, count in self.plan if at_s <= self.clock()][-1]


def wants(*plan: tuple[float, int]):
    kind = type("Plan", (Wants,), {"plan": plan})
    return lambda clock: kind(0, 100, clock)


# Conservation


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32))
def test_every_request_ends_once_in_any_mix_of_troubles(seed: int) -> None:
    rng = random.Random(seed)
    trace, fleet = random_trace(rng), random_fleet(rng)
    result = simulate(trace, fleet, seed=seed, record_events=True)
    assert sorted(row[0] for row in result.request_rows) == list(range(len(trace.requests)))
    summary = result.summary()
    assert summary["requests_lost"] == 0
    assert summary["requests_finished"] + summary["requests_rejected"] == len(trace.requests)
    retried = sum(event[1] == "retried" for event in result.events)
    assert summary["retries"] == retried
    for row in result.requests[result.requests.status == "finished"].itertuples():
        assert row.arrival_s <= row.dispatched_s <= row.scheduled_s
        assert row.scheduled_s <= row.first_token_s <= row.finished_s
    for event in result.events:
        if event[1] == "finished":
            asked = trace.requests[event[2]]
            longest = fleet.replica.max_model_len - asked.prompt_tokens
            cache = (fleet.replica.num_blocks - 1) * fleet.replica.block_size
            longest = min(longest, cache - asked.prompt_tokens)
            assert len(event[3]) == min(asked.output_tokens, longest)
            assert list(event[3]) == sorted(set(event[3]))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32))
def test_time_on_the_bill_is_time_in_a_state(seed: int) -> None:
    rng = random.Random(seed)
    result = simulate(random_trace(rng), random_fleet(rng), seed=seed)
    for row in result.replica_rows:
        ended_s = result.duration_s if row["ended_s"] is None else row["ended_s"]
        lived_s = ended_s - row["started_s"]
        states_s = [row[f"{state}_s"] for state in ("serving", "idle", "loading", "standby")]
        assert min(states_s) >= -1e-9
        assert sum(states_s) == pytest.approx(lived_s, abs=1e-6)


def test_the_same_seed_gives_the_same_result_and_another_one_another() -> None:
    rng = random.Random(4)
    trace = steady(20, 5, prompt_tokens=50, output_tokens=30, seed=1)
    fleet = replace(random_fleet(rng), spot=SpotMarket(0, 0.4, 3000, 0.4), regions=(), outages=())
    fleet = replace(fleet, router=RoundRobin)
    runs = [simulate(trace, fleet, seed=seed, record_events=True).events for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


# A replica


def test_a_lone_request_takes_the_time_that_the_model_says() -> None:
    result = simulate(trace_of((1.0, 100, 3)), FleetSpec(REPLICA))
    (row,) = result.requests.itertuples()
    prefill_s = STEP_TIME.seconds(StepWork(prefill_tokens=100, prefill_pairs=5050, num_prefills=1))
    decodes_s = sum(
        STEP_TIME.seconds(StepWork(num_decodes=1, context_tokens=c)) for c in (101, 102)
    )
    assert row.ttft_s == pytest.approx(prefill_s)
    assert row.finished_s - row.first_token_s == pytest.approx(decodes_s)
    assert row.tpot_s == pytest.approx(decodes_s / 2)


@pytest.mark.parametrize("caching", [False, True])
def test_a_replica_is_the_engines_loop_of_schedule_and_update(caching: bool) -> None:
    trace = steady(30, 3, prompt_tokens=(1, 60), output_tokens=(1, 40), seed=5)
    spec = replace(
        REPLICA,
        num_blocks=12,
        max_model_len=150,
        max_num_seqs=8,
        max_num_batched_tokens=40,
        enable_prefix_caching=caching,
    )
    expected = _plain_loop(trace, spec)
    rows = simulate(trace, FleetSpec(spec)).requests
    assert rows.preemptions.sum() > 0
    for index, (first_s, last_s) in expected.items():
        assert rows.first_token_s[index] == first_s
        assert rows.finished_s[index] == last_s


def _plain_loop(trace: Trace, spec: ReplicaSpec) -> dict[int, tuple[float, float]]:
    """First and last token of each request."""
    now_s = 0.0
    pool = BlockPool(
        spec.num_blocks, spec.block_size, enable_prefix_caching=spec.enable_prefix_caching
    )
    scheduler = Scheduler(
        pool,
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=spec.max_num_batched_tokens,
        max_model_len=spec.max_model_len,
        clock=lambda: now_s,
    )
    requests = {}
    coming = list(enumerate(trace.requests))
    while coming or scheduler.has_unfinished_requests():
        if not scheduler.has_unfinished_requests():
            now_s = max(now_s, coming[0][1].arrival_s)
        while coming and coming[0][1].arrival_s <= now_s:
            index, asked = coming.pop(0)
            requests[index] = Request(
                str(index),
                content_ids(prompt_contents(asked, -1 - index)),
                SamplingParams(max_tokens=asked.output_tokens, ignore_eos=True),
                arrival_time=asked.arrival_s,
            )
            scheduler.add_request(requests[index])
        batch = scheduler.schedule()
        now_s += spec.step_time.seconds(StepWork.of(batch.scheduled))
        scheduler.update(
            batch,
            StepResult([[-10_000 - i] if e.samples else [] for i, e in enumerate(batch.scheduled)]),
        )
    times = {index: request.metrics.token_times for index, request in requests.items()}
    return {index: (tokens[0], tokens[-1]) for index, tokens in times.items()}


def test_seats_are_limited() -> None:
    spec = replace(TEN_MS, max_num_seqs=2)
    rows = simulate(trace_of(*[(0.0, 10, 5)] * 4), FleetSpec(spec)).requests
    assert rows.first_token_s.round(6).tolist() == [0.01, 0.01, 0.06, 0.06]


def test_what_can_never_fit_is_rejected() -> None:
    result = simulate(trace_of((0.0, 5000, 5), (0.0, 10, 5)), FleetSpec(REPLICA))
    assert result.requests.status.tolist() == ["rejected", "finished"]
    assert "max_model_len" in result.requests.reason[0]


def test_a_slow_replica_takes_as_much_longer() -> None:
    result = simulate(
        trace_of((0.0, 10, 11), (0.0, 10, 11)),
        FleetSpec(TEN_MS, initial_replicas=2, slowdowns={1: 3.0}),
    )
    assert result.requests.tpot_s.round(6).tolist() == [0.01, 0.03]


def test_shared_beginnings_are_cached() -> None:
    trace = Trace(
        "shared",
        tuple(TraceRequest(at, 100, 2, segments=(Segment(7, 64),)) for at in (0.0, 1.0)),
    )
    cached = simulate(trace, FleetSpec(REPLICA)).requests.cached_tokens.tolist()
    assert cached == [0, 64]


# The gateway


def test_a_gateway_hands_on_one_request_after_the_other() -> None:
    fleet = FleetSpec(TEN_MS, gateway=Gateway(service_s=0.5))
    rows = simulate(trace_of(*[(0.0, 10, 2)] * 3), fleet).requests
    assert rows.dispatched_s.tolist() == [0.5, 1.0, 1.5]


def test_a_full_gateway_refuses() -> None:
    fleet = FleetSpec(TEN_MS, gateway=Gateway(service_s=0.5, max_queue=2))
    rows = simulate(trace_of(*[(0.0, 10, 2)] * 3), fleet).requests
    assert rows.reason.tolist() == ["", "", "gateway queue full"]


def test_without_a_replica_requests_wait_at_the_gateway_until_they_give_up() -> None:
    fleet = FleetSpec(TEN_MS, initial_replicas=0, gateway=Gateway(timeout_s=3))
    result = simulate(trace_of((1.0, 10, 2)), fleet)
    assert result.requests.reason.tolist() == ["gateway timeout"]
    assert result.duration_s == 4.0


def test_admission_refuses_at_the_replica() -> None:
    fleet = FleetSpec(
        replace(TEN_MS, max_num_seqs=1),
        admission=lambda clock: AdmissionPolicy(max_num_queued_reqs=1, clock=clock),
    )
    rows = simulate(trace_of(*[(0.0, 10, 5)] * 4), fleet).requests
    assert rows.reason.tolist() == ["", "", "max_num_queued_reqs", "max_num_queued_reqs"]


# Capacity


def test_a_cold_replica_is_ready_after_its_phases() -> None:
    fleet = FleetSpec(
        TEN_MS, initial_replicas=0, autoscaler=wants((0, 1)), cold_start=LOADS_IN_20_S
    )
    result = simulate(trace_of((1.0, 10, 2)), fleet)
    (replica,) = result.replica_rows
    assert (replica["started_s"], replica["ready_s"], replica["loading_s"]) == (0, 20, 20)
    assert replica["container_pull_s"] == 4
    assert result.requests.ttft_s[0] == pytest.approx(19.01)


def test_a_cold_start_at_the_very_beginning_is_a_start() -> None:
    fleet = FleetSpec(TEN_MS, autoscaler=wants((0, 3)), cold_start=LOADS_IN_20_S, warm_pool=1)
    assert simulate(trace_of((1.0, 10, 2)), fleet, until_s=60).starts == 2  # one of the pool, new


def test_an_outage_that_is_known_says_nothing_of_another_region() -> None:
    regions = (Region("east", 1, {"west": 0.0}), Region("west", 1))
    fleet = FleetSpec(
        TEN_MS,
        regions=regions,
        outages=(Outage("east", 1, 90, detection_s=5), Outage("west", 4, 90, detection_s=50)),
        router=lambda: RegionFailover(RoundRobin, regions),
        cold_start=LOADS_IN_20_S,
        max_retries=100,
    )
    request = TraceRequest(10.0, 10, 2, region="west")
    result = simulate(Trace("both down", (request,)), fleet, record_events=True)
    tried_again_s = [event[0] for event in result.events if event[1] == "retried"]
    assert tried_again_s == [15, 20, 25, 30, 35, 40, 45, 50, 55]  # until the west is known
    assert result.requests.status.tolist() == ["finished"]


def test_a_warm_pool_is_ready_at_once_and_is_filled_again() -> None:
    fleet = FleetSpec(
        TEN_MS,
        autoscaler=wants((0, 1), (60, 2)),
        cold_start=LOADS_IN_20_S,
        warm_pool=1,
        activation_s=2,
    )
    result = simulate(trace_of((0.0, 10, 2)), fleet, until_s=100)
    timeline = result.timeline.set_index("time_s")
    assert timeline.replicas_standby[45] == 1
    assert (timeline.replicas_ready[75], timeline.replicas_loading[75]) == (2, 1)
    assert timeline.replicas_standby[90] == 1
    _, pooled, refill = result.replica_rows
    assert pooled["ready_s"] == 62
    assert refill["started_s"] == 60


def test_scaling_down_drains_first() -> None:
    fleet = FleetSpec(
        TEN_MS, initial_replicas=2, autoscaler=wants((0, 2), (15, 1)), router=RoundRobin
    )
    result = simulate(trace_of((14.0, 10, 500), (14.5, 10, 500)), fleet, until_s=60)
    assert result.requests.status.tolist() == ["finished", "finished"]
    assert result.requests.retries.sum() == 0
    left = result.replica_rows[1]
    assert left["ended_s"] == pytest.approx(result.requests.finished_s[1])
    assert left["end_reason"] == "scaled down"


def test_a_reclaimed_replica_finishes_what_fits_the_warning_and_sends_back_the_rest() -> None:
    fleet = FleetSpec(
        replace(TEN_MS, usd_per_hour=10),
        initial_replicas=2,
        router=RoundRobin,
        spot=SpotMarket(
            on_demand_replicas=1, price_factor=0.4, reclaims_per_hour=3600, warning_s=2
        ),
        drain=DrainPolicy(2, 0.5),
    )
    rows = [(0.01 * i, 10, 100 if i % 4 < 2 else 1000) for i in range(8)]
    result = simulate(trace_of(*rows), fleet, seed=3)
    assert result.summary()["requests_finished"] == 8
    on_demand, spot = result.replica_rows
    assert (on_demand["market"], spot["market"]) == ("on demand", "spot")
    assert spot["end_reason"] == "reclaimed"
    retries = result.requests.retries.tolist()
    assert retries[0::2] == [0] * 4  # those on demand
    assert retries[3::4] == [1, 1]  # too long to finish in time
    assert on_demand["usd"] == pytest.approx(10 * result.duration_s / 3600)
    assert spot["usd"] == pytest.approx(4 * spot["ended_s"] / 3600)


def test_an_outage_fails_over_and_comes_back_cold() -> None:
    regions = (Region("east", 1, {"west": 0.1}), Region("west", 1))
    fleet = FleetSpec(
        TEN_MS,
        regions=regions,
        outages=(Outage("east", 2.0, 30.0, detection_s=5.0),),
        router=lambda: RegionFailover(LeastOutstanding, regions),
        cold_start=LOADS_IN_20_S,
        connect_timeout_s=1.0,
    )
    requests = [TraceRequest(at, 10, 100, region="east") for at in (0.0, 1.5, 4.0, 10.0, 60.0)]
    result = simulate(Trace("outage", tuple(requests)), fleet)
    rows = result.requests
    assert rows.status.tolist() == ["finished"] * 5
    assert rows.replica.tolist() == ["replica-0"] + ["replica-1"] * 3 + ["replica-2"]
    assert rows.retries[0] == 0
    assert (
        rows.retries[1] > 0
    )  # was cut off, then asked the region that is not yet known to be down
    assert rows.retries[2] > 0
    assert rows.retries[3] == 0  # known by then
    assert rows.ttft_s[3] == pytest.approx(0.1 + 0.01)
    assert result.replica_rows[2]["ready_s"] == 50.0


def test_the_simple_rule_scales_a_fleet_up_and_down() -> None:
    users = concurrent_users(200, at_s=30, within_s=5, prompt_tokens=100, output_tokens=400)
    fleet = FleetSpec(
        replace(REPLICA, max_num_seqs=8),
        autoscaler=lambda clock: GPUAutoscaler(1, 6, cooldown_s=20, clock=clock),
        cold_start=LOADS_IN_20_S,
    )
    result = simulate(users, fleet, until_s=600)
    counts = result.timeline.replicas_wanted
    assert counts.iloc[0] == 1 and counts.max() > 2 and counts.iloc[-1] == 1
    assert all(result.decisions.reason)
    assert result.reversals >= 1
    assert result.starts == len(result.replica_rows) - 1 > 0


# What is measured


def test_summaries_are_those_of_the_rows() -> None:
    result = simulate(steady(20, 20, seed=2), FleetSpec(REPLICA, initial_replicas=3))
    rows, summary = result.requests, result.summary()
    assert summary["ttft_p95_s"] == pytest.approx(rows.ttft_s.quantile(0.95))
    assert summary["tpot_p50_s"] == pytest.approx(rows.tpot_s.median())
    assert summary["queue_s"] == pytest.approx(rows.queue_s.sum())
    ttft_s = rows.ttft_s.median()
    assert result.slo_attainment(ttft_s, 1e9) == pytest.approx((rows.ttft_s <= ttft_s).mean())
    assert result.slo_attainment(1e9, 0.0) == pytest.approx((rows.output_tokens == 1).mean())


def test_a_trace_without_requests_costs_what_stands_there() -> None:
    result = simulate(
        Trace("nobody", ()), FleetSpec(replace(REPLICA, usd_per_hour=2)), until_s=3600
    )
    assert result.usd == pytest.approx(2.0)
    assert result.gpu_hours["idle"] == pytest.approx(1.0)
    assert result.summary()["requests"] == 0
    assert result.slo_attainment(1, 1) == 1.0


def test_a_region_that_is_not_there_is_refused() -> None:
    trace = Trace("far", (TraceRequest(0, 1, 1, region="mars"),))
    with pytest.raises(ValueError, match="mars"):
        simulate(trace, FleetSpec(REPLICA))


def test_a_scheduler_that_schedules_nothing_is_named() -> None:
    class Lazy(Scheduler):
        def schedule(self):
            return self.make_batch([], [])

    with pytest.raises(RuntimeError, match="schedules nothing"):
        simulate(trace_of((0.0, 1, 1)), FleetSpec(replace(REPLICA, scheduler=Lazy)))
