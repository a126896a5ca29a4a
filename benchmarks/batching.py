"""Continuous batching against one request at a time, through the same engine.

    python benchmarks/batching.py [--model data/models/merchant-chat]

64 requests of mixed prompt and reply lengths run twice: one after another, and all at once. Only
`max_num_seqs` differs. Prints output tokens/s of both and the ratio.
"""

import platform
import random
import sys
import time
from datetime import date
from pathlib import Path
from typing import Annotated

# A script's own folder is searched first, and there `kernels.py` would hide the package.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import typer
from rich.console import Console
from rich.table import Table

from course_lib import LLM, SamplingParams
from course_lib.data import DEFAULT_MODEL

NUM_REQUESTS = 64


def workload(vocab_size: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of 16 to 256 random tokens, replies of 16 to 128, uniform, seed 0."""
    rng = random.Random(0)
    prompts, params = [], []
    for _ in range(NUM_REQUESTS):
        prompts.append([rng.randrange(vocab_size) for _ in range(rng.randint(16, 256))])
        params.append(
            SamplingParams(temperature=0, max_tokens=rng.randint(16, 128), ignore_eos=True)
        )
    return prompts, params


def output_tokens_per_s(llm: LLM, max_num_seqs: int) -> tuple[float, list[list[int]]]:
    """Rate of the whole workload, and the tokens it gave."""
    llm.llm_engine.scheduler.max_num_seqs = max_num_seqs
    prompts, params = workload(llm.llm_engine.model_config.vocab_size)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    elapsed_s = time.perf_counter() - start
    tokens = [output.outputs[0].token_ids for output in outputs]
    return sum(map(len, tokens)) / elapsed_s, tokens


def main(
    model: Annotated[Path, typer.Option(help="Checkpoint directory.")] = DEFAULT_MODEL,
    rounds: Annotated[int, typer.Option(min=1, help="Both ways this often; best counts.")] = 3,
) -> None:
    """Run both ways in turn and print the rates."""
    # Prefix caching would let the second run reuse the first one's blocks.
    llm = LLM(model, enable_prefix_caching=False)
    rates: dict[int, float] = {}
    tokens: dict[int, list[list[int]]] = {}
    for _ in range(rounds):
        for max_num_seqs in (1, NUM_REQUESTS):
            rate, tokens[max_num_seqs] = output_tokens_per_s(llm, max_num_seqs)
            rates[max_num_seqs] = max(rate, rates.get(max_num_seqs, 0.0))
    same = sum(a == b for a, b in zip(tokens[1], tokens[NUM_REQUESTS], strict=True))

    table = Table("running at once", "output tokens/s", title=f"{NUM_REQUESTS} mixed requests")
    for max_num_seqs, rate in rates.items():
        table.add_row(str(max_num_seqs), f"{rate:.0f}")
    console = Console()
    console.print(table)
    console.print(f"ratio {rates[NUM_REQUESTS] / rates[1]:.2f} (target: at least 5)")
    console.print(f"replies equal in both runs: {same} of {NUM_REQUESTS}")
    console.print(
        f"{model.name} in {llm.llm_engine.dtype}, {llm.llm_engine.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {date.today()}"
    )


if __name__ == "__main__":
    typer.run(main)
