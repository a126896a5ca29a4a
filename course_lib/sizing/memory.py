"""What has to fit: weights, KV cache and activations, and how many GPUs that takes.

`estimate_gpu_requirements` is the calculator of lab B1: weights plus KV cache, times an overhead.
`kv_capacity` asks the other way round, as an engine does at its start: what is left for the KV
cache, and how many tokens is that? `paged_kv_accounting` compares paged with fixed reservation.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from course_lib.sizing import catalog
from course_lib.sizing.catalog import ModelShape
from course_lib.validation import number, whole_number

#: Activations, runtime and fragmentation on top of weights and KV cache: a planning assumption.
OVERHEAD_FACTOR = 1.15


@dataclass(frozen=True)
class GpuOption:
    """One kind of GPU for the job: what is usable of one, and how many it takes by memory."""

    memory_gb: float
    needed: int


@dataclass(frozen=True)
class GpuRequirements:
    """What a model needs at a context and a concurrency, and the GPUs that would hold it."""

    weights_gb: float
    kv_cache_gb: float
    total_with_overhead_gb: float
    gpu_options: Mapping[str, GpuOption]


@dataclass(frozen=True)
class KvAccounting:
    """The KV cache of some requests, reserved at full length against in pages."""

    used_tokens: int
    fixed_reservation_blocks: int
    paged_blocks: int
    reserved_tokens_avoided: int


@dataclass(frozen=True)
class KvCapacity:
    """Where an engine's share of GPU memory goes, and the tokens its KV cache holds."""

    budget_gb: float
    weights_gb: float
    activations_gb: float
    kv_cache_gb: float  # 0 where weights and activations leave nothing
    blocks: int
    tokens: int


@dataclass(frozen=True)
class ContextPoint:
    """Memory at one context length; a row of a plot or a table."""

    context_len: int
    kv_cache_gb: float
    total_with_overhead_gb: float
    gpus_needed: int


def weights_gb(params_b: float, weight_bytes: float = 2) -> float:
    """Memory of `params_b` billion parameters; `catalog.PRECISION_BYTES` has bytes by precision.

    Scales and zero points of quantized weights are left out; they add some per cent.
    """
    return number("params_b", params_b, above=0) * number("weight_bytes", weight_bytes, above=0)


def kv_cache_gb(
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    context_len: int,
    concurrency: int = 1,
    kv_bytes: float = 2,
) -> float:
    """Memory of keys and values: 2 x layers x KV heads x head_dim x tokens x bytes.

    It counts KV heads, not query heads: with grouped-query attention several query heads share
    one (Ainslie et al., GQA, 2023).

    Raises:
        ValueError: a size is not a whole number of at least 1, or `kv_bytes` is not above 0.
    """
    per_token = 2 * whole_number("num_layers", num_layers)
    per_token *= whole_number("num_kv_heads", num_kv_heads) * whole_number("head_dim", head_dim)
    tokens = whole_number("context_len", context_len) * whole_number("concurrency", concurrency)
    return per_token * tokens * number("kv_bytes", kv_bytes, above=0) / 1e9


def estimate_gpu_requirements(
    model_params_b: float,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    context_len: int,
    target_concurrency: int,
    weight_bytes: float = 2,
    kv_bytes: float = 2,
    overhead_factor: float = OVERHEAD_FACTOR,
) -> GpuRequirements:
    """How much memory a model takes in service, and how many of each GPU hold it.

    total = (weights + KV cache) x overhead, and GPUs = total / usable memory, rounded up. GPUs
    are counted by memory alone; `parallelism.smallest_tensor_parallel_size` gives a number that
    also divides the heads.

    Args:
        model_params_b: parameters in billions; for a mixture of experts all of them.
        context_len: tokens of each request, prompt and reply.
        target_concurrency: requests at once.
        weight_bytes: bytes a weight (2 for BF16, 1 for INT8, 0.5 for INT4).
        kv_bytes: bytes a number of the KV cache.

    Returns:
        Sizes in GB and one option for every GPU of the catalogue.

    Raises:
        ValueError: a size is not a positive number, or the overhead is below 1.
    """
    weights = weights_gb(number("model_params_b", model_params_b, above=0), weight_bytes)
    concurrency = whole_number("target_concurrency", target_concurrency)
    kv_cache = kv_cache_gb(num_layers, num_kv_heads, head_dim, context_len, concurrency, kv_bytes)
    total = (weights + kv_cache) * number("overhead_factor", overhead_factor, at_least=1)
    options = {
        name: GpuOption(gpu.usable_gb, max(1, math.ceil(total / gpu.usable_gb)))
        for name, gpu in catalog.gpus().items()
    }
    return GpuRequirements(weights, kv_cache, total, options)


def requirements_of(
    model: ModelShape,
    context_len: int,
    target_concurrency: int,
    weight_bytes: float = 2,
    kv_bytes: float = 2,
) -> GpuRequirements:
    """`estimate_gpu_requirements` for a model of the catalogue or of a `config.json`."""
    return estimate_gpu_requirements(
        model.total_params / 1e9,
        model.num_layers,
        model.num_kv_heads,
        model.head_dim,
        context_len,
        target_concurrency,
        weight_bytes,
        kv_bytes,
    )


