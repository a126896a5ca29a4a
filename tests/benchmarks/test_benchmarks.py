"""The benchmarks start as scripts and print what they promise; nothing here looks at times."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
def test_the_engine_benchmark_prints_rates_and_steps_of_a_small_shape() -> None:
    result = run("benchmarks/engine.py", "--alone", "--requests", "4")
    assert result.returncode == 0, result.stderr
    for words in ("whole workload", "ours", "decode steps", "ratio_to_floor", "copy", "torch"):
        assert words in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_without_a_gpu_the_benchmarks_that_need_one_say_so() -> None:
    kernels = run("benchmarks/kernels.py")
    assert kernels.returncode == 1
    assert "needs an NVIDIA GPU" in kernels.stdout
    engine = run("benchmarks/engine.py", "--device", "cuda")
    assert engine.returncode == 1
    assert "PyTorch sees no GPU" in engine.stdout


def test_an_unknown_shape_is_refused_with_the_known_ones() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = run("benchmarks/engine.py", "--device", device, "--shape", "gpt-5")
    assert result.returncode == 1
    assert "qwen3-0.6b, llama-3-8b, tiny" in result.stdout
