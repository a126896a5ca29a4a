"""The benchmark of cold starts measures real loads and starts, and refuses what it cannot do."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/cold_start.py", *options],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "300"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.mark.slow
def test_it_loads_a_layer_cold_and_warm_and_starts_the_server(tmp_path: Path) -> None:
    result = run(
        "--shape=Qwen3-0.6B",
        "--at-most-gb=0.1",
        "--rounds=1",
        "--starts=1",
        f"--scratch={tmp_path}",
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"load │ Qwen3-0\.6B │ 1 +│ 28 .*│ True ", result.stdout)
    assert re.search(r"load │ Qwen3-0\.6B │ 3 +│ 28 .*│ False ", result.stdout)
    assert re.search(r"starts │ merchant-chat-\S+\.log │ 1 ", result.stdout)
    assert not list(tmp_path.iterdir())


def test_an_unknown_shape_and_a_limit_below_a_layer_are_refused() -> None:
    unknown = run("--shape=gpt-5")
    assert unknown.returncode == 1 and "--shape must be a model of" in unknown.stdout
    small = run("--shape=Llama-3-70B", "--at-most-gb=0.5")
    assert small.returncode == 1
    assert "nothing was measured: one layer has 1.71 GB" in small.stdout