def context_growth(
    model: ModelShape,
    gpu_name: str,
    context_lens: Iterable[int],
    target_concurrency: int,
    weight_bytes: float = 2,
    kv_bytes: float = 2,
) -> list[ContextPoint]:
    """The need at each context length, to see a long conversation outgrow its plan.

    Raises:
        ValueError: as `estimate_gpu_requirements`, or the GPU is unknown.
    """
    gpu_name = catalog.find_gpu(gpu_name).name
    points = []
    for context_len in context_lens:
        needs = requirements_of(model, context_len, target_concurrency, weight_bytes, kv_bytes)
        points.append(
            ContextPoint(
                context_len,
                needs.kv_cache_gb,
                needs.total_with_overhead_gb,
                needs.gpu_options[gpu_name].needed,
            )
        )
    return points


def peak_activations_gb(
    model: ModelShape, batched_tokens: int, sequences: int = 1, activation_bytes: float = 2
) -> float:
    """The most that one forward pass holds besides weights and KV cache.

    An estimate of our own: inference frees each layer's intermediates, so the peak is either inside
    one layer (the residual stream, its norm, and the larger of q, k, v, attention output or the
    three tensors of the gated feed-forward) or at the end, where each sequence has its logits in
    FP32. Of a mixture of experts every token holds the tensors of the experts it chose. It leaves
    out workspaces of kernels and captured graphs; an engine measures instead, with a dummy batch.

    Raises:
        ValueError: a count is not a whole number of at least 1.
    """
    tokens = whole_number("batched_tokens", batched_tokens)
    sequences = whole_number("sequences", sequences)
    number("activation_bytes", activation_bytes, above=0)
    attention = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    feed_forward = 3 * model.intermediate_size
    if model.moe_layers:
        feed_forward = model.experts_per_token * model.expert_params // model.hidden_size
    in_a_layer = tokens * (2 * model.hidden_size + max(attention, feed_forward)) * activation_bytes
    at_the_end = tokens * model.hidden_size * activation_bytes + sequences * model.vocab_size * 4
    return max(in_a_layer, at_the_end) / 1e9


def kv_capacity(
    model: ModelShape,
    memory_gb: float,
    gpu_memory_utilization: float = 0.9,
    *,
    gpus: int = 1,
    weight_bytes: float = 2,
    kv_bytes: float = 2,
    tokens_per_block: int = 16,
    activations_gb: float = 0.0,
) -> KvCapacity:
    """The tokens that fit the KV cache, in whole blocks, as an engine counts them at its start.

    KV cache = memory x utilization - weights - activations (vLLM documentation,
    `gpu_memory_utilization`); what is left over of a last block is lost.

    Args:
        memory_gb: of one GPU: nominal, or measured (`torch.cuda.mem_get_info`) over 1e9.
        gpu_memory_utilization: the share of it that the engine may take.
        gpus: tensor-parallel GPUs; weights and KV heads are divided among them.
        activations_gb: on each GPU, for instance from `peak_activations_gb`.

    Raises:
        ValueError: a size is not a positive number, or the utilization is not within 0 and 1.
    """
    number("gpu_memory_utilization", gpu_memory_utilization, above=0, at_most=1)
    count = whole_number("gpus", gpus)
    block = whole_number("tokens_per_block", tokens_per_block)
    number("kv_bytes", kv_bytes, above=0)
    number("activations_gb", activations_gb, at_least=0)

    budget = number("memory_gb", memory_gb, above=0) * gpu_memory_utilization * count
    weights = weights_gb(model.total_params / 1e9, weight_bytes)
    left = max(0.0, budget - weights - activations_gb * count)
    blocks = int(left * 1e9 // (model.kv_bytes_per_token(kv_bytes) * block))
    return KvCapacity(budget, weights, activations_gb * count, left, blocks, blocks * block)


def paged_kv_accounting(
    cached_tokens: Sequence[int], max_tokens_per_request: int, tokens_per_block: int
) -> KvAccounting:
    """Blocks that requests take when each is reserved its longest, and when each has what it uses.

    Source: PagedAttention (Kwon et al., SOSP 2023): a page table lets a request own only the blocks
    it has begun, so that less than one block a request is wasted.

    Args:
        cached_tokens: tokens that each request has in the cache.
        max_tokens_per_request: what a fixed reservation sets aside for each.

    Raises:
        ValueError: a count is not a whole number, is too small, or exceeds the longest request.
    """
    longest = whole_number("max_tokens_per_request", max_tokens_per_request)
    block = whole_number("tokens_per_block", tokens_per_block)
    lengths = [
        whole_number(f"cached_tokens[{index}]", length, at_least=0, at_most=longest)
        for index, length in enumerate(cached_tokens)
    ]
    fixed = len(lengths) * -(-longest // block)
    paged = sum(-(-length // block) for length in lengths)
    return KvAccounting(sum(lengths), fixed, paged, (fixed - paged) * block)
