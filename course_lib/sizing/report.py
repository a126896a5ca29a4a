"""Everything about one plan: a model on a GPU at a context and a concurrency.

`size_report("Llama-3-8B", "H100_80GB", 8192, 4)` calls the calculators in the order in which an
architect asks: how many GPUs, how long a KV cache, how fast at best, which slice, how many dollars.
`course size` prints the result; `dataclasses.asdict` turns it into what `--json` prints.
"""

from dataclasses import dataclass
from pathlib import Path

from course_lib.sizing import cost, memory, parallelism, roofline
from course_lib.sizing.catalog import PRECISION_BYTES, Gpu, ModelShape, find_gpu, find_model
from course_lib.sizing.mig import MigFit, best_mig_fit, mig_fits
from course_lib.validation import known_name, number, whole_number

#: Tokens that one step may compute when activations are estimated; vLLM's default for online
#: serving on large GPUs is 8192 (vLLM documentation, "Optimization and Tuning").
MAX_NUM_BATCHED_TOKENS = 8192


@dataclass(frozen=True)
class GpuRow:
    """One GPU of the catalogue for this job."""

    name: str
    usable_gb: float
    needed: int  # by memory
    tensor_parallel_size: int | None  # the same or more, so that it divides the heads
    decode_ceiling_tokens_per_s: float  # of one request on all of them
    usd_per_hour: float


@dataclass(frozen=True)
class Speed:
    """Floors of latency and ceilings of throughput on the GPUs of the plan."""

    gpus: int
    prefill: roofline.Phase
    decode: roofline.Phase
    ttft_ms: float  # one prompt of the whole context, no queue
    tpot_ms: float  # all requests at the whole context
    decode_tokens_per_s: float  # of all requests together
    compute_bound_batch_size: int | None  # None: decode stays bound by bandwidth


@dataclass(frozen=True)
class Dollars:
    """What the plan costs at the catalogue's example prices."""

    usd_per_hour: float
    usd_per_million_tokens: float  # of decode at `Speed.decode_tokens_per_s`
    cold_start_s: float
    usd_per_cold_start: float


@dataclass(frozen=True)
class SizeReport:
    """The plan and what follows from it."""

    model: ModelShape
    total_params_b: float
    active_params_b: float
    gpu: Gpu
    context_len: int
    concurrency: int
    weights: str
    kv: str
    requirements: memory.GpuRequirements
    gpus: tuple[GpuRow, ...]
    kv_capacity: memory.KvCapacity
    speed: Speed
    mig: tuple[MigFit, ...]
    best_mig: MigFit | None
    dollars: Dollars
    notes: tuple[str, ...]


def size_report(
    model_name: str | Path,
    gpu_name: str,
    context_len: int,
    concurrency: int,
    *,
    weights: str | None = None,
    kv: str = "bf16",
    gpu_memory_utilization: float = 0.9,
) -> SizeReport:
    """Size a model for a GPU.

    Args:
        model_name: a name of the catalogue, or the path of a `config.json`.
        gpu_name: a name of the catalogue.
        context_len: tokens of each request, prompt and reply.
        concurrency: requests at once.
        weights: precision of the weights; by default that of the checkpoint if it is quantized,
            otherwise BF16.
        kv: precision of the KV cache.
        gpu_memory_utilization: the share of memory that the engine may take.

    Raises:
        ValueError: a name is unknown, or a number makes no sense.
    """
    model, gpu = find_model(model_name), find_gpu(gpu_name)
    context_len = whole_number("context", context_len)
    concurrency = whole_number("concurrency", concurrency)
    number("gpu_memory_utilization", gpu_memory_utilization, above=0, at_most=1)
    weights = known_name("precision", weights or model.precision, PRECISION_BYTES)
    kv = known_name("precision", kv, PRECISION_BYTES)
    weight_bytes, kv_bytes = PRECISION_BYTES[weights], PRECISION_BYTES[kv]

    needs = memory.requirements_of(model, context_len, concurrency, weight_bytes, kv_bytes)
    rows = tuple(
        _gpu_row(name, option, model, weight_bytes) for name, option in needs.gpu_options.items()
    )
    plan = next(row for row in rows if row.name == gpu.name)
    gpus = plan.tensor_parallel_size or plan.needed

    capacity = memory.kv_capacity(
        model,
        gpu.memory_gb,
        gpu_memory_utilization,
        gpus=gpus,
        weight_bytes=weight_bytes,
        kv_bytes=kv_bytes,
        activations_gb=memory.peak_activations_gb(model, MAX_NUM_BATCHED_TOKENS, concurrency),
    )
    speed = _speed(model, gpu, context_len, concurrency, gpus, weights, kv_bytes)
    cold_start_s = cost.example_cold_start().seconds(needs.weights_gb)
    return SizeReport(
        model=model,
        total_params_b=model.total_params / 1e9,
        active_params_b=model.active_params / 1e9,
        gpu=gpu,
        context_len=context_len,
        concurrency=concurrency,
        weights=weights,
        kv=kv,
        requirements=needs,
        gpus=rows,
        kv_capacity=capacity,
        speed=speed,
        mig=mig_fits(needs.total_with_overhead_gb, gpu),
        best_mig=best_mig_fit(needs.total_with_overhead_gb, gpu),
        dollars=Dollars(
            usd_per_hour=plan.usd_per_hour,
            usd_per_million_tokens=cost.usd_per_million_tokens(
                plan.usd_per_hour, speed.decode_tokens_per_s
            ),
            cold_start_s=cold_start_s,
            usd_per_cold_start=cost.cold_start_usd(plan.usd_per_hour, cold_start_s),
        ),
        notes=_notes(model, context_len, concurrency, plan, capacity),
    )


