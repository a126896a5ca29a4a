"""The kernels against what the GPU can do: bandwidth for decode, flops for prefill.

    python benchmarks/kernels.py [--record] [--quick] [--tune]

Decode is bound by memory: achieved GB/s count each key, value, query and output once, and the share
is of the bandwidth that a device-to-device copy reaches in the same run. Prefill is bound by
compute: TFLOP/s of the causal half, beside PyTorch's FlashAttention on the same data. The small
kernels are compared with their PyTorch expressions. Runs rotate over enough pages that the L2 cache
does not hold them; calls are replayed from a CUDA graph, so that launching costs nothing.

Rows that are recorded: `kernel`, `shape`, sizes, `time_us`, and `gb_s` with `share_of_copy`, or
`tflop_s` with `ratio_to_sdpa`.
"""

import itertools
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

# A script's own folder is searched first, and there this file would hide the package.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from benchmarks.tables import print_table
from course_lib.measurements import measured_here, save_measurement
from kernels.paged_attention import Tiles, launch_paged_attention
from kernels.rms_norm import rms_norm, rms_norm_reference
from kernels.rope_and_cache import rope_and_cache, rope_and_cache_reference
from kernels.silu_and_mul import silu_and_mul, silu_and_mul_reference

Row = dict[str, Any]
DTYPE = (
    torch.bfloat16
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    else torch.float16
)
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Heads:
    """Attention shape of a model."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int


SHAPES = (Heads("Llama-3-8B", 32, 8, 128), Heads("Qwen3-0.6B", 16, 8, 128))


def time_us(calls: list[Callable[[], Any]], repeats: int = 15) -> float:
    """Median time of one call in microseconds; `calls` do the same work on different memory."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[3:])


