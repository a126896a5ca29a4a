"""This engine beside vLLM and transformers on the same machine: tokens a second, start-up, memory.

    make peers && python benchmarks/engine.py [--record]
    python benchmarks/engine.py --device cuda --shape qwen3-0.6b

Each engine runs in a process of its own (`peer.py`), in turn with the others, three rounds; what is
printed are the medians and the ratios of this engine to each peer. transformers is there twice, in
static batches and with its continuous batching, which is slow on a CPU and runs in one round. On a
CPU the models are the one that ships and two of random weights, each in float32 and bfloat16; the
workloads are those of `workloads.py`. vLLM comes from `.venv-peers`, or from this environment if it
is there. A peer that does not run is left out, with its last words.

Rows that are recorded: `model`, `dtype`, `engine`, `version`, `rounds`; the medians `W1`, `W2` and
`W3` (or `G` on a GPU) in output tokens/s, `ready_s` (process start to first token) and
`peak_memory_gib`; and `ceiling_share`: the part of W3 that reading the weights at the measured
bandwidth would allow.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

# A script's own folder is searched first, and there `kernels.py` would hide the package.
ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.shapes import SHAPES, write_shape
from benchmarks.tables import print_table
from benchmarks.workloads import write_checkpoint
from course_lib.data import DEFAULT_MODEL
from course_lib.measurements import measured_here, save_measurement

Row = dict[str, Any]
ENGINES = ("ours", "vllm", "transformers", "transformers-continuous")
#: These take minutes a workload on a CPU, and take part in the first round only.
SLOW = ("transformers-continuous",)
SHIPPED = "merchant-chat"
DTYPES = ("float32", "bfloat16")

#: Workloads of one process; those with prefix caching have their own.
GROUPS = {"cpu": ("W1,W3", "W2"), "cuda": ("G",)}


def python_of(engine: str) -> str:
    """The interpreter that has this engine."""
    peers = ROOT / ".venv-peers" / "bin" / "python"
    return str(peers) if engine != "ours" and peers.exists() else sys.executable


def run_peer(engine: str, folder: Path, dtype: str, device: str, group: str) -> dict[str, Any]:
    """One process.

    Raises:
        RuntimeError: it failed; with its last words.
    """
    command = [
        python_of(engine), str(ROOT / "benchmarks" / "peer.py"),
        engine, str(folder), dtype, device, group,
    ]  # fmt: skip
    threads = str(len(os.sched_getaffinity(0)))
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": threads},
    )
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["nothing on stderr"]
        raise RuntimeError(words[-1])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def read_gb_s() -> float:
    """Bytes read a second by all threads, over more than any cache holds."""
    data = torch.ones(2**27)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - start)
    return data.nbytes / min(times) / 1e9


def models(device: str, chosen: str | None, scratch: Path) -> Iterator[tuple[str, str, Path]]:
    """Name, dtype and folder of each model; random ones are written when they are wanted."""
    if device == "cuda":
        shape = chosen or "qwen3-0.6b"
        yield shape, "bfloat16", write_shape(shape, scratch)
        return
    for name in (SHIPPED, "tiny", "m120") if chosen is None else (chosen,):
        for dtype in DTYPES:
            folder = DEFAULT_MODEL if name == SHIPPED else write_checkpoint(name, dtype, scratch)
            yield name, dtype, folder


def compare(
    name: str, dtype: str, folder: Path, device: str, rounds: int, engines: Sequence[str],
    console: Console, progress: Progress,
) -> list[Row]:  # fmt: skip
    """The medians of each engine on one model."""
    groups = GROUPS[device]
    found: dict[str, dict[str, list[float]]] = {engine: defaultdict(list) for engine in engines}
    versions: dict[str, str] = {}
    turns = {engine: 1 if engine in SLOW else rounds for engine in engines}
    task = progress.add_task(f"{name} {dtype}", total=sum(turns.values()) * len(groups))
    for turn in range(rounds):
        for group in groups:
            for engine in [peer for peer in found if turn < turns[peer]]:
                progress.update(task, description=f"{name} {dtype}: {engine} {group}")
                try:
                    result = run_peer(engine, folder, dtype, device, group)
                except RuntimeError as error:
                    if engine == "ours":
                        raise
                    console.print(f"{engine} does not run {name} in {dtype}: {error}", markup=False)
                    del found[engine]
                    continue
                versions[engine] = result.pop("version")
                for field, value in result.items():
                    found[engine][field].append(value)
                progress.advance(task)
    progress.remove_task(task)
    return [
        {
            "model": name,
            "dtype": dtype,
            "engine": engine,
            "version": versions[engine],
            "rounds": turns[engine],
            **{field: statistics.median(values) for field, values in fields.items()},
        }
        for engine, fields in found.items()
    ]


def add_ceiling(rows: list[Row], folder: Path, bandwidth_gb_s: float) -> None:
    """What share of the tokens/s that reading all weights once a token would allow W3 reaches."""
    weight_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    stored = json.loads((folder / "config.json").read_text())
    stored_dtype = stored.get("dtype") or stored.get("torch_dtype") or "float32"
    for row in rows:
        size = weight_bytes * getattr(torch, row["dtype"]).itemsize
        size /= getattr(torch, stored_dtype).itemsize
        row["ceiling_share"] = row["W3"] * size / (bandwidth_gb_s * 1e9)


def ratios(rows: Sequence[Row]) -> list[Row]:
    """This engine's tokens/s over those of each peer; start-up and memory the other way round."""
    [own] = [row for row in rows if row["engine"] == "ours"]
    lines = []
    for row in rows:
        if row is own:
            continue
        line: Row = {key: row[key] for key in ("model", "dtype")}
        line["ours to"] = row["engine"]
        for field in own:
            if field in row and field[0] in "WG":
                line[f"{field} x"] = own[field] / row[field]
        line["start-up x"] = row["ready_s"] / own["ready_s"]
        line["memory x"] = row["peak_memory_gib"] / own["peak_memory_gib"]
        lines.append(line)
    return lines


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda: must be what PyTorch finds.")] = "cpu",
    shape: Annotated[
        str | None, typer.Option(help=f"One model: {SHIPPED}, {', '.join(SHAPES)}. All if absent.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    alone: Annotated[bool, typer.Option(help="Do not run the peers.")] = False,
    record: Annotated[bool, typer.Option(help="Write data/measurements/.")] = False,
) -> None:
    """Run all and print medians and ratios."""
    console = Console()
    if (device == "cuda") != torch.cuda.is_available():
        seen = "a GPU" if torch.cuda.is_available() else "no GPU"
        console.print(f"--device {device} was asked for, and PyTorch sees {seen}.")
        raise typer.Exit(1)
    if shape is not None and shape not in (SHIPPED, *SHAPES):
        console.print(f"--shape must be one of {SHIPPED}, {', '.join(SHAPES)}, got {shape}.")
        raise typer.Exit(1)
    engines = ENGINES[:1] if alone else ENGINES
    rows: list[Row] = []
    lines: list[Row] = []
    bandwidth = read_gb_s()
    with tempfile.TemporaryDirectory() as scratch, Progress(console=console) as progress:
        for name, dtype, folder in models(device, shape, Path(scratch)):
            new = compare(name, dtype, folder, device, rounds, engines, console, progress)
            if device == "cpu":
                add_ceiling(new, folder, bandwidth)
            rows += new
            lines += ratios(new)
            print_table(console, f"{name}, {dtype}", ratios(new) or new)
    print_table(console, "medians: output tokens/s, seconds to the first token, GiB", rows)
    if lines:
        print_table(console, "this engine over its peers; above 1 it is better", lines)
    measurement = measured_here("engine", rows, {"read_gb_s": bandwidth})
    console.print(f"reads {bandwidth:.1f} GB/s, {measurement.origin}")
    if record:
        console.print(f"written to {save_measurement(measurement, shape or '')}")


if __name__ == "__main__":
    typer.run(main)
