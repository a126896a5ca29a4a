"""The benchmarks start as scripts and print what they promise; nothing here looks at times."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import cpu

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for the CPU on a machine with a GPU")
def test_the_engine_benchmark_prints_the_rates_of_the_shipped_model() -> None:
    result = run("benchmarks/engine.py", "--alone", "--rounds", "1", "--shape", "merchant-chat")
    assert result.returncode == 0, result.stderr
    for words in ("medians", "ours", "bfloat16", "W1", "W2", "W3", "ready_s", "ceiling_share"):
        assert words in result.stdout


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for the CPU on a machine with a GPU")
def test_the_benchmark_of_steps_prints_those_of_a_small_shape() -> None:
    result = run("benchmarks/steps.py")
    assert result.returncode == 0, result.stderr
    for words in ("decode steps", "ratio_to_floor", "copy", "torch"):
        assert words in result.stdout


@pytest.mark.skipif(cpu.why_not(torch.float32) is not None, reason="times the kernels in C++")
def test_the_benchmark_of_operations_prints_the_parts_of_each_workload() -> None:
    result = run("benchmarks/operations.py", "--shape", "merchant-chat")
    assert result.returncode == 0, result.stderr
    for words in ("W1", "W2", "W3", "paged_attention", "gated_linear", "forward, the rest"):
        assert words in result.stdout


def test_the_benchmark_of_the_scheduler_prints_its_times() -> None:
    result = run("benchmarks/scheduler.py", "--alone")
    assert result.returncode == 0, result.stderr
    for words in ("step_us", "lookup_us", "ours", "256 running requests"):
        assert words in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_without_a_gpu_the_benchmarks_that_need_one_say_so() -> None:
    kernels = run("benchmarks/kernels.py")
    assert kernels.returncode == 1
    assert "needs an NVIDIA GPU" in kernels.stdout
    for script in ("engine", "steps"):
        result = run(f"benchmarks/{script}.py", "--device", "cuda")
        assert result.returncode == 1
        assert "PyTorch sees no GPU" in result.stdout


def test_an_unknown_shape_is_refused_with_the_known_ones() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for script in ("engine", "steps", "operations"):
        options = [] if script == "operations" else ["--device", device]
        result = run(f"benchmarks/{script}.py", *options, "--shape", "gpt-5")
        assert result.returncode == 1
        assert "qwen3-0.6b, llama-3-8b, tiny, m120" in result.stdout
