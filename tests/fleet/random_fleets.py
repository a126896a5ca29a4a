"""Small fleets and traces made of chance: short of blocks, of seats, of budget, of luck."""

import random
from collections.abc import Callable
from dataclasses import replace

from course_lib.fleet.autoscaler import AutoscalerBase, ScalingDecision
from course_lib.fleet.cold_start import ColdStart, Duration
from course_lib.fleet.regions import Outage, Region, RegionFailover
from course_lib.fleet.router import LeastOutstanding, RoundRobin
from course_lib.fleet.spec import FleetSpec, Gateway, ReplicaSpec
from course_lib.fleet.spot import SpotMarket
from course_lib.fleet.step_time import FittedStepTime
from course_lib.serving.admission import AdmissionPolicy
from course_lib.traces.generators import bursty, shared_prefix_sessions, steady
from course_lib.traces.trace import Trace

STEP_TIME = FittedStepTime(
    step_s=0.006,
    prefill_token_s=4e-5,
    prefill_pair_s=1e-9,
    prefill_request_s=1e-4,
    decode_request_s=1e-4,
    context_token_s=2e-7,
)
QUICK_START = ColdStart(Duration(1, 3), Duration(0.5, 1), Duration(1, 2), Duration(0.2, 0.2))


class UpAndDown(AutoscalerBase):
    """Wants another number of replicas again and again, whatever the load."""

    def recommend(self, metrics, current_replicas):
        return int(self.clock() // 2) % 4


class ComesAndGoes:
    """A warm pool of another size every second."""

    def __init__(self, clock):
        self.clock = clock

    def decide(self, current_replicas):
        return ScalingDecision(int(self.clock()) % 3, "by the clock")


def random_trace(rng: random.Random) -> Trace:
    seed = rng.randrange(2**16)
    lengths = {"output_tokens": (1, rng.choice([3, 20, 60]))}
    prompts = {"prompt_tokens": (1, rng.choice([8, 40, 100]))}
    kind = rng.randrange(3)
    if kind == 0:
        return steady(rng.choice([2, 10, 30]), 3.0, **lengths, **prompts, seed=seed)
    if kind == 1:
        return bursty(rng.choice([5, 20]), 3.0, cv=3.0, **lengths, **prompts, seed=seed)
    return shared_prefix_sessions(
        session_rate_per_s=3.0,
        duration_s=2.0,
        tenants=2,
        turns=(1, 4),
        mean_pause_s=rng.choice([0.05, 0.5]),  # also turns that repeat a reply not yet there
        system_prompt_tokens=(5, 30),
        user_tokens=(1, 12),
        **lengths,
        seed=seed,
    )


def random_replica(rng: random.Random) -> ReplicaSpec:
    block_size = rng.choice([1, 2, 4, 16])
    return ReplicaSpec(
        STEP_TIME,
        num_blocks=1 + rng.choice([200, 300, 1000]) // block_size,
        max_model_len=rng.choice([190, 4096]),
        block_size=block_size,
        max_num_seqs=rng.choice([1, 3, 16]),
        max_num_batched_tokens=rng.choice([16, 64, 2048]),
        enable_prefix_caching=rng.random() < 0.6,
    )


def random_fleet(rng: random.Random) -> FleetSpec:
    """Of all troubles some."""
    fleet = FleetSpec(
        random_replica(rng),
        initial_replicas=rng.choice([0, 1, 2]),
        autoscaler=_maybe(rng, lambda clock: UpAndDown(0, 4, clock)),
        router=rng.choice([RoundRobin, LeastOutstanding]),
        admission=_maybe(rng, lambda clock: AdmissionPolicy(max_num_queued_reqs=5, clock=clock)),
        scrape_interval_s=rng.choice([0.4, 1.0]),
        cold_start=QUICK_START,
        warm_pool=rng.choice([0, 0, 1, ComesAndGoes]),
        activation_s=0.1,
        gateway=Gateway(
            rng.choice([0.0, 0.0, 0.01]), rng.choice([10, 1000]), rng.choice([1.0, 20.0])
        ),
        connect_timeout_s=rng.choice([0.0, 0.3]),
        max_retries=rng.choice([0, 10]),
        slowdowns=rng.choice([{}, {1: 2.5}]),
    )
    if rng.random() < 0.4:
        reclaims = SpotMarket(rng.choice([0, 1]), 0.4, rng.choice([600, 3000]), 0.4)
        fleet = replace(fleet, spot=reclaims)
    if rng.random() < 0.4:
        regions = (Region("east", 1, {"west": rng.choice([0.0, 0.05])}), Region("west", 1))
        outage = Outage("east", rng.uniform(0, 2), rng.uniform(2.5, 4), rng.uniform(0, 1))
        inner = fleet.router
        fleet = replace(
            fleet,
            regions=regions,
            outages=(outage,),
            router=lambda: RegionFailover(inner, regions),
        )
    return fleet


def _maybe(rng: random.Random, maker: Callable) -> Callable | None:
    return maker if rng.random() < 0.5 else None
