"""A replica out of the catalogue: what it holds, how fast it can be at best, what it costs.

    spec = replica_on("Llama-3-8B", "H100_80GB", max_model_len=8192)
    result = simulate(trace, FleetSpec(spec, initial_replicas=4))

Its step times are floors, see `sizing.roofline`, unless efficiencies and an overhead say otherwise.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from course_lib.fleet.spec import ReplicaSpec
from course_lib.fleet.step_time import RooflineStepTime
from course_lib.sizing.catalog import PRECISION_BYTES, find_gpu, find_model
from course_lib.sizing.cost import usd_per_hour
from course_lib.sizing.memory import kv_capacity, peak_activations_gb
from course_lib.sizing.parallelism import smallest_tensor_parallel_size
from course_lib.validation import known_name


def replica_on(
    model_name: str | Path,
    gpu_name: str,
    *,
    gpus: int = 1,
    weights: str = "bf16",
    kv: str = "bf16",
    max_model_len: int | None = None,
    gpu_memory_utilization: float = 0.9,
    overhead_s: float = 0.0,
    compute_efficiency: float = 1.0,
    bandwidth_efficiency: float = 1.0,
    **replica_args: Any,
) -> ReplicaSpec:
    """A replica that serves a model on a kind of GPU.

    Args:
        model_name: a name of the catalogue, or the path of a `config.json`.
        gpu_name: a name of the catalogue.
        gpus: tensor-parallel GPUs.
        weights: precision of the weights.
        kv: precision of the KV cache.
        max_model_len: longest sequence; what the model was made for if absent.
        gpu_memory_utilization: the share of memory that the engine may take.
        overhead_s: of each step, see `RooflineStepTime`, as are the efficiencies.
        compute_efficiency: the share of the peak of flops that is reached.
        bandwidth_efficiency: the share of the memory's bandwidth that is reached.
        **replica_args: others of `ReplicaSpec`; `usd_per_hour` replaces the catalogue's price.

    Raises:
        ValueError: a name is unknown, a number is out of its range, the heads cannot be divided
            among the GPUs, or memory is short of the longest sequence.
    """
    model, gpu = find_model(model_name), find_gpu(gpu_name)
    weights = known_name("precision", weights, PRECISION_BYTES)
    kv_bytes = PRECISION_BYTES[known_name("precision", kv, PRECISION_BYTES)]
    step_time = RooflineStepTime(
        model,
        gpu,
        gpus,
        weights,
        kv_bytes,
        overhead_s=overhead_s,
        compute_efficiency=compute_efficiency,
        bandwidth_efficiency=bandwidth_efficiency,
    )
    if smallest_tensor_parallel_size(model, gpus) != gpus:
        raise ValueError(
            f"{gpus} GPUs cannot divide the {model.num_heads} query and {model.num_kv_heads} KV "
            f"heads of {model.name}; take another number, such as a power of two"
        )
    spec = ReplicaSpec(
        step_time,
        num_blocks=2,  # until it is known what the others leave
        max_model_len=model.max_position_embeddings if max_model_len is None else max_model_len,
        **{"usd_per_hour": usd_per_hour(gpu.usd_per_hour, gpus), **replica_args},
    )
    capacity = kv_capacity(
        model,
        gpu.memory_gb,
        gpu_memory_utilization,
        gpus=gpus,
        weight_bytes=PRECISION_BYTES[weights],
        kv_bytes=kv_bytes,
        tokens_per_block=spec.block_size,
        activations_gb=peak_activations_gb(model, spec.max_num_batched_tokens, spec.max_num_seqs),
    )
    tokens = max(0, capacity.blocks - 1) * spec.block_size
    if tokens < spec.max_model_len:
        raise ValueError(
            f"{model.name} in {weights} on {gpus} x {gpu.name} leaves room for {tokens} tokens of "
            f"KV cache, fewer than max_model_len {spec.max_model_len}; take more GPUs, a larger "
            "one, smaller weights or a smaller max_model_len"
        )
    return replace(spec, num_blocks=capacity.blocks)
