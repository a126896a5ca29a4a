"""Where the time of a workload goes on a CPU: each kernel, what lies between them, and the host.

    python benchmarks/operations.py [--shape m120] [--dtype float32]

Runs W1 to W3 of `workloads.py` through this engine, with a clock around each kernel in C++ and
around the parts of a step. `forward, the rest` is what Python and PyTorch do between kernels, the
embedding among it; `inputs and sampling` lies around the forward pass in the runner, and
`scheduler, outputs` is the rest of a step and the loop around it.
"""

import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

# A script's own folder is searched first, and there `kernels.py` would hide the package.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import typer
from rich.console import Console
from tqdm import tqdm

from benchmarks.shapes import SHAPES
from benchmarks.tables import print_table
from benchmarks.workloads import MAX_MODEL_LEN, Workload, workloads, write_checkpoint
from course_lib import LLM, SamplingParams
from course_lib.data import DEFAULT_MODEL
from course_lib.measurements import measured_here
from kernels import cpu
from kernels.cpu import recording
from kernels.cpu.build import kernels

SHIPPED = "merchant-chat"


class Clock:
    """Adds up the seconds that functions take, by a name for each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[name] += time.perf_counter() - start
            return result

        return timed


def generate(llm: LLM, workload: Workload) -> float:
    """Seconds that it takes."""
    params = [
        SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        for count in workload.output_tokens
    ]
    start = time.perf_counter()
    llm.generate([{"prompt_token_ids": p} for p in workload.prompts], params, use_tqdm=False)
    return time.perf_counter() - start


def parts_of(workload: Workload, folder: Path, dtype: str) -> dict[str, float]:
    """Seconds of each part; the engine's kernels are replaced by timed ones."""
    llm = LLM(
        folder,
        dtype=dtype,
        max_model_len=MAX_MODEL_LEN["cpu"],
        enable_prefix_caching=workload.shared_prefix,
        block_size=32 if workload.shared_prefix else 16,
        attention_backend="CPU_ATTN",
    )
    runner: Any = llm.llm_engine.executor
    clock = Clock()
    names = [name for name, key in kernels() if key == llm.llm_engine.dtype]
    timed = {
        (name, key): clock.around(name, function) if key == llm.llm_engine.dtype else function
        for (name, key), function in kernels().items()
    }
    runner.execute = clock.around("execute", runner.execute)
    runner._hidden = clock.around("forward", runner._hidden)
    runner.decoder.logits = clock.around("forward", runner.decoder.logits)
    original, recording.kernels = recording.kernels, lambda: timed
    try:
        generate(llm, workload.with_other_tokens(llm.llm_engine.model_config.vocab_size))
        clock.seconds.clear()
        total = generate(llm, workload)
    finally:
        recording.kernels = original
    seconds = {name: clock.seconds[name] for name in names if name in clock.seconds}
    forward, execute = clock.seconds["forward"], clock.seconds["execute"]
    return {
        **dict(sorted(seconds.items(), key=lambda item: -item[1])),
        "forward, the rest": forward - sum(seconds.values()),
        "inputs and sampling": execute - forward,
        "scheduler, outputs": total - execute,
    }


def main(
    shape: Annotated[str, typer.Option(help=f"{SHIPPED}, {', '.join(SHAPES)}.")] = "tiny",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
) -> None:
    """Time the parts and print them."""
    console = Console()
    if shape not in (SHIPPED, *SHAPES):
        console.print(f"--shape must be one of {SHIPPED}, {', '.join(SHAPES)}, got {shape}.")
        raise typer.Exit(1)
    reason = cpu.why_not(getattr(torch, dtype))
    if reason is not None:
        console.print(f"The kernels of a CPU are not there: {reason}.")
        raise typer.Exit(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (
            DEFAULT_MODEL if shape == SHIPPED else write_checkpoint(shape, dtype, Path(scratch))
        )
        vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
        for workload in tqdm(workloads(vocab_size, "cpu", ["W1", "W2", "W3"]), shape, leave=False):
            parts = parts_of(workload, folder, dtype)
            total = sum(parts.values())
            rate = sum(workload.output_tokens) / total
            print_table(
                console,
                f"{shape}, {dtype}, {workload.name}: {rate:.0f} output tokens/s",
                [
                    {"part": part, "ms": 1000 * seconds, "% of the time": 100 * seconds / total}
                    for part, seconds in parts.items()
                ],
            )
    console.print(measured_here("operations", [], {}).origin)


if __name__ == "__main__":
    typer.run(main)
