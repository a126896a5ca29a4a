"""What routers do for a fleet: each claim on a small trace, through the whole simulator."""

from functools import cache

import pytest

from course_lib.fleet.autoscaler import ScalingDecision
from course_lib.fleet.cold_start import ColdStart, Duration
from course_lib.fleet.regions import Outage, Region, RegionFailover
from course_lib.fleet.router import (
    KvAware,
    PowerOfTwoChoices,
    PrefixAwareRouter,
    RoundRobin,
    SessionAffinity,
)
from course_lib.fleet.simulator import simulate
from course_lib.fleet.spec import FleetSpec, ReplicaSpec
from course_lib.fleet.step_time import FittedStepTime
from course_lib.traces.generators import in_region, merge, shared_prefix_sessions
from course_lib.traces.trace import Segment, Trace, TraceRequest
from tests.fleet.views import FakeRequest

pytest.importorskip("pandas", reason="tables of results need pandas")

# A made-up small GPU: to prefill a system prompt takes 0.1 to 0.4 s, a step 5 ms.
STEP_TIME = FittedStepTime(step_s=0.005, prefill_token_s=2e-4, decode_request_s=2e-4)
REPLICA = ReplicaSpec(STEP_TIME, num_blocks=1200, max_model_len=8192)
COLD_START = ColdStart(*[Duration(1, 1)] * 4)  # 4 s
ADDED_S = 15.0


def conversations(seed, rate_per_s=1.0):
    """About 40 s of conversations with eight tenants, each with its own system prompt."""
    return shared_prefix_sessions(
        session_rate_per_s=rate_per_s,
        duration_s=40,
        tenants=8,
        output_tokens=(20, 100),
        mean_pause_s=10,
        seed=seed,
    )


class FifthReplica:
    """An autoscaler that wants 4 replicas, and 5 from `ADDED_S` on."""

    def __init__(self, clock):
        self.clock = clock

    def decide(self, metrics, current_replicas):
        return ScalingDecision(5 if self.clock() >= ADDED_S else 4, "planned")


@cache
def run(router, seed=1, **changes):
    fleet = FleetSpec(REPLICA, initial_replicas=4, router=router, cold_start=COLD_START, **changes)
    return simulate(conversations(seed), fleet)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("router", [PrefixAwareRouter, KvAware, SessionAffinity])
def test_routers_that_know_of_prefixes_beat_those_that_do_not(router, seed):
    mine = run(router, seed).requests
    for other in (RoundRobin, PowerOfTwoChoices):
        theirs = run(other, seed).requests
        assert mine.cached_tokens.sum() > 1.1 * theirs.cached_tokens.sum()
        assert mine.ttft_s.mean() < 0.8 * theirs.ttft_s.mean()


def test_a_replica_tells_its_cached_tokens_of_any_view_of_a_request():
    class Asking(KvAware):
        """Asks with a copy, which has nothing but what a router may know."""

        def choose(self, request, replicas):
            return super().choose(FakeRequest(list(request.prompt_token_ids)), replicas)

    assert run(Asking).request_rows == run(KvAware).request_rows


def test_a_router_is_made_anew_for_each_run():
    fleet = FleetSpec(REPLICA, initial_replicas=4, router=PrefixAwareRouter)
    trace = conversations(1)
    assert simulate(trace, fleet).request_rows == simulate(trace, fleet).request_rows


def first_on_the_fifth(result):
    """The first request that the added replica got."""
    table = result.requests
    return table[table.replica == "replica-4"].sort_values("dispatched_s").iloc[0]


def test_a_warmed_up_replica_has_the_system_prompts_in_its_cache_from_its_first_request_on():
    cold = run(PrefixAwareRouter, autoscaler=FifthReplica)
    warm = run(PrefixAwareRouter, autoscaler=FifthReplica, warm_up_prefixes=8)
    first_cold, first_warm = (first_on_the_fifth(result) for result in (cold, warm))
    assert first_cold.cached_tokens == 0
    # All but what the user said, and what is in no whole chunk of the router or block of the cache.
    assert first_warm.cached_tokens > first_warm.prompt_tokens - 200 - 64 - 16
    assert first_warm.ttft_s < 0.5 * first_cold.ttft_s


def test_a_replica_that_warms_up_is_ready_later_by_what_it_computes():
    ready_s = {}
    for count in (0, 2, 8):
        result = run(PrefixAwareRouter, autoscaler=FifthReplica, warm_up_prefixes=count)
        ready_s[count] = result.replicas.set_index("name").ready_s["replica-4"]
    assert ready_s[0] == ADDED_S + 4
    assert ready_s[0] + 0.1 < ready_s[2] < ready_s[8] - 0.1


