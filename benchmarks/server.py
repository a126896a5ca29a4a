"""What HTTP costs: a workload through `course serve`, and the same through `LLM.generate`.

    OMP_NUM_THREADS=1 python benchmarks/server.py [--users 64] [--device cuda] [--record]

Random prompts, replies of a fixed length, greedy, `ignore_eos`. Through HTTP each user streams and
sends its next request when the last one has ended; offline all requests are in one batch of as many
sequences. Server and client are processes of their own, and both ways alternate, so that whatever
else the machine does meets both; the rates are medians. Target: at least 85 % of the offline rate
at 64 users on the shipped model.

Rows that are recorded: `path` "offline" or "http", `requests_per_s`, `output_tokens_per_s`.
"""

import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

# A script's own folder is searched first, and there `kernels.py` would hide the package.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import typer
from rich.console import Console

from benchmarks.tables import print_table
from course_lib import LLM, SamplingParams
from course_lib.data import DEFAULT_MODEL
from course_lib.measurements import measured_here, save_measurement
from course_lib.serving.load_client import Workload, load

Row = dict[str, Any]


@contextmanager
def course_serve(model: Path, *options: str) -> Iterator[str]:
    """A server in a process of its own; gives its URL."""
    command = [sys.executable, "-c", "from course_lib.cli import app; app()", "serve"]
    process = subprocess.Popen(
        [*command, "--model", str(model), "--port", "0", *options],
        cwd=sys.path[0],
        env={**os.environ, "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"on (http://\S+)", line):
                yield found[1]
                break
        else:
            raise typer.Exit(1)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def offline(llm: LLM, workload: Workload) -> Row:
    """All requests through `LLM.generate`."""
    planned = list(workload.requests())
    params = [
        SamplingParams(temperature=0, ignore_eos=True, max_tokens=plan.output_tokens)
        for plan in planned
    ]
    start = time.perf_counter()
    llm.generate([plan.prompt for plan in planned], params, use_tqdm=False)
    wall_s = time.perf_counter() - start
    num_tokens = sum(plan.output_tokens for plan in planned)
    return {"requests_per_s": len(planned) / wall_s, "output_tokens_per_s": num_tokens / wall_s}


def over_http(url: str, workload: Workload) -> Row:
    """The same requests, streamed."""
    report = load(url, workload, show_progress=False)
    if report.outcomes != {"ok": report.workload["num_requests"]}:
        raise SystemExit(f"not every request was served: {report.reasons}")
    return {
        "requests_per_s": report.requests_per_s,
        "output_tokens_per_s": report.output_tokens_per_s,
    }


def main(
    users: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 64,
    requests: Annotated[int, typer.Option(min=1, help="In each run.")] = 192,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    output_tokens: Annotated[int, typer.Option(min=1)] = 128,
    runs: Annotated[int, typer.Option(min=1, help="Of each way, alternating.")] = 3,
    model: Annotated[Path, typer.Option(help="Checkpoint directory.")] = DEFAULT_MODEL,
    record: Annotated[bool, typer.Option(help="Save the rows under data/measurements.")] = False,
) -> None:
    console = Console()
    llm = LLM(model, max_num_seqs=users, enable_prefix_caching=False)
    vocab_size = llm.llm_engine.model_config.vocab_size

    def workload(seed: int) -> Workload:  # other prompts each time: the server caches prefixes
        return Workload(
            users=users, num_requests=requests, prompt_tokens=prompt_tokens,
            output_tokens=output_tokens, vocab_size=vocab_size, seed=seed,
        )  # fmt: skip

    measured: dict[str, list[Row]] = {"offline": [], "http": []}
    with course_serve(model, "--max-num-seqs", str(users)) as url:
        over_http(url, workload(0))  # the first run is slower everywhere
        for run in range(1, runs + 1):
            measured["offline"].append(offline(llm, workload(run)))
            measured["http"].append(over_http(url, workload(run)))
    rows = [
        {"path": path, **{k: statistics.median(row[k] for row in found) for k in found[0]}}
        for path, found in measured.items()
    ]
    print_table(console, Path(llm.llm_engine.config.model).name, rows)
    ratio = rows[1]["output_tokens_per_s"] / rows[0]["output_tokens_per_s"]
    console.print(f"through HTTP: {ratio:.0%} of the offline rate, at {users} streaming users")
    if record:
        console.print(f"written to {save_measurement(measured_here('server', rows))}")


if __name__ == "__main__":
    typer.run(main)
