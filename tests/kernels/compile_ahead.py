"""Compiles every kernel for GPUs that this machine does not have; one JSON line a variant.

Run it as `TRITON_INTERPRET=0 python -m tests.kernels.compile_ahead`. The functions that launch
kernels are called on tensors without contents, with recorders in the kernels' places; each recorded
launch is then compiled as Triton would there.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import paged_attention, rms_norm, rope_and_cache, silu_and_mul

CAPABILITIES = ((7, 5), (8, 0), (9, 0))
MODULES = (paged_attention, rms_norm, rope_and_cache, silu_and_mul)
TYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

empty = partial(torch.empty, device="meta")


class Recorder:
    """Takes the place of a kernel and keeps the arguments of its launches."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, tuple, dict[str, Any]]]) -> None:
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, _grid: Any) -> Callable[..., None]:
        def record(*args: Any, **options: Any) -> None:
            self.launches.append((self.kernel, args, options))

        return record


@contextmanager
def recorded_launches(
    capability: tuple[int, int],
) -> Iterator[list[tuple[Any, tuple, dict[str, Any]]]]:
    """In here nothing is launched, and the GPU is taken for one of that capability."""
    launches: list[tuple[Any, tuple, dict[str, Any]]] = []
    changes = [patch.object(paged_attention, "_gpu", lambda _device: (capability, 132))]
    for module in MODULES:
        for name, value in vars(module).items():
            if name.endswith("_kernel") and isinstance(value, triton.JITFunction):
                changes.append(patch.object(module, name, Recorder(value, launches)))
    for change in changes:
        change.start()
    yield launches
    for change in changes:
        change.stop()


def compiled(kernel: Any, args: tuple, options: dict[str, Any], capability: tuple[int, int]) -> Any:
    """What Triton's launcher makes of these arguments: 1 and multiples of 16 are compiled in."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | options
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, values.pop(parameter.name)
        compiled_in = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or (compiled_in and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPE_NAMES[value.dtype]
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
        if isinstance(value, torch.Tensor) or (compiled_in and value % 16 == 0):
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    return triton.compile(source, target=target, options=values)


def attend(
    dtype: torch.dtype,
    head_dim: int,
    num_tokens: int,
    num_requests: int,
    *,
    num_heads: int = 32,
    num_kv_heads: int = 8,
    block_size: int = 16,
    sliding_window: int | None = None,
    num_splits: int = 1,
) -> None:
    cache = empty(64, block_size, num_kv_heads, head_dim, dtype=dtype)
    paged_attention.launch_paged_attention(
        empty(num_tokens, num_heads, head_dim, dtype=dtype),
        cache,
        cache,
        empty(num_requests, 128, dtype=torch.int32),
        empty(num_requests, dtype=torch.int32),
        empty(num_requests + 1, dtype=torch.int32),
        scale=0.1,
        sliding_window=sliding_window,
        num_splits=num_splits,
    )


def rotate(dtype: torch.dtype, head_dim: int, norm: bool) -> None:
    cache = empty(64, 16, 8, head_dim, dtype=dtype)
    weight = empty(head_dim, dtype=dtype) if norm else None
    rope_and_cache.rope_and_cache(
        empty(4, 48 * head_dim, dtype=dtype),
        empty(4, dtype=torch.int64),
        empty(100, 2, head_dim // 2),
        cache,
        cache,
        empty(4, dtype=torch.int64),
        weight,
        weight,
        1e-5,
    )


def normalise(dtype: torch.dtype, size: int, add: bool) -> None:
    x = empty(4, size, dtype=dtype)
    rms_norm.rms_norm(x, empty(size, dtype=dtype), 1e-5, x if add else None)


def launches_of(dtype: torch.dtype) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """Name, head_dim or row size, and a call that launches.

    Everything for float16; for the others what their size or their arithmetic makes different.
    """
    head_dims = {torch.float16: (64, 80, 128, 256), torch.float32: (64, 128, 256)}
    for head_dim in head_dims.get(dtype, (128,)):
        run = partial(attend, dtype, head_dim)
        yield "decode", head_dim, partial(run, 4, 4)
        yield "decode, split", head_dim, partial(run, 4, 4, num_splits=8)
        yield "prefill", head_dim, partial(run, 2048, 4)
    for norm in (False, True):
        yield "with norm" if norm else "plain", 128, partial(rotate, dtype, 128, norm)
    for size in (1000, 8192):
        yield "alone", size, partial(normalise, dtype, size, False)
        yield "with residual", size, partial(normalise, dtype, size, True)
    gate_up = empty(4, 2 * 11008, dtype=dtype)
    yield "rows", 11008, partial(silu_and_mul.silu_and_mul, gate_up)
    if dtype != torch.float16:
        return
    run = partial(attend, dtype, 128)
    for rows in (32, 64):
        yield f"{rows} rows", 128, partial(run, rows, 4)
    for rows in (4, 2048):
        yield f"{rows} tokens, window", 128, partial(run, rows, 4, sliding_window=1000)
        yield f"{rows} tokens, blocks of 12", 128, partial(run, rows, 4, block_size=12)
    yield "a group of 64", 128, partial(run, 4, 4, num_heads=64, num_kv_heads=1)
    yield "prefill, a group of 7", 128, partial(run, 2048, 4, num_heads=28, num_kv_heads=4)
    for head_dim in (64, 80, 256):
        yield "with norm", head_dim, partial(rotate, dtype, head_dim, True)


def registers_and_stack(cubin: bytes) -> tuple[int, int] | None:
    """Registers and bytes of stack that a thread takes; None without NVIDIA's tool to say so."""
    if not TOOL.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOL), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return None if found is None else (int(found[1]), int(found[2]))


def main() -> None:
    for capability in CAPABILITIES:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            if dtype == torch.bfloat16 and capability < (8, 0):
                continue
            for name, size, launch in launches_of(dtype):
                with recorded_launches(capability) as launches:
                    launch()
                for kernel, args, options in launches:
                    result = compiled(kernel, args, options, capability)
                    line = {
                        "kernel": kernel.__name__,
                        "variant": name,
                        "capability": capability,
                        "dtype": TYPE_NAMES[dtype],
                        "size": size,
                        "tile": [options.get("BLOCK_M"), options.get("BLOCK_N")],
                        "shared_bytes": result.metadata.shared,
                        "tensor_cores": "mma" in result.asm["ptx"],
                        "registers_and_stack": registers_and_stack(result.asm["cubin"]),
                    }
                    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
