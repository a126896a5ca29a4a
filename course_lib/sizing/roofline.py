"""How fast it can be at best: the roofline of prefill and of decode.

A phase takes at least flops / peak and at least bytes / bandwidth, so the larger of the two
(Williams, Waterman and Patterson, Roofline, CACM 2009). Prefill reads the weights once for many
tokens and is bound by compute; decode reads them for one token a request and is bound by bandwidth.
All times here are floors: real kernels reach a part of both peaks, and queues come on top.
"""

from dataclasses import dataclass

from course_lib.sizing.catalog import PRECISION_BYTES, Gpu, ModelShape
from course_lib.sizing.parallelism import tensor_parallel_communication
from course_lib.validation import known_name, number, whole_number


@dataclass(frozen=True)
class Phase:
    """The floor of one step. Flops and bytes are of all GPUs together."""

    flops: float
    memory_bytes: float
    compute_s: float
    memory_s: float
    communication_s: float

    @property
    def seconds(self) -> float:
        """The larger of compute and memory time, then communication, which waits for both."""
        return max(self.compute_s, self.memory_s) + self.communication_s

    @property
    def bound(self) -> str:
        """Which of the two is larger: "compute" or "memory"."""
        return "compute" if self.compute_s >= self.memory_s else "memory"


def decode_ceiling_tokens_per_s(bandwidth_gb_s: float, model_gb: float) -> float:
    """The most tokens a second at batch one, where each token streams the weights once.

    Raises:
        ValueError: an argument is not a number above 0.
    """
    number("bandwidth_gb_s", bandwidth_gb_s, above=0)
    return bandwidth_gb_s / number("model_gb", model_gb, above=0)


def compute_precision(gpu: Gpu, weights: str) -> str:
    """The precision that products are computed in for weights stored as `weights`.

    INT8 and INT4 weights are taken as weight-only quantization, which is computed in BF16, and so
    are FP8 weights on a GPU without FP8. FP32 runs as TF32 where there is one.

    Raises:
        ValueError: the precision is unknown, or the catalogue has no peak of this GPU for it.
    """
    weights = known_name("precision", weights, PRECISION_BYTES)
    if weights in ("int8", "int4") or (weights == "fp8" and "fp8" not in gpu.tflops):
        weights = "bf16"
    elif weights == "fp32" and "tf32" in gpu.tflops:
        weights = "tf32"
    return known_name(f"{gpu.name} precision", weights, gpu.tflops)


class Roofline:
    """A model on its GPUs, of which `step` gives the floor of any step.

    Args:
        model: its sizes.
        gpu: its peaks.
        gpus: tensor-parallel GPUs; work and bytes are divided evenly among them.
        weights: how they are stored: "bf16", "fp8", "int4" ...
        kv_bytes: bytes a number of the KV cache.

    Raises:
        ValueError: a size is not a positive number, or the precision is unknown.
    """

    def __init__(
        self,
        model: ModelShape,
        gpu: Gpu,
        gpus: int = 1,
        weights: str = "bf16",
        kv_bytes: float = 2,
    ) -> None:
        self.model = model
        self.gpu = gpu
        self.gpus = whole_number("gpus", gpus)
        self.flops_per_s = gpu.tflops[compute_precision(gpu, weights)] * 1e12 * self.gpus
        self.bytes_per_s = gpu.bandwidth_gb_s * 1e9 * self.gpus
        self.weight_bytes = PRECISION_BYTES[known_name("precision", weights, PRECISION_BYTES)]
        self.kv_bytes_per_token = model.kv_bytes_per_token(number("kv_bytes", kv_bytes, above=0))
        self.flops_per_token = float(_layer_flops(model))
        self.flops_per_logits = 2.0 * model.embedding_params
        self.flops_per_pair = float(_attention_flops_per_pair(model))
        one_token = tensor_parallel_communication(model, 1, self.gpus, gpu.link_gb_s)
        self.communication_s_per_token = one_token.seconds

    def step(
        self,
        prefill_tokens: int = 0,
        prefill_pairs: int = 0,
        num_prefills: int = 0,
        num_decodes: int = 0,
        context_tokens: int = 0,
    ) -> Phase:
        """The floor of a step that computes prompts, or chunks of them, and decodes together.

        The weights are read once for all. Each request gets one row of logits, though that of a
        chunk before the last is not needed. Decodes read their contexts; prefills write the keys
        and values of their tokens and read those computed before. Of several prefills only the
        pairs of all together are known, so the least that they can have read is counted.

        Args:
            prefill_tokens: tokens of the prompts.
            prefill_pairs: of a token of theirs and one that it attends to: a chunk of q tokens
                after s computed ones has q s + q (q + 1) / 2.
            num_prefills: requests they belong to.
            num_decodes: requests that compute one token.
            context_tokens: that these read, all together.
        """
        tokens = prefill_tokens + num_decodes
        flops = tokens * self.flops_per_token + (num_prefills + num_decodes) * self.flops_per_logits
        flops += (prefill_pairs + context_tokens) * self.flops_per_pair
        kv_tokens: float = prefill_tokens + context_tokens
        if prefill_tokens:
            kv_tokens += max(0.0, prefill_pairs / prefill_tokens - (prefill_tokens + 1) / 2)
        memory_bytes = self.model.streamed_params(tokens) * self.weight_bytes
        memory_bytes += kv_tokens * self.kv_bytes_per_token
        return Phase(
            flops=flops,
            memory_bytes=memory_bytes,
            compute_s=flops / self.flops_per_s,
            memory_s=memory_bytes / self.bytes_per_s,
            communication_s=tokens * self.communication_s_per_token,
        )


