"""Conditions run by the fleet simulator: GPUs whose steps take tens of milliseconds."""

import random
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from course_lib.classroom.incidents.conditions import Condition, Pace, Scaling
from course_lib.classroom.incidents.records import (
    DecisionLog,
    FleetRun,
    ReplicaLog,
    RequestLog,
)
from course_lib.fleet.cold_start import ColdStart, Duration
from course_lib.fleet.kubernetes import (
    Behavior,
    ExternalMetric,
    HorizontalPodAutoscaler,
    ScaleDown,
)
from course_lib.fleet.metrics import METRICS
from course_lib.fleet.results import REQUEST_COLUMNS
from course_lib.fleet.simulator import simulate
from course_lib.fleet.spec import Clock, FleetSpec, Gateway, ReplicaSpec
from course_lib.fleet.spot import SpotMarket
from course_lib.fleet.step_time import FittedStepTime

#: What a replica's `/metrics` says, from the names of `SimulationResult.replica_timeline`.
ENGINE_METRICS = {
    "num_requests_running": "vllm:num_requests_running",
    "num_requests_waiting": "vllm:num_requests_waiting",
    "kv_cache_utilization": "vllm:kv_cache_usage_perc",
    "num_preemptions": "vllm:num_preemptions_total",
    "prefix_cache_queries": "vllm:prefix_cache_queries_total",
    "prefix_cache_hits": "vllm:prefix_cache_hits_total",
    "generation_tokens": "vllm:generation_tokens_total",
}
#: Tokens in a block: long prompts have a quarter of the blocks that they would have with 16.
BLOCK_SIZE = 64
SYNC_PERIOD_S = 15.0  # of Kubernetes; a scrape of ours counts as one


@dataclass(frozen=True)
class Gpu:
    """A pace and the step times that go with it."""

    pace: Pace
    step_time: FittedStepTime


def draw_gpu(rng: random.Random, held_out: bool) -> Gpu:
    """A GPU of made-up speed, between those of an L4 and of an H100 with models of 7B to 70B."""
    step_s = rng.uniform(*((0.024, 0.036) if held_out else (0.010, 0.020)))
    prefill_token_s = rng.uniform(*((1.2e-4, 1.8e-4) if held_out else (5e-5, 1e-4)))
    decode_s = step_s * rng.uniform(0.005, 0.015)
    long_s = ((3.0, 4.5), (5.0, 9.0))
    practice, other = (
        (int(low / prefill_token_s), int(high / prefill_token_s)) for low, high in long_s
    )
    pace = Pace(
        step_s,
        decode_s,
        prefill_token_s,
        chat_tokens=(100, 300),
        reply_tokens=(100, 250),
        max_model_len=131_072,
        seats=((8, 12, 16), (10, 20, 24)),
        long_tokens=(practice, other),
    )
    step_time = FittedStepTime(
        step_s=step_s, decode_request_s=decode_s, prefill_token_s=prefill_token_s
    )
    return Gpu(pace, step_time)


def autoscaler_of(
    scaling: Scaling, scrape_interval_s: float, clock: Clock
) -> HorizontalPodAutoscaler:
    """Kubernetes' HPA, for which the time between two scrapes is one sync period."""
    down = ScaleDown(stabilization_window_seconds=int(SYNC_PERIOD_S * scaling.down_window))
    return HorizontalPodAutoscaler(
        [
            ExternalMetric(
                "num_requests_waiting + num_requests_running", average_value=scaling.per_replica
            )
        ],
        min_replicas=scaling.minimum,
        max_replicas=scaling.maximum,
        behavior=Behavior(scale_down=down),
        clock=lambda: clock() * SYNC_PERIOD_S / scrape_interval_s,
    )


def run_simulated(condition: Condition, step_time: FittedStepTime, seed: int) -> FleetRun:
    """The condition on simulated replicas."""
    settings = condition.settings
    longest = max(r.prompt_tokens + r.output_tokens for r in condition.trace.requests) + 1
    spot = None
    if condition.spot_life_s is not None:
        spot = SpotMarket(
            on_demand_replicas=1, reclaims_per_hour=3600 / condition.spot_life_s, warning_s=0
        )
    fleet = FleetSpec(
        ReplicaSpec(
            step_time,
            num_blocks=-(-settings.kv_cache_tokens // BLOCK_SIZE) + 1,
            block_size=BLOCK_SIZE,
            max_model_len=longest,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
        ),
        initial_replicas=condition.initial_replicas,
        autoscaler=lambda clock: autoscaler_of(
            condition.scaling, settings.scrape_interval_s, clock
        ),
        scrape_interval_s=settings.scrape_interval_s,
        cold_start=_cold_start(condition.cold_start_s),
        spot=spot,
        gateway=Gateway(condition.gateway_s),
        slowdowns=condition.slowdowns,
    )
    result = simulate(
        condition.trace,
        fleet,
        seed=seed,
        until_s=condition.trace.duration_s + 5 * settings.scrape_interval_s,
        record_events=condition.spot_life_s is not None,
    )
    retried_s = {event[2]: event[0] for event in result.events if event[1] == "retried"}
    engines: dict[str, list[dict[str, float]]] = defaultdict(list)
    for row in result.replica_timeline_rows:
        if "num_requests_running" in row:
            scraped = {theirs: row[ours] for ours, theirs in ENGINE_METRICS.items()}
            engines[row["replica"]].append({"time_s": row["time_s"], **scraped})
    return FleetRun(
        settings=settings,
        requests=[
            _request_log(dict(zip(REQUEST_COLUMNS, row, strict=True)), retried_s)
            for row in result.request_rows
            if row[REQUEST_COLUMNS.index("status")] == "finished"
        ],
        replicas=[
            ReplicaLog(
                row["name"], row["started_s"], row["ready_s"], row["ended_s"], row["end_reason"]
            )
            for row in result.replica_rows
        ],
        decisions=[
            DecisionLog(row["time_s"], row["current"], row["wanted"], row["reason"])
            for row in result.decision_rows
            if row["wanted"] != row["current"]
        ],
        fleet=[
            {"time_s": row["time_s"], **{name: row[name] for name in METRICS}}
            for row in result.timeline_rows
        ],
        engines=dict(engines),
    )


def _cold_start(seconds: float) -> ColdStart:
    """As long as said, give or take a tenth."""
    half = Duration(seconds / 2, seconds / 2 * 1.1)
    none = Duration(0.0, 0.0)
    return ColdStart(
        node_provisioning=none, container_pull=none, weight_loading=half, runtime_warm_up=half
    )


def _request_log(row: dict[str, Any], retried_s: dict[int, float]) -> RequestLog:
    return RequestLog(
        request_id=str(row["index"]),
        arrival_s=row["arrival_s"],
        retried_s=retried_s.get(row["index"]),
        **{
            name: row[name]
            for name in (
                "dispatched_s",
                "scheduled_s",
                "first_token_s",
                "finished_s",
                "prompt_tokens",
                "output_tokens",
                "cached_tokens",
                "preemptions",
                "retries",
                "replica",
            )
        },
    )