def copy_gb_s() -> float:
    """Bytes read and written by a large device-to-device copy, a second."""
    size = min(4 * 2**30, torch.cuda.mem_get_info()[0] // 4)
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    source.random_()
    return 2 * size / time_us([lambda: target.copy_(source)]) / 1e3


class Pages:
    """A cache that fills a good part of the memory, from which each call takes other pages."""

    def __init__(self, heads: Heads, max_tokens: int) -> None:
        per_token = 2 * heads.num_kv_heads * heads.head_dim * DTYPE.itemsize
        self.num_blocks = min(
            max_tokens // BLOCK_SIZE, torch.cuda.mem_get_info()[0] // 2 // per_token // BLOCK_SIZE
        )
        shape = (self.num_blocks, BLOCK_SIZE, heads.num_kv_heads, heads.head_dim)
        self.k, self.v = (torch.empty(shape, dtype=DTYPE, device="cuda") for _ in range(2))
        for cache in (self.k, self.v):  # random in pieces: zeros would be faster than real data
            for piece in cache.split(65536):
                piece.normal_()
        self.order = torch.randperm(self.num_blocks, device="cuda", dtype=torch.int32)

    def tables(self, batch: int, context: int, start: int) -> torch.Tensor:
        """Block tables of `batch` requests from the shuffled pages, beginning at `start`."""
        width = -(-context // BLOCK_SIZE)
        index = (torch.arange(batch * width, device="cuda") + start) % self.num_blocks
        return self.order[index].view(batch, width)


def attention_calls(
    heads: Heads, pages: Pages, queries: int, batch: int, context: int, **options: Any
) -> list[Callable[[], torch.Tensor]]:
    """Calls on different pages, enough that together they exceed the L2 cache several times."""
    used = batch * -(-context // BLOCK_SIZE)
    bytes_a_call = used * 2 * BLOCK_SIZE * heads.num_kv_heads * heads.head_dim * DTYPE.itemsize
    wanted = max(1, min(100, 4 * torch.cuda.get_device_properties(0).L2_cache_size // bytes_a_call))
    q = torch.randn(batch * queries, heads.num_heads, heads.head_dim, dtype=DTYPE, device="cuda")
    lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    starts = torch.arange(0, batch * queries + 1, queries, dtype=torch.int32, device="cuda")
    out = torch.empty_like(q)

    def call(tables: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: launch_paged_attention(
            q, pages.k, pages.v, tables, lens, starts,
            scale=heads.head_dim**-0.5, out=out, **options,
        )  # fmt: skip

    return [call(pages.tables(batch, context, index * used)) for index in range(wanted + 1)]


def decode_row(heads: Heads, pages: Pages, batch: int, context: int, copy: float) -> Row:
    """One decode step of attention."""
    time = time_us(attention_calls(heads, pages, 1, batch, context))
    numbers = 2 * batch * context * heads.num_kv_heads + 2 * batch * heads.num_heads
    gb_s = numbers * heads.head_dim * DTYPE.itemsize / time / 1e3
    return {
        "kernel": "paged_attention decode",
        "shape": heads.name,
        "batch": batch,
        "context_tokens": context,
        "time_us": time,
        "gb_s": gb_s,
        "share_of_copy": gb_s / copy,
    }


def prefill_row(heads: Heads, pages: Pages, batch: int, tokens: int) -> Row:
    """Attention of whole prompts, beside PyTorch's FlashAttention on contiguous data."""
    time = time_us(attention_calls(heads, pages, tokens, batch, tokens)[:2])
    q, k, v = (
        torch.randn(batch, heads.num_heads, tokens, heads.head_dim, dtype=DTYPE, device="cuda")
        for _ in range(3)
    )
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        sdpa = time_us([lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)])
    flops = 4 * batch * heads.num_heads * heads.head_dim * tokens * (tokens + 1) / 2
    return {
        "kernel": "paged_attention prefill",
        "shape": heads.name,
        "batch": batch,
        "context_tokens": tokens,
        "time_us": time,
        "tflop_s": flops / time / 1e6,
        "ratio_to_sdpa": sdpa / time,
    }


def small_kernel_rows(copy: float, tokens: int = 16384) -> Iterable[Row]:
    """The memory-bound kernels at the 8B shape, against their PyTorch expressions."""
    heads, hidden, inner = SHAPES[0], 4096, 14336
    x, residual = torch.randn(2, tokens, hidden, dtype=DTYPE, device="cuda")
    weight = torch.randn(hidden, dtype=DTYPE, device="cuda")
    gate_up = torch.randn(tokens, 2 * inner, dtype=DTYPE, device="cuda")
    columns = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    qkv = torch.randn(tokens, columns, dtype=DTYPE, device="cuda")
    rope = torch.randn(tokens, 2, heads.head_dim // 2, device="cuda")
    places = torch.arange(tokens, device="cuda")
    cache_shape = (tokens // BLOCK_SIZE, BLOCK_SIZE, heads.num_kv_heads, heads.head_dim)
    k_cache, v_cache = torch.empty(2, *cache_shape, dtype=DTYPE, device="cuda")
    slots = torch.randperm(tokens, device="cuda")
    rope_arguments = (qkv, places, rope, k_cache, v_cache, slots)
    norm_arguments = (x, weight, 1e-5, residual)
    for kernel, reference, arguments, numbers in (
        (rms_norm, rms_norm_reference, norm_arguments, 4 * x.numel()),
        (silu_and_mul, silu_and_mul_reference, (gate_up,), gate_up.numel() * 3 // 2),
        (rope_and_cache, rope_and_cache_reference, rope_arguments, 2 * qkv.numel()),
    ):
        time = time_us([partial(kernel, *arguments)])
        reference_time = time_us([partial(reference, *arguments)])
        gb_s = numbers * DTYPE.itemsize / time / 1e3
        yield {
            "kernel": kernel.__name__,
            "shape": f"{tokens} tokens of Llama-3-8B",
            "time_us": time,
            "gb_s": gb_s,
            "share_of_copy": gb_s / copy,
            "speedup_over_pytorch": reference_time / time,
        }


def tune(heads: Heads, pages: Pages, console: Console) -> None:
    """Try other tiles than those of `choose_tiles`, for decode and for prefill."""
    for queries, batch, context, rows in ((1, 64, 4096, (16,)), (4096, 1, 4096, (64, 128))):
        results = []
        for block_m, block_n, warps, stages in itertools.product(
            rows, (32, 64, 128), (4, 8), (2, 3, 4, 5)
        ):
            tiles = Tiles(block_m, block_n, warps, stages)
            try:
                calls = attention_calls(heads, pages, queries, batch, context, tiles=tiles)
                results.append((time_us(calls[:4], repeats=7), tiles))
            except Exception as error:  # out of shared memory, above all
                console.print(f"{tiles}: {type(error).__name__}")
        console.print(f"{heads.name}, {queries} query tokens x {batch}, context {context}")
        for time, tiles in sorted(results, key=lambda result: result[0])[:6]:
            console.print(f"  {time:9.1f} us  {tiles}")


def main(
    record: Annotated[bool, typer.Option(help="Write data/measurements/.")] = False,
    quick: Annotated[bool, typer.Option(help="A few sizes only.")] = False,
    tiles: Annotated[bool, typer.Option("--tune", help="Also try other tiles.")] = False,
) -> None:
    """Measure every kernel on this GPU."""
    console = Console()
    if not torch.cuda.is_available():
        console.print("This benchmark needs an NVIDIA GPU; PyTorch sees none here.")
        raise typer.Exit(1)
    copy = copy_gb_s()
    console.print(f"device-to-device copy: {copy:.0f} GB/s, read and written")
    batches, contexts = ((1, 32, 256), (1024, 32768)) if quick else (
        (1, 4, 16, 32, 64, 128, 256), (512, 2048, 8192, 32768)
    )  # fmt: skip
    prompts = (4096,) if quick else (512, 2048, 8192, 16384)
    rows: list[Row] = []
    for heads in SHAPES:
        pages = Pages(heads, max_tokens=2**21)
        sizes = [
            (batch, context)
            for batch, context in itertools.product(batches, contexts)
            if batch * context <= pages.num_blocks * BLOCK_SIZE
        ]
        rows += [
            decode_row(heads, pages, *size, copy) for size in tqdm(sizes, f"{heads.name} decode")
        ]
        rows += [
            prefill_row(heads, pages, max(1, 4096 // tokens), tokens)
            for tokens in tqdm(prompts, f"{heads.name} prefill")
        ]
        if tiles:
            tune(heads, pages, console)
        del pages
        torch.cuda.empty_cache()
    rows += list(small_kernel_rows(copy))
    for kernel, found in itertools.groupby(
        sorted(rows, key=lambda row: row["kernel"]), key=lambda row: row["kernel"]
    ):
        print_table(console, kernel, [{k: v for k, v in r.items() if k != "kernel"} for r in found])
    measurement = measured_here("kernels", rows, {"copy_gb_s": copy})
    console.print(f"{DTYPE} on {measurement.origin}")
    if record:
        console.print(f"written to {save_measurement(measurement)}")


if __name__ == "__main__":
    typer.run(main)