def prefill(
    model: ModelShape,
    gpu: Gpu,
    prompt_tokens: int,
    *,
    gpus: int = 1,
    weights: str = "bf16",
    kv_bytes: float = 2,
) -> Phase:
    """One prompt from its first token to its last; `seconds` is the floor of its TTFT.

    Flops are 2 for each active parameter and token (Kaplan et al., 2020), the head for the last
    token only, and 4 x heads x head_dim for each layer and each pair of a token and one before it.
    Bytes are the weights once, and the prompt's keys and values written once.

    Args:
        gpus: tensor-parallel GPUs; work and bytes are divided evenly among them.
        weights: how they are stored: "bf16", "fp8", "int4" ...
        kv_bytes: bytes a number of the KV cache.

    Raises:
        ValueError: a size is not a positive number, or the precision is unknown.
    """
    tokens = whole_number("prompt_tokens", prompt_tokens)
    pairs = tokens * (tokens + 1) // 2
    return Roofline(model, gpu, gpus, weights, kv_bytes).step(tokens, pairs, 1)


def decode(
    model: ModelShape,
    gpu: Gpu,
    batch_size: int,
    context_len: int,
    *,
    gpus: int = 1,
    weights: str = "bf16",
    kv_bytes: float = 2,
) -> Phase:
    """One token for each of `batch_size` requests; `seconds` is the floor of their TPOT.

    Every request reads its own keys and values, `context_len` tokens of them; the weights are read
    once for all. Other arguments and errors as of `prefill`.
    """
    batch = whole_number("batch_size", batch_size)
    context = whole_number("context_len", context_len, at_least=0)
    roofline = Roofline(model, gpu, gpus, weights, kv_bytes)
    return roofline.step(num_decodes=batch, context_tokens=batch * context)


def compute_bound_batch_size(
    model: ModelShape,
    gpu: Gpu,
    context_len: int = 0,
    *,
    weights: str = "bf16",
    kv_bytes: float = 2,
) -> int | None:
    """The smallest batch at which a decode step takes its compute longer than its reading.

    None where there is none: at long context each request brings more bytes to read than compute
    to hide them behind, however large the batch.
    """

    def is_compute_bound(batch: int) -> bool:
        phase = decode(model, gpu, batch, context_len, weights=weights, kv_bytes=kv_bytes)
        return phase.bound == "compute"

    # Compute grows evenly with the batch and reading ever more slowly (experts already read are
    # not read again), so once compute has caught up it stays ahead: double, then halve.
    high = 1
    while not is_compute_bound(high):
        high *= 2
        if high > 2**20:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_compute_bound(middle) else (middle, high)
    return high


def _layer_flops(model: ModelShape) -> float:
    """Multiply-adds of one token through all layers, without attention over the context."""
    experts = model.moe_layers * model.experts_per_token * model.expert_params
    return 2 * (model.dense_params + experts)


def _attention_flops_per_pair(model: ModelShape) -> float:
    """Score and weighted value of one token against one other, in all layers."""
    return 4 * model.num_layers * model.num_heads * model.head_dim
