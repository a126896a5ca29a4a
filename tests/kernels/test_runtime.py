"""How Triton is found: compiled, interpreted or missing. Each case is a new Python process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from course_lib.data import DEFAULT_MODEL

BLOCK_TRITON = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""
#: As where there is no GPU, whatever this machine has.
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
LAUNCH = """
import torch
from kernels.silu_and_mul import silu_and_mul
print(silu_and_mul(torch.tensor([[1000.0, 3.0]])).item())
"""
LAUNCH_ATTENTION = """
import torch
from kernels.paged_attention import paged_attention
tables = [torch.tensor(t, dtype=torch.int32) for t in ([[0]], [1], [0, 1])]
cache = torch.ones(1, 8, 1, 16)
print(paged_attention(torch.ones(1, 1, 16), cache, cache, *tables, scale=1.0).sum().item())
"""
SERVE = f"""
from course_lib import LLM, SamplingParams
llm = LLM({str(DEFAULT_MODEL)!r}, max_model_len=64)
params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
(output,) = llm.generate([[5, 6, 7]], params, use_tqdm=False)
print(len(output.outputs[0].token_ids))
"""
SERVE_TRITON = SERVE.replace("max_model_len", "attention_backend='TRITON_ATTN', max_model_len")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A new process, in which nobody has set how Triton runs."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env=inherited | NO_GPU | environment,
        capture_output=True,
        text=True,
    )


def output_of(code: str, **environment: str) -> str:
    done = run(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def error_of(code: str, **environment: str) -> str:
    done = run(code, **environment)
    assert done.returncode != 0, done.stdout
    return done.stderr.splitlines()[-1]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _triton() -> None:
    pytest.importorskip("triton", reason="Triton is published for Linux only")


def test_without_a_gpu_kernels_run_with_nothing_set() -> None:
    assert output_of(LAUNCH_ATTENTION + LAUNCH).split() == ["16.0", "3000.0"]


def test_what_the_user_set_stays() -> None:
    code = "import os, kernels.runtime as r; print(r.INTERPRETED, os.environ['TRITON_INTERPRET'])"
    assert output_of(code, TRITON_INTERPRET="0") == "False 0"


IMPORTED_FIRST = "there is no GPU, and Triton was imported before its interpreter could be switched"


def test_triton_imported_too_early_is_named_at_the_launch_with_what_helps() -> None:
    error = error_of("import triton\n" + LAUNCH_ATTENTION)
    assert error.startswith("RuntimeError: " + IMPORTED_FIRST), error
    assert "run `from course_lib import LLM` before" in error
    assert "or set TRITON_INTERPRET=1" in error
    assert output_of("from course_lib import LLM\nimport triton\n" + LAUNCH) == "3000.0"
    assert output_of("import triton\n" + LAUNCH, TRITON_INTERPRET="1") == "3000.0"


def test_triton_imported_too_early_does_not_disturb_the_pytorch_engine() -> None:
    assert output_of("import triton\n" + SERVE) == "3"
    assert IMPORTED_FIRST in error_of("import triton\n" + SERVE_TRITON)


def test_without_triton_the_pytorch_engine_works() -> None:
    assert output_of(BLOCK_TRITON + SERVE) == "3"


@pytest.mark.parametrize("launch", [LAUNCH_ATTENTION, SERVE_TRITON], ids=["kernel", "engine"])
def test_without_triton_a_launch_says_what_is_missing(launch: str) -> None:
    error = error_of(BLOCK_TRITON + launch)
    assert "this needs Triton, which is published for Linux only" in error
    assert "attention_backend='TORCH_SDPA'" in error
