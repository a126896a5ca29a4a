"""What a cold start is made of here: weights from disk to the first step, and starts of the server.

    python benchmarks/cold_start.py [--shape Mistral-7B] [--at-most-gb 16] [--starts 20] [--record]

Loads: checkpoints of one layer of the shape, of as many as fit half of the free disk and memory
(all of them where there is room), and of half of these. Each is loaded with its files dropped from
the page cache and again with them in it, phase by phase (`course_lib.engine.load_timing`), every
time in a new process, since only the first step of a process warms up. The rows have the shortest
time of each phase: other programs only make it longer.

Starts: `course serve` with the course's model, its files dropped from the page cache before each
start; Python's own files stay cached. What it logs is recorded in `data/startup_logs/`.

Rows that are recorded: `part` "load" with `shape`, `layers`, `of_layers`, `gb`, `cold`,
`cached_share`, and a column of seconds a phase; or `part` "starts" with the name of the `log`, and
`starts`, `ready_p50_s`, `ready_p95_s`.
"""

import multiprocessing
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Annotated, Any

# A script's own folder is searched first, and there `kernels.py` would hide the package.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import typer
from rich.console import Console
from tqdm import tqdm

from benchmarks.tables import print_table
from course_lib.classroom.startup_logs import STARTUP_LOGS
from course_lib.data import DEFAULT_MODEL
from course_lib.engine.load_timing import (
    LoadTiming,
    drop_from_page_cache,
    layers_that_fit,
    time_loading,
    write_layers,
)
from course_lib.engine.startup import parse_startup_log
from course_lib.measurements import describe_device, measured_here, save_measurement
from course_lib.sizing.catalog import read_yaml

Row = dict[str, Any]


def loads(shape: str, at_most_gb: float, rounds: int, scratch: Path) -> list[Row]:
    """One layer, as many as fit, and half of these; cold and warm."""
    config = read_yaml("models.yaml")[shape]["config"]
    most = layers_that_fit(config, scratch, at_most_gb)
    sizes = sorted({1, -(-most // 2), most})
    rows = []
    with tqdm(total=2 * rounds * len(sizes), desc="loads", leave=False) as progress:
        for layers in sizes:
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                write_layers(config, folder, layers, progress=True)
                for cold in (True, False):
                    timings = []
                    for _ in range(rounds):
                        timings.append(_in_new_process(folder, cold))
                        progress.update()
                    rows.append(
                        _load_row(shape, layers, config["num_hidden_layers"], cold, timings)
                    )
    return rows


def _in_new_process(folder: str, cold: bool) -> LoadTiming:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(time_loading, folder, cold=cold).result()


def _load_row(
    shape: str, layers: int, of_layers: int, cold: bool, timings: list[LoadTiming]
) -> Row:
    return {
        "part": "load", "shape": shape, "layers": layers, "of_layers": of_layers,
        "gb": timings[0].gb, "cold": cold,
        "cached_share": statistics.median(timing.cached_share for timing in timings),
        **{
            name: min(timing.seconds[name] for timing in timings)
            for name in timings[0].seconds
        },
    }  # fmt: skip


def start_log(starts: int) -> str:
    """What the server logs in so many starts, one after another."""
    text = ""
    for _ in tqdm(range(starts), "starts of the server", leave=False):
        for path in DEFAULT_MODEL.glob("*.safetensors"):
            drop_from_page_cache(path)
        text += _one_start()
    return text


def _one_start() -> str:
    command = [sys.executable, "-c", "from course_lib.cli import app; app()", "serve", "--port=0"]
    with (
        tempfile.TemporaryFile("w+") as output,
        subprocess.Popen(command, cwd=sys.path[0], stdout=output, stderr=output) as server,
    ):
        deadline = time.monotonic() + 300
        while not re.search(r"ready seconds=\S+\n", text := _read(output)):
            if server.poll() is not None or time.monotonic() > deadline:
                server.kill()
                raise RuntimeError(f"the server did not become ready; it said:\n{text}")
            time.sleep(0.05)
        server.terminate()
    return text


def _read(file: Any) -> str:
    file.seek(0)
    return file.read()


def main(
    shape: Annotated[str, typer.Option(help="A model of the catalogue.")] = "Mistral-7B",
    at_most_gb: Annotated[float, typer.Option(min=0.1, help="Of weights.")] = 16.0,
    rounds: Annotated[int, typer.Option(min=1, help="Loads of each kind.")] = 3,
    starts: Annotated[int, typer.Option(min=0, help="Of the server.")] = 20,
    scratch: Annotated[
        Path | None, typer.Option(help="Of the disk; else the temporary one.")
    ] = None,
    record: Annotated[bool, typer.Option(help="Write data/.")] = False,
) -> None:
    """Measure both and print them."""
    console = Console()
    if shape not in read_yaml("models.yaml"):
        console.print(f"--shape must be a model of data/catalog/models.yaml, got {shape}.")
        raise typer.Exit(1)
    try:
        rows = loads(shape, at_most_gb, rounds, scratch or Path(tempfile.gettempdir()))
    except OSError as error:
        console.print(f"nothing was measured: {error}", soft_wrap=True)
        raise typer.Exit(1) from None
    print_table(console, f"{shape} from disk to the first step, seconds", rows)
    if starts:
        text = start_log(starts)
        ready_s = [start.ready_s for start in parse_startup_log(text)]
        device = "gpu" if "compute_capability" in describe_device() else "cpu"
        log = STARTUP_LOGS / f"{DEFAULT_MODEL.name}-{device}-{date.today().isoformat()}.log"
        row = {
            "part": "starts", "log": log.name, "starts": len(ready_s),
            "ready_p50_s": float(np.quantile(ready_s, 0.5)),
            "ready_p95_s": float(np.quantile(ready_s, 0.95)),
        }  # fmt: skip
        print_table(console, "starts of the server", [row])
        rows.append(row)
        if record:
            STARTUP_LOGS.mkdir(exist_ok=True)
            log.write_text(text, encoding="utf-8")
    measurement = measured_here("cold_start", rows)
    console.print(measurement.origin)
    if record:
        console.print(f"written to {save_measurement(measurement, shape)}")


if __name__ == "__main__":
    typer.run(main)
