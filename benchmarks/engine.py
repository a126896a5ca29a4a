"""The whole engine: tokens a second, and where the time of a decode step goes.

    python benchmarks/engine.py --device cuda [--shape llama-3-8b] [--record]

Throughput: 256 requests of random tokens, prompt and reply lengths uniform 100 to 1024, seed 0,
`ignore_eos`; beside transformers' `generate` (static batches) and, where it is installed, vLLM, on
the same random-weight shape. Steps: decode at fixed batch sizes and contexts, wall time a step and
its device part, from the first launch to the tokens on the host; the rest is host time that the
device spends waiting. The floor is that of `sizing.roofline` at the copy bandwidth measured in the
same run.

On a CPU the defaults are small and only show that it runs.
Rows that are recorded: `part` "throughput" with `engine`, `output_tokens_per_s`; or `part` "step"
with `batch`, `context_tokens`, `step_ms`, `device_ms`, `host_ms`, `floor_ms`, `ratio_to_floor`.
"""

import gc
import importlib.util
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
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


def workload(
    vocab_size: int, num_requests: int, low: int, high: int
) -> tuple[list[list[int]], list[int]]:
    """Prompts and reply lengths."""
    rng = random.Random(0)
    prompts = [
        [rng.randrange(vocab_size) for _ in range(rng.randint(low, high))]
        for _ in range(num_requests)
    ]
    return prompts, [rng.randint(low, high) for _ in range(num_requests)]


def params_of(length: int) -> SamplingParams:
    """Greedy, exactly that many tokens."""
    return SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)


def ours(llm: LLM, prompts: list[list[int]], lengths: list[int]) -> float:
    """Output tokens/s of this engine."""
    start = time.perf_counter()
    llm.generate(prompts, [params_of(length) for length in lengths])
    return sum(lengths) / (time.perf_counter() - start)


def transformers_tokens_per_s(
    folder: Path, device: str, prompts: list[list[int]], lengths: list[int], batch: int
) -> float:
    """Output tokens/s of `generate` in static batches, sorted by length so that it pads little.

    Each batch runs to its longest reply; only the tokens that were asked for count.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=dtype, attn_implementation="sdpa"
        )
    model.eval()
    order = sorted(range(len(prompts)), key=lambda i: lengths[i])
    start = time.perf_counter()
    for first in tqdm(range(0, len(order), batch), "transformers", leave=False):
        chosen = order[first : first + batch]
        width = max(len(prompts[i]) for i in chosen)
        ids = torch.zeros(len(chosen), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        longest = max(lengths[i] for i in chosen)
        model.generate(
            ids.to(device), attention_mask=mask.to(device), do_sample=False,
            min_new_tokens=longest, max_new_tokens=longest, pad_token_id=0,
        )  # fmt: skip
    return sum(lengths) / (time.perf_counter() - start)


def vllm_tokens_per_s(folder: Path, prompts: list[list[int]], lengths: list[int]) -> float:
    """Output tokens/s of vLLM, with random weights and the same options."""
    import vllm

    llm = vllm.LLM(
        str(folder), load_format="dummy", skip_tokenizer_init=True, max_model_len=4096,
        enable_prefix_caching=False,
    )  # fmt: skip
    params = [
        vllm.SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
        for n in lengths
    ]
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    llm.generate(requests[:4], params[:4])
    start = time.perf_counter()
    llm.generate(requests, params)
    return sum(lengths) / (time.perf_counter() - start)


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
        "part": "step",
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


def peers(
    folder: Path, device: str, prompts: list[list[int]], lengths: list[int]
) -> Iterator[tuple[str, float]]:
    """Other engines that are installed here."""
    if importlib.util.find_spec("transformers"):
        batch = 64 if device == "cuda" else 8
        yield "transformers", transformers_tokens_per_s(folder, device, prompts, lengths, batch)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    if importlib.util.find_spec("vllm"):
        yield "vllm", vllm_tokens_per_s(folder, prompts, lengths)


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda: must be what PyTorch finds.")] = "cpu",
    shape: Annotated[str | None, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="256 on a GPU, 16 else.")] = None,
    eager: Annotated[bool, typer.Option(help="Without CUDA graphs.")] = False,
    alone: Annotated[bool, typer.Option(help="Do not run the peers.")] = False,
    record: Annotated[bool, typer.Option(help="Write data/measurements/.")] = False,
) -> None:
    """Run the workload and the steps, and print both."""
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
    num_requests = requests or (256 if on_gpu else 16)
    low, high = (100, 1024) if on_gpu else (16, 64)
    copy = copy_gb_s(device)
    rates: list[Row] = []
    steps: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_shape(shape, Path(scratch))
        start = time.perf_counter()
        llm = LLM(
            folder, load_format="dummy", max_model_len=4096, max_num_seqs=256,
            max_num_batched_tokens=8192, enable_prefix_caching=False, enforce_eager=eager,
        )  # fmt: skip
        console.print(f"{llm.llm_engine}, ready in {time.perf_counter() - start:.1f} s")
        prompts, lengths = workload(llm.llm_engine.model_config.vocab_size, num_requests, low, high)
        ours(llm, prompts[:8], [8] * len(prompts[:8]))  # warm up
        rate = ours(llm, prompts, lengths)
        rates.append({"part": "throughput", "engine": "ours", "output_tokens_per_s": rate})
        sizes = ((1, 512), (32, 512), (256, 512), (32, 2048)) if on_gpu else ((1, 64), (16, 64))
        for batch, context in tqdm(sizes, "decode steps", leave=False):
            steps.append(step_row(llm, folder, batch, context, 60 if on_gpu else 12, copy))
        del llm
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        if not alone:
            for name, rate in peers(folder, device, prompts, lengths):
                rates.append({"part": "throughput", "engine": name, "output_tokens_per_s": rate})
    print_table(console, f"{shape}, whole workload", rates)
    print_table(console, f"{shape}, decode steps", steps)
    rows = [{"shape": shape, **row} for row in rates + steps]
    measurement = measured_here("engine", rows, {"copy_gb_s": copy})
    console.print(
        f"{num_requests} requests of {low} to {high} tokens, copy {copy:.0f} GB/s, "
        f"{measurement.origin}"
    )
    if record:
        console.print(f"written to {save_measurement(measurement, shape)}")


if __name__ == "__main__":
    typer.run(main)
