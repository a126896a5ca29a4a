"""How fast the fleet simulator is: a day, a spike that should feel live, and jumping over steps.

    python benchmarks/simulator.py [--hours 24] [--record]

Replicas are Llama-3.1-8B on one H100 by the roofline, with the KV cache that fits its memory. All
runs use one core. The day is Azure-shaped, 10 requests/s over 20 replicas; the spike is a morning
of about 5,000 requests, compressed to an hour, with the simple autoscaler; jumping and stepping
simulate the same minutes, and must log the same events. `--hours` compresses the day at its rate.

Rows that are recorded: `run`, `requests`, `replicas`, `wall_s`, `cpu_s` (less, where others use the
machine), `requests_per_s` (simulated), `times_real_time`; those of jumping and stepping also
`events`.
"""

import gc
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

# A script's own folder is searched first, and there `kernels.py` would hide the package.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import typer
from rich.console import Console

from benchmarks.tables import print_table
from course_lib.fleet.autoscaler import GPUAutoscaler
from course_lib.fleet.results import SimulationResult
from course_lib.fleet.simulator import simulate
from course_lib.fleet.spec import FleetSpec, ReplicaSpec
from course_lib.fleet.step_time import RooflineStepTime
from course_lib.measurements import measured_here, save_measurement
from course_lib.sizing.catalog import find_gpu, find_model
from course_lib.sizing.memory import kv_capacity
from course_lib.traces.generators import azure_shaped, morning_spike
from course_lib.traces.trace import Trace

Row = dict[str, Any]
RATE_PER_S = 10.0
REPLICAS = 20


def replica() -> ReplicaSpec:
    model, gpu = find_model("Llama-3.1-8B"), find_gpu("H100_80GB")
    capacity = kv_capacity(model, gpu.usable_gb)
    return ReplicaSpec(
        RooflineStepTime(model, gpu),
        num_blocks=capacity.blocks,
        max_model_len=8192,
        usd_per_hour=gpu.usd_per_hour,
    )


def timed(
    run: str, trace: Trace, fleet: FleetSpec, **arguments: Any
) -> tuple[Row, SimulationResult]:
    """Simulate it; the times are those of the simulation alone."""
    gc.collect()
    start, cpu_start = time.perf_counter(), time.process_time()
    result = simulate(trace, fleet, **arguments)
    wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
    return {
        "run": run,
        "requests": len(trace.requests),
        "replicas": len(result.replica_rows),
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "requests_per_s": len(trace.requests) / wall_s,
        "times_real_time": result.duration_s / wall_s,
    }, result


def day(hours: float, rate_per_s: float = RATE_PER_S) -> tuple[Row, SimulationResult]:
    trace = azure_shaped(rate_per_s, hours * 3600)
    fleet = FleetSpec(replica(), initial_replicas=REPLICAS)
    return timed(f"Azure-shaped, {hours:g} h", trace, fleet, show_progress=True)


def spike() -> tuple[Row, SimulationResult]:
    trace = morning_spike(night_rate_per_s=0.5, peak_rate_per_s=18.5, day_s=3600.0, seed=1)
    fleet = FleetSpec(
        replace(replica(), max_num_seqs=16),
        autoscaler=lambda clock: GPUAutoscaler(cooldown_s=15, clock=clock),
    )
    return timed("morning spike", trace, fleet)


def jumping(seconds: float) -> list[Row]:
    """The same trace with every step, and with jumps over those alike."""
    trace = azure_shaped(RATE_PER_S, seconds)
    fleet = FleetSpec(replica(), initial_replicas=REPLICAS)
    rows, logs = [], []
    for name, jump in (("stepping", False), ("jumping", True)):
        row, result = timed(name, trace, fleet, jump=jump, record_events=True)
        # A log has the steps in which something happened; both ways agree on those to the bit.
        logs.append(result.events)
        rows.append({**row, "events": len(result.events)})
    if logs[0] != logs[1]:
        raise SystemExit("jumping and stepping log different events; one of them is wrong")
    return rows


def main(
    hours: Annotated[float, typer.Option(min=0.01, help="Length of the day.")] = 24.0,
    record: Annotated[bool, typer.Option(help="Write data/measurements/.")] = False,
) -> None:
    """Run all three parts and print their rates."""
    console = Console()
    spike()  # imports and caches
    rows = [min((spike()[0] for _ in range(3)), key=lambda row: row["wall_s"])]
    print_table(console, "A morning spike (target: under 2 s)", rows)
    jumps = jumping(120.0)
    print_table(console, "Jumping and stepping, with equal logs of events", jumps)
    console.print(f"jumping is {jumps[0]['wall_s'] / jumps[1]['wall_s']:.1f} times as fast")
    rows += jumps
    row, result = day(hours)
    rows.append(row)
    print_table(console, "A day on one core (target: under 600 s)", [row])
    summary = result.summary()
    console.print(
        f"finished {summary['requests_finished']:,}, TTFT p95 {summary['ttft_p95_s']:.3g} s, "
        f"TPOT p95 {1000 * summary['tpot_p95_s']:.3g} ms, {summary['usd']:,.2f} USD"
    )
    measurement = measured_here("simulator", rows)
    console.print(measurement.origin)
    if record:
        console.print(f"recorded as {save_measurement(measurement)}")


if __name__ == "__main__":
    typer.run(main)
