"""Where the time of a decode step goes, and how far it is from what the memory allows.

    python benchmarks/steps.py --device cuda [--shape llama-3-8b] [--record]

Decode at fixed batch sizes and contexts: wall time a step and its device part, from the first
launch to the tokens on the host; the rest is host time that the device spends waiting. The floor is
that of `sizing.roofline` at the copy bandwidth measured in the same run.

On a CPU the defaults are small. Rows that are recorded: `shape`, `batch`, `context_tokens`,
`step_ms`, `device_ms`, `host_ms`, `host_share`, `floor_ms`, `ratio_to_floor`.
"""

import random
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

# A script's own folder is searched first, and there `kernels.py` would hide the package.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import typer
from rich.console import Console
from tqdm import tqdm

from benchmarks.shapes import SHAPES, write_shape
from benchmarks.tables import print_table
from course_lib import LLM, SamplingParams
from course_lib.engine.batch import ScheduledBatch, StepResult
from course_lib.measurements import measured_here, save_measurement
from course_lib.sizing import catalog, roofline

Row = dict[str, Any]


def params_of(length: int) -> SamplingParams:
    """Greedy, exactly that many tokens."""
    return SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)


class StepTimer:
    """Splits steps into the device's part and the rest, by wrapping the runner."""

    def __init__(self, llm: LLM) -> None:
        self.engine = llm.llm_engine
        self.runner: Any = self.engine.executor
        self._hidden, self._execute = self.runner._hidden, self.runner.execute
        self.launched = self.read = 0.0

    def __enter__(self) -> "StepTimer":
        def hidden(*args: Any) -> torch.Tensor:
            self.launched = time.perf_counter()
            return self._hidden(*args)

        def execute(batch: ScheduledBatch) -> StepResult:
            result = self._execute(batch)
            self.read = time.perf_counter()
            return result

        self.runner._hidden, self.runner.execute = hidden, execute
        return self

    def __exit__(self, *_: object) -> None:
        self.runner._hidden, self.runner.execute = self._hidden, self._execute

    def step(self) -> tuple[float, float]:
        """Seconds of one step, and of its device part."""
        start = time.perf_counter()
        self.engine.step()
        return time.perf_counter() - start, self.read - self.launched


def step_row(llm: LLM, folder: Path, batch: int, context: int, steps: int, copy: float) -> Row:
    """Decode steps of a fixed batch, at about that context."""
    engine = llm.llm_engine
    rng = random.Random(0)
    names = [str(i) for i in range(batch)]
    for name in names:
        prompt = [rng.randrange(engine.model_config.vocab_size) for _ in range(context)]
        engine.add_request(name, prompt, params_of(steps + 10))
    while engine.scheduler.waiting or any(
        r.num_computed_tokens < r.num_prompt_tokens for r in engine.scheduler.running
    ):
        engine.step()
    with StepTimer(llm) as timer:
        times = [timer.step() for _ in range(steps)][3:]
    engine.abort_request(names)
    step_ms = 1e3 * statistics.median(wall for wall, _ in times)
    device_ms = 1e3 * statistics.median(device for _, device in times)
    precision = "bf16" if engine.dtype.itemsize == 2 else "fp32"
    # Only the bandwidth counts here, and that is this machine's.
    gpu = replace(catalog.find_gpu("H100_80GB"), bandwidth_gb_s=copy)
    floor = roofline.decode(
        catalog.find_model(folder),
        gpu,
        batch,
        context + steps // 2,
        weights=precision,
        kv_bytes=engine.dtype.itemsize,
    )
    return {
        "batch": batch,
        "context_tokens": context,
        "step_ms": step_ms,
        "device_ms": device_ms,
        "host_ms": step_ms - device_ms,
        "host_share": (step_ms - device_ms) / step_ms,
        "floor_ms": 1e3 * floor.memory_s,
        "ratio_to_floor": step_ms / (1e3 * floor.memory_s),
    }


def copy_gb_s(device: str) -> float:
    """Bytes read and written by a large copy, a second."""
    size = 2**31 if device == "cuda" else 2**28
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size / min(times) / 1e9


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda: must be what PyTorch finds.")] = "cpu",
    shape: Annotated[str | None, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = None,
    eager: Annotated[bool, typer.Option(help="Without recorded decode steps.")] = False,
    record: Annotated[bool, typer.Option(help="Write data/measurements/.")] = False,
) -> None:
    """Time the steps and print them."""
    console = Console()
    on_gpu = device == "cuda"
    if on_gpu != torch.cuda.is_available():
        found = "a GPU" if torch.cuda.is_available() else "no GPU"
        console.print(f"--device {device} was asked for, and PyTorch sees {found}.")
        raise typer.Exit(1)
    shape = shape or ("qwen3-0.6b" if on_gpu else "tiny")
    if shape not in SHAPES:
        console.print(f"--shape must be one of {', '.join(SHAPES)}, got {shape}.")
        raise typer.Exit(1)
    copy = copy_gb_s(device)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_shape(shape, Path(scratch))
        llm = LLM(
            folder, load_format="dummy", max_model_len=4096, max_num_seqs=256,
            max_num_batched_tokens=8192, enable_prefix_caching=False, enforce_eager=eager,
        )  # fmt: skip
        console.print(llm.llm_engine)
        llm.generate([[1, 2, 3]] * 8, params_of(8))  # warm up
        sizes = ((1, 512), (32, 512), (256, 512), (32, 2048)) if on_gpu else ((1, 64), (64, 256))
        for batch, context in tqdm(sizes, "decode steps", leave=False):
            steps = 60 if on_gpu else 12
            rows.append({"shape": shape, **step_row(llm, folder, batch, context, steps, copy)})
    print_table(console, f"{shape}, decode steps", rows)
    measurement = measured_here("steps", rows, {"copy_gb_s": copy})
    console.print(f"copy {copy:.0f} GB/s, {measurement.origin}")
    if record:
        console.print(f"written to {save_measurement(measurement, shape)}")


if __name__ == "__main__":
    typer.run(main)
