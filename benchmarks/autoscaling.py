"""The classic experiment: 100 users at 9 AM, 5 at a time on a replica, and one of 20 is warm.

    python benchmarks/autoscaling.py [--figure autoscaling.png]

The trace begins at half past eight. From nine on users come, 100 of them after a quarter of an
hour, stay, and leave for a lull of six minutes; three such waves. Each asks again when the reply of
two minutes is there. A new replica is ready after the illustrative cold start of
`fleet.cold_start`.

The simple rule is tried with a cooldown shorter than a start and with one longer than a lull;
Kubernetes' HPA on waiting plus running requests, without and with a stabilization window on the way
down, and then with a warm pool; and the seasonal forecast, which knows the load of the day before.
All meet the same requests. Dollars are those of all replicas, standby included, at an example price
until the last request has ended.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

# A script's own folder is searched first, and there `kernels.py` would hide the package.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import typer
from rich.console import Console

from benchmarks.tables import print_table
from course_lib.fleet.autoscaler import Autoscaler, GPUAutoscaler
from course_lib.fleet.cold_start import ColdStart
from course_lib.fleet.kubernetes import Behavior, ExternalMetric, HorizontalPodAutoscaler, ScaleDown
from course_lib.fleet.planners import PredictiveAutoscaler
from course_lib.fleet.results import SimulationResult
from course_lib.fleet.router import LeastOutstanding
from course_lib.fleet.simulator import simulate
from course_lib.fleet.spec import Clock, FleetSpec, ReplicaSpec
from course_lib.fleet.step_time import FittedStepTime
from course_lib.traces.generators import concurrent_users, merge
from course_lib.traces.trace import Trace

USERS, PER_REPLICA, MAX_REPLICAS = 100, 5, 20
NINE_S = 1800.0  # since the beginning of the trace, half past eight
REPLY_S = 120.0  # about: users ask again when they have their reply
RISE, BUSY = 8, 10  # in replies: until all users are there, until they leave
LULL_S = 360.0
WAVES_S = tuple(NINE_S + (BUSY * REPLY_S + LULL_S) * wave for wave in range(3))
END_S = WAVES_S[-1] + BUSY * REPLY_S + LULL_S

READY_S = ColdStart().ready_time_s(0.95)
SHORT_COOLDOWN_S = 60.0  # the replica of the last decision is not ready yet
LONG_COOLDOWN_S = 400.0  # a lull is over before the next one
WINDOW_S = 1500  # the next wave is as high again before it is over

# Steps of 38 ms at 5 requests: within a TPOT of 50 ms. An assumption, as is the price.
REPLICA = ReplicaSpec(
    FittedStepTime(step_s=0.03, prefill_token_s=1e-4, decode_request_s=0.0016),
    num_blocks=2000,
    max_model_len=4096,
    max_num_seqs=PER_REPLICA,
    usd_per_hour=3.50,
)
SHORT = f"simple, cooldown {SHORT_COOLDOWN_S:g} s"
LONG = f"simple, cooldown {LONG_COOLDOWN_S:g} s"
NO_WINDOW = "HPA, no window"
WINDOW = f"HPA, {WINDOW_S} s down"
WARM_POOL = f"{WINDOW}, warm pool"
FORECAST = "forecast"

LOAD = "num_requests_waiting + num_requests_running"
DAY_S, STEP_S = 86_400, 60


def morning(seed: int) -> Trace:
    """Four waves: users come, stay and leave."""
    parts = []
    for wave, start_s in enumerate(WAVES_S):
        for step in range(BUSY):
            users = concurrent_users(
                USERS * min(step + 1, RISE) // RISE,
                at_s=start_s + step * REPLY_S,
                within_s=REPLY_S,
                prompt_tokens=(100, 400),
                output_tokens=(2600, 3600),
                seed=(seed * len(WAVES_S) + wave) * BUSY + step,
            )
            parts.append(users)
    return merge(*parts, name="100 users at 9 AM")


def yesterday() -> list[float]:
    """The load in each minute of the day before, as so many replicas that nobody waits saw it."""
    fleet = FleetSpec(REPLICA, MAX_REPLICAS, router=LeastOutstanding)
    rows = simulate(morning(seed=0), fleet, until_s=END_S).timeline_rows
    load = [0.0] * (DAY_S // STEP_S)
    scrapes = STEP_S / fleet.scrape_interval_s
    for row in rows:
        minute = int(row["time_s"] // STEP_S)
        load[minute] += (row["num_requests_waiting"] + row["num_requests_running"]) / scrapes
    return load


def simple(cooldown_s: float, clock: Clock) -> Autoscaler:
    return GPUAutoscaler(1, MAX_REPLICAS, cooldown_s, clock)


def hpa(window_s: int, clock: Clock) -> Autoscaler:
    return HorizontalPodAutoscaler(
        [ExternalMetric(LOAD, average_value=PER_REPLICA)],
        max_replicas=MAX_REPLICAS,
        behavior=Behavior(scale_down=ScaleDown(stabilization_window_seconds=window_s)),
        clock=clock,
    )


def predictive(history: list[float], clock: Clock) -> Autoscaler:
    return PredictiveAutoscaler(
        PER_REPLICA,
        READY_S,
        LOAD,
        DAY_S,
        STEP_S,
        history,
        max_replicas=MAX_REPLICAS,
        clock=clock,
    )


def policies() -> dict[str, dict[str, Any]]:
    """By name, the fields of `FleetSpec` that a policy changes."""
    return {
        SHORT: {"autoscaler": partial(simple, SHORT_COOLDOWN_S)},
        LONG: {"autoscaler": partial(simple, LONG_COOLDOWN_S)},
        NO_WINDOW: {"autoscaler": partial(hpa, 0)},
        WINDOW: {"autoscaler": partial(hpa, WINDOW_S)},
        WARM_POOL: {
            "autoscaler": partial(hpa, WINDOW_S),
            "warm_pool": MAX_REPLICAS - 1,
        },
        FORECAST: {"autoscaler": partial(predictive, yesterday())},
    }


def experiment(seed: int = 1) -> dict[str, SimulationResult]:
    """The same morning under each policy."""
    trace, fleet = morning(seed), FleetSpec(REPLICA, router=LeastOutstanding)
    return {
        name: simulate(trace, replace(fleet, **changes), seed=seed, until_s=END_S)
        for name, changes in policies().items()
    }


def row(name: str, result: SimulationResult) -> dict[str, Any]:
    """What there is to compare."""
    summary = result.summary()
    return {
        "policy": name,
        "starts": summary["starts"],
        "reversals": summary["reversals"],
        "queue_s": round(summary["queue_s"]),
        "ttft_p95_s": summary["ttft_p95_s"],
        "standby_h": summary["gpu_hours_standby"],
        "usd": f"{summary['usd']:.2f}",
    }


def main(
    figure: Annotated[Path | None, typer.Option(help="Save a plot of all policies here.")] = None,
) -> None:
    """Run all policies and print what they did and cost."""
    results = experiment()
    console = Console()
    rows = [row(name, result) for name, result in results.items()]
    print_table(console, f"{USERS} users at 9 AM, a start takes {READY_S:.0f} s at p95", rows)
    if figure is not None:
        from course_lib.classroom.plots.policies import plot_policies

        plot_policies(results, title="100 users at 9 AM, one replica of 20 warm").savefig(figure)
        console.print(f"saved {figure}")


if __name__ == "__main__":
    typer.run(main)