def test_new_conversations_go_to_a_replica_that_was_warmed_up():
    result = run(PrefixAwareRouter, autoscaler=FifthReplica, warm_up_prefixes=8)
    firsts = result.requests[~result.requests.session.duplicated()]
    begun = firsts[firsts.arrival_s > ADDED_S + 6]
    assert (begun.replica == "replica-4").mean() > 0.1


def test_prompts_too_long_for_a_replica_do_not_stop_its_warm_up():
    long = TraceRequest(1.0, 9000, 10, segments=(Segment(7, 9000),))
    requests = sorted([*conversations(1).requests, long, long], key=lambda r: r.arrival_s)
    fleet = FleetSpec(
        REPLICA,
        initial_replicas=4,
        router=PrefixAwareRouter,
        cold_start=COLD_START,
        autoscaler=FifthReplica,
        warm_up_prefixes=40,
    )
    result = simulate(Trace("with long ones", tuple(requests)), fleet)
    assert result.summary()["requests_rejected"] == 2
    assert result.replicas.set_index("name").ready_s["replica-4"] > ADDED_S + 4


def test_a_session_stays_on_its_replica_and_a_new_replica_takes_only_what_goes_to_it():
    table = run(SessionAffinity).requests
    assert (table.groupby("session").replica.nunique() == 1).all()
    grown = run(SessionAffinity, autoscaler=FifthReplica).requests
    moved = grown[grown.replica != table.replica]
    assert len(moved)
    assert set(moved.replica) == {"replica-4"}
    assert (moved.arrival_s > ADDED_S).all()


# Regions.

WEST, EAST = Region("west", 2, {"east": 0.06}), Region("east", 2)
OUTAGE = Outage("west", 20, 50, detection_s=10)


@cache
def run_regions(*outages):
    trace = merge(in_region(conversations(1), "west"), in_region(conversations(2), "east"))
    fleet = FleetSpec(
        REPLICA,
        router=lambda: RegionFailover(PrefixAwareRouter, (WEST, EAST)),
        regions=(WEST, EAST),
        outages=outages,
        cold_start=COLD_START,
    )
    result = simulate(trace, fleet, record_events=True)
    table = result.requests
    region_of = result.replicas.set_index("name").region
    return result, table.assign(served_in=table.replica.map(region_of))


def test_without_an_outage_each_request_is_served_at_home():
    _, table = run_regions()
    assert (table.served_in == table.region).all()
    assert (table.retries == 0).all()


def test_an_outage_loses_nothing():
    result, table = run_regions(OUTAGE)
    assert (table.status == "finished").all()
    ended = [event[2] for event in result.events if event[1] == "finished"]
    assert sorted(ended) == list(range(len(table)))


def test_requests_of_a_region_that_is_down_are_retried_and_finish_in_the_other_one():
    _, table = run_regions(OUTAGE)
    retried = table[table.retries > 0]
    assert len(retried) > 10
    assert set(retried.region) == {"west"}
    assert set(retried.served_in) == {"east"}


def test_until_an_outage_is_known_requests_wait_for_connections_to_time_out():
    _, table = run_regions(OUTAGE)
    west = table[table.region == "west"]
    unknown = west[(west.arrival_s > OUTAGE.start_s) & (west.arrival_s < OUTAGE.known_s)]
    assert (unknown.ttft_s > 5).all()
    assert (unknown.dispatched_s >= OUTAGE.known_s).all()
    known = west[(west.arrival_s >= OUTAGE.known_s) & (west.arrival_s < OUTAGE.end_s)]
    assert (known.retries == 0).all()
    assert (known.served_in == "east").all()
    assert (known.dispatched_s - known.arrival_s).to_numpy() == pytest.approx(0.06)


def test_after_the_outage_requests_are_served_at_home_again():
    _, table = run_regions(OUTAGE)
    late = table[table.arrival_s > OUTAGE.end_s + 4]
    assert len(late) > 50
    assert (late.served_in == late.region).all()


def test_the_router_keeps_nothing_of_replicas_that_an_outage_took():
    routers = []

    def make():
        routers.append(PrefixAwareRouter())
        return routers[-1]

    fleet = FleetSpec(
        REPLICA,
        router=lambda: RegionFailover(make, (WEST, EAST)),
        regions=(WEST, EAST),
        outages=(OUTAGE,),
        cold_start=COLD_START,
    )
    simulate(in_region(conversations(1), "west"), fleet)
    history = routers[0]._history
    assert history.num_chunks("replica-4") > 0  # came after the outage
    assert history.num_chunks("replica-0") == history.num_chunks("replica-1") == 0
