"""The scheduler and the prefix cache beside vLLM's own, on the same requests and no model at all.

    make peers && python benchmarks/scheduler.py [--record]

Both schedulers get 256 requests and then decode; measured is the processor time of one `schedule()`
and one update, the median of 200 steps in which no request begins or ends. The prefix lookup is
what a new request of 4,096 tokens costs whose prompt is in the cache but for the last block: naming
its blocks, and finding them. Each engine runs in a process of its own, three times in turn.

Rows that are recorded: `engine`, `step_us`, `lookup_us`, medians.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

# A script's own folder is searched first, and there `kernels.py` would hide the package.
ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import typer
from rich.console import Console

from benchmarks.tables import print_table
from benchmarks.workloads import version_of

NUM_REQUESTS, PROMPT_TOKENS, STEPS = 256, 64, 200
LONG_PROMPT, BLOCK_SIZE = 4096, 32  # vLLM's blocks on a CPU are multiples of 32
CACHE_BLOCKS = 256 * 16
MAX_MODEL_LEN = LONG_PROMPT + 64

#: Tokens of a request, and what makes one of a name and its tokens.
MakeRequest = Callable[[str, list[int]], Any]


def prompt(number: int, length: int) -> list[int]:
    """Different from that of any other number."""
    return [(7 * number + 31 * place + number * place) % 509 for place in range(length)]


def measure(
    make: MakeRequest,
    add: Callable[[Any], None],
    step: Callable[[], float],
    lookup: Callable[[Any], int],
) -> dict[str, float]:
    """Drive either engine.

    Args:
        make: a request.
        add: queue it.
        step: one schedule and update; returns its seconds.
        lookup: cached tokens of a request.
    """
    add(make("long", prompt(0, LONG_PROMPT)))
    step()
    lookups = []
    for number in range(50):
        ids = prompt(0, LONG_PROMPT)
        start = time.process_time_ns()
        found = lookup(make(f"lookup-{number}", ids))
        lookups.append(time.process_time_ns() - start)
        assert found == LONG_PROMPT - BLOCK_SIZE, found
    for number in range(1, NUM_REQUESTS):
        add(make(str(number), prompt(number, PROMPT_TOKENS)))
    for _ in range(20):  # until all run
        step()
    times = [step() for _ in range(STEPS)]
    return {
        "step_us": 1e6 * statistics.median(times),
        "lookup_us": statistics.median(lookups) / 1e3,
    }


def ours() -> dict[str, float]:
    from course_lib.engine.batch import StepResult
    from course_lib.engine.block_pool import BlockPool
    from course_lib.engine.request import Request
    from course_lib.engine.sampling_params import SamplingParams
    from course_lib.engine.scheduler import Scheduler

    pool = BlockPool(CACHE_BLOCKS, BLOCK_SIZE)
    scheduler = Scheduler(
        pool, max_num_seqs=NUM_REQUESTS, max_num_batched_tokens=8192, max_model_len=MAX_MODEL_LEN
    )
    params = SamplingParams(max_tokens=STEPS + 50, ignore_eos=True)

    def step() -> float:
        start = time.process_time_ns()
        batch = scheduler.schedule()
        scheduled = time.process_time_ns()
        result = StepResult([[5] if entry.samples else [] for entry in batch.scheduled])
        made = time.process_time_ns()
        scheduler.update(batch, result)
        return (time.process_time_ns() - made + scheduled - start) / 1e9

    return measure(
        lambda name, ids: Request(name, ids, params),
        scheduler.add_request,
        step,
        lambda request: len(pool.match_prefix(request)) * BLOCK_SIZE,
    )


def vllm(folder: str) -> dict[str, float]:
    os.environ |= {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    from vllm import LLM, SamplingParams
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    llm = LLM(
        folder, load_format="dummy", skip_tokenizer_init=True, enforce_eager=True,
        max_model_len=MAX_MODEL_LEN, max_num_seqs=NUM_REQUESTS, max_num_batched_tokens=8192,
        block_size=BLOCK_SIZE, num_gpu_blocks_override=CACHE_BLOCKS, enable_prefix_caching=True,
    )  # fmt: skip
    core: Any = llm.llm_engine.engine_core.engine_core
    scheduler = core.scheduler
    params = SamplingParams(max_tokens=STEPS + 50, ignore_eos=True)

    def step() -> float:
        start = time.process_time_ns()
        output = scheduler.schedule()
        scheduled = time.process_time_ns()
        names = list(output.num_scheduled_tokens)
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: place for place, name in enumerate(names)},
            sampled_token_ids=[
                [5] if scheduler.requests[name].num_computed_tokens
                >= scheduler.requests[name].num_tokens else []
                for name in names
            ],
        )  # fmt: skip
        made = time.process_time_ns()
        scheduler.update_from_output(output, result)
        return (time.process_time_ns() - made + scheduled - start) / 1e9

    return measure(
        lambda name, ids: Request(name, ids, params, None, block_hasher=core.request_block_hasher),
        scheduler.add_request,
        step,
        lambda request: scheduler.kv_cache_manager.get_computed_blocks(request)[1],
    )


def run(engine: str, folder: Path) -> dict[str, Any]:
    """One engine in a process of its own."""
    peers = ROOT / ".venv-peers" / "bin" / "python"
    python = str(peers) if engine == "vllm" and peers.exists() else sys.executable
    done = subprocess.run(
        [python, __file__, "--engine", engine, "--folder", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["nothing on stderr"])[-1])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main(
    record: Annotated[bool, typer.Option(help="Write data/measurements/.")] = False,
    alone: Annotated[bool, typer.Option(help="Do not run vLLM.")] = False,
    engine: Annotated[str, typer.Option(hidden=True)] = "",
    folder: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Run both and print medians and the ratio."""
    if engine:
        found = ours() if engine == "ours" else vllm(folder)
        print(json.dumps({**found, "version": version_of("vllm") if engine == "vllm" else ""}))
        return
    from benchmarks.shapes import write_shape
    from course_lib.measurements import measured_here, save_measurement

    console = Console()
    results: dict[str, list[dict[str, Any]]] = {"ours": []} | ({} if alone else {"vllm": []})
    with tempfile.TemporaryDirectory() as scratch, console.status("running"):
        shape = write_shape("tiny", Path(scratch))
        for _ in range(3):
            for name in list(results):
                try:
                    results[name].append(run(name, shape))
                except RuntimeError as error:
                    if name == "ours":
                        raise
                    console.print(f"vLLM does not run: {error}", markup=False)
                    del results[name]
    rows: list[dict[str, Any]] = [
        {"engine": f"{name} {runs[-1]['version']}".strip()}
        | {field: statistics.median(r[field] for r in runs) for field in ("step_us", "lookup_us")}
        for name, runs in results.items()
    ]
    print_table(console, f"{NUM_REQUESTS} running requests, a prompt of {LONG_PROMPT}", rows)
    if len(rows) == 2:
        parts = ", ".join(
            f"{field} {rows[0][field] / rows[1][field]:.2f}" for field in ("step_us", "lookup_us")
        )
        console.print(f"ours as a share of vLLM's: {parts} (target: at most 0.5)")
    measurement = measured_here("scheduler", rows)
    console.print(measurement.origin)
    if record:
        console.print(f"written to {save_measurement(measurement)}")


if __name__ == "__main__":
    typer.run(main)
