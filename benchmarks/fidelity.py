"""Is the simulator to be believed? It predicts three workloads, then the engine runs them.

    OMP_NUM_THREADS=1 python benchmarks/fidelity.py [--record]

Step times are fitted on one workload (see `course_lib.fleet.calibration`). Three others, steady,
bursty and chats with long prompts among them, are simulated and then run five times on the same
engine, requests added in-process in real time. A prediction is good if it is off by no more than
10 % or the spread of the real runs, whichever is more, and bad if by more than twice that. The
spread is that between the highest and the lowest run, over their mean.

Each round calibrates anew, predicts and runs, so that what changes on the machine meanwhile changes
both; what is predicted is the mean of the rounds. Where other programs take turns on the same
cores, even that is not enough: `--computing-time` counts the seconds that the engine's thread
computes, on a CPU with OMP_NUM_THREADS=1, instead of those that pass. On a GPU it runs as it is,
with more `--load`.

Rows that are recorded: `workload`, `metric`, `predicted`, `real` (mean), `lowest`, `highest`,
`spread`, `error`, `verdict`, `clock`.
"""

import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

# A script's own folder is searched first, and there `kernels.py` would hide the package.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import typer
from rich.console import Console

from benchmarks.tables import print_table
from course_lib.data import DEFAULT_MODEL
from course_lib.engine.config import EngineConfig
from course_lib.engine.engine import LLMEngine
from course_lib.engine.request import RequestMetrics
from course_lib.fleet.calibration import Calibration, ComputingClock, calibrate, replay
from course_lib.fleet.simulator import simulate
from course_lib.fleet.spec import FleetSpec
from course_lib.measurements import measured_here, save_measurement
from course_lib.traces.generators import bursty, long_prompt_surge, steady
from course_lib.traces.trace import Trace

RUNS = 5
TOLERANCE = 0.10


def workloads(duration_s: float, load: float) -> list[Trace]:
    """At a load of 1, what keeps the shipped model on one CPU core about half busy."""
    lengths: dict[str, Any] = {"prompt_tokens": (16, 256), "output_tokens": (8, 64)}
    return [
        steady(3 * load, duration_s, seed=11, **lengths),
        bursty(2.5 * load, duration_s, cv=3, seed=12, **lengths),
        long_prompt_surge(
            chat_rate_per_s=2 * load,
            surge_rate_per_s=0.5 * load,
            surge_start_s=0.2 * duration_s,
            surge_duration_s=0.6 * duration_s,
            duration_s=duration_s,
            long_prompt_tokens=(600, 1200),
            long_output_tokens=(8, 32),
            seed=13,
            **lengths,
        ),
    ]


def figures(
    ttft_s: list[float], tpot_s: list[float], output_tokens: int, end_s: float
) -> dict[str, float]:
    """What is compared."""
    return {
        "mean TTFT (ms)": 1e3 * statistics.fmean(ttft_s),
        "p95 TTFT (ms)": 1e3 * float(np.quantile(ttft_s, 0.95)),
        "mean TPOT (ms)": 1e3 * statistics.fmean(tpot_s),
        "throughput (tokens/s)": output_tokens / end_s,
    }


def predicted(trace: Trace, calibration: Calibration) -> dict[str, float]:
    """By the simulator, with one replica."""
    requests = simulate(trace, FleetSpec(calibration.replica)).requests
    return figures(
        requests.ttft_s.tolist(),
        requests.tpot_s.dropna().tolist(),
        int(requests.output_tokens.sum()),
        float(requests.finished_s.max()),
    )


def real(finished: list[RequestMetrics]) -> dict[str, float]:
    """By the engine."""
    return figures(
        [m.ttft_s for m in finished if m.ttft_s is not None],
        [m.tpot_s for m in finished if m.tpot_s is not None],
        sum(len(m.token_times) for m in finished),
        max(m.token_times[-1] for m in finished),
    )


def compare(
    name: str, predictions: list[dict[str, float]], runs: list[dict[str, float]]
) -> list[dict[str, Any]]:
    """A row for each figure."""
    rows = []
    for metric in runs[0]:
        values = [run[metric] for run in runs]
        mean = statistics.fmean(values)
        prediction = statistics.fmean(p[metric] for p in predictions)
        spread = (max(values) - min(values)) / mean
        error = prediction / mean - 1
        allowed = max(TOLERANCE, spread)
        verdict = "good" if abs(error) <= allowed else "off"
        rows.append(
            {
                "workload": name,
                "metric": metric,
                "predicted": prediction,
                "real": mean,
                "lowest": min(values),
                "highest": max(values),
                "spread": spread,
                "error": error,
                "verdict": "bad" if abs(error) > 2 * allowed else verdict,
            }
        )
    return rows


def main(
    model: Annotated[Path, typer.Option(help="Checkpoint directory.")] = DEFAULT_MODEL,
    duration: Annotated[float, typer.Option(min=1, help="Seconds of each workload.")] = 15.0,
    load: Annotated[float, typer.Option(help="Factor on all rates; more for a GPU.")] = 1.0,
    users: Annotated[int, typer.Option(min=1, help="Of the calibration.")] = 8,
    runs: Annotated[int, typer.Option(min=1, help="Real runs of each workload.")] = RUNS,
    computing_time: Annotated[
        bool, typer.Option("--computing-time", help="Count what the thread computes.")
    ] = False,
    record: Annotated[bool, typer.Option(help="Write data/measurements/.")] = False,
) -> None:
    """Calibrate, predict, run, compare."""
    console = Console()
    clock = ComputingClock()
    now, sleep = (clock, clock.sleep) if computing_time else (time.monotonic, time.sleep)
    engine = LLMEngine(EngineConfig(model), clock=now)
    console.print(str(engine))
    traces = workloads(duration, load)
    predictions: dict[str, list[dict[str, float]]] = {trace.name: [] for trace in traces}
    measured: dict[str, list[dict[str, float]]] = {trace.name: [] for trace in traces}
    calibration = None
    for number in range(runs):
        with console.status(f"calibrating, round {number + 1} of {runs}"):
            calibration = calibrate(engine, max_users=users, max_prompt_tokens=1200, seed=number)
        for trace in traces:
            predictions[trace.name].append(predicted(trace, calibration))
            with console.status(f"{trace.name}, run {number + 1} of {runs}"):
                finished, _ = replay(engine, trace, sleep=sleep)
            measured[trace.name].append(real(finished))
    assert calibration is not None
    rows = [
        row for trace in traces
        for row in compare(trace.name, predictions[trace.name], measured[trace.name])
    ]  # fmt: skip
    print_table(console, "the last calibration", [asdict(e) for e in calibration.errors])
    print_table(console, f"predicted and real, {runs} runs", rows)
    clock_name = "computing" if computing_time else "wall"
    measurement = measured_here("fidelity", [{**row, "clock": clock_name} for row in rows])
    console.print(measurement.origin)
    if record:
        console.print(f"written to {save_measurement(measurement, model.name)}")
    if any(row["verdict"] != "good" for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
