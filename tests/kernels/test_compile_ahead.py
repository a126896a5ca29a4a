"""Each kernel compiles for the GPUs of the course without one, and fits into their memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

#: Shared memory that one program may have, in bytes (CUDA C++ Programming Guide, table of compute
#: capabilities).
SHARED_BYTES = {(7, 5): 64 * 1024, (8, 0): 163 * 1024, (9, 0): 227 * 1024}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def variants() -> list[dict[str, Any]]:
    pytest.importorskip("triton", reason="Triton is published for Linux only")
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_ahead"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-300:] + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_for_every_gpu(variants: list[dict[str, Any]]) -> None:
    kernels = {
        "_attention_kernel",
        "_combine_kernel",
        "_rope_and_cache_kernel",
        "_rms_norm_kernel",
        "_silu_and_mul_kernel",
    }
    for capability, dtypes in (
        ((7, 5), {"fp16", "fp32"}),
        ((8, 0), {"fp16", "bf16", "fp32"}),
        ((9, 0), {"fp16", "bf16", "fp32"}),
    ):
        here = [v for v in variants if tuple(v["capability"]) == capability]
        assert {(v["kernel"], v["dtype"]) for v in here} == {
            (k, d) for k in kernels for d in dtypes
        }
        tiles = {v["tile"][0] for v in here if v["kernel"] == "_attention_kernel"}
        assert tiles >= ({16, 32} if capability == (7, 5) else {16, 32, 64, 128})


def test_shared_memory_suffices(variants: list[dict[str, Any]]) -> None:
    for variant in variants:
        assert variant["shared_bytes"] <= SHARED_BYTES[tuple(variant["capability"])], variant


def test_sixteen_bit_products_run_on_tensor_cores_and_exact_ones_do_not(
    variants: list[dict[str, Any]],
) -> None:
    """Tensor cores would round float32 to TF32; for 7.5 Triton has no code for them."""
    for variant in variants:
        expected = (
            variant["kernel"] == "_attention_kernel"
            and variant["dtype"] != "fp32"
            and variant["capability"] >= [8, 0]
        )
        assert variant["tensor_cores"] == expected, variant


def test_registers_are_not_spilled(variants: list[dict[str, Any]]) -> None:
    """A few bytes of stack are addresses that the compiler keeps there, not the tiles' rows."""
    measured = [v for v in variants if v["registers_and_stack"] is not None]
    if not measured:
        pytest.skip("this build of Triton comes without cuobjdump")
    for variant in measured:
        assert variant["registers_and_stack"][1] <= 32, variant