def _gpu_row(name: str, option: memory.GpuOption, model: ModelShape, weight_bytes: float) -> GpuRow:
    gpu = find_gpu(name)
    size = parallelism.smallest_tensor_parallel_size(model, option.needed)
    gpus = size or option.needed
    streamed_gb = memory.weights_gb(model.streamed_params(1) / 1e9, weight_bytes)
    return GpuRow(
        name,
        gpu.usable_gb,
        option.needed,
        size,
        roofline.decode_ceiling_tokens_per_s(gpu.bandwidth_gb_s * gpus, streamed_gb),
        cost.usd_per_hour(gpu.usd_per_hour, gpus),
    )


def _speed(
    model: ModelShape,
    gpu: Gpu,
    context_len: int,
    concurrency: int,
    gpus: int,
    weights: str,
    kv_bytes: float,
) -> Speed:
    prefill = roofline.prefill(
        model, gpu, context_len, gpus=gpus, weights=weights, kv_bytes=kv_bytes
    )
    decode = roofline.decode(
        model, gpu, concurrency, context_len, gpus=gpus, weights=weights, kv_bytes=kv_bytes
    )
    return Speed(
        gpus=gpus,
        prefill=prefill,
        decode=decode,
        ttft_ms=prefill.seconds * 1e3,
        tpot_ms=decode.seconds * 1e3,
        decode_tokens_per_s=concurrency / decode.seconds,
        compute_bound_batch_size=roofline.compute_bound_batch_size(
            model, gpu, context_len, weights=weights, kv_bytes=kv_bytes
        ),
    )


def _notes(
    model: ModelShape,
    context_len: int,
    concurrency: int,
    plan: GpuRow,
    capacity: memory.KvCapacity,
) -> tuple[str, ...]:
    """What a reader should know before trusting the numbers."""
    notes = []
    if not model.is_exact:
        notes.append(
            f"Architecture {model.model_type} is not in our table; its parameters are counted as "
            "if it were a Llama."
        )
    if context_len > model.max_position_embeddings:
        notes.append(
            f"The model was made for {model.max_position_embeddings} tokens of context; "
            f"{context_len} is more."
        )
    if plan.tensor_parallel_size is None:
        notes.append(
            f"No tensor-parallel size of {plan.needed} or more divides the {model.num_heads} "
            "query heads; such a plan takes pipeline stages or several replicas."
        )
    elif plan.tensor_parallel_size > plan.needed:
        notes.append(
            f"Memory asks for {plan.needed} x {plan.name}, but tensor parallel must divide the "
            f"{model.num_heads} query and {model.num_kv_heads} KV heads: "
            f"{plan.tensor_parallel_size} GPUs."
        )
    if capacity.tokens < context_len * concurrency:
        notes.append(
            f"The engine's KV cache of {capacity.tokens} tokens is short of the "
            f"{context_len * concurrency} planned, so requests would wait or be preempted."
        )
    return tuple(notes)
