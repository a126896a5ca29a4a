"""The KV cache's tensors, and how large they may be.

On a CPU the size follows from the configuration. On a GPU it is measured: after the weights are
loaded, the largest step there can be is run once, and what the engine's share of the memory still
has then belongs to the KV cache, as in vLLM.
"""

import math
import mmap
import os
from contextlib import suppress

import numpy as np
import torch

from course_lib.engine.config import EngineConfig
from course_lib.engine.request import Request
from course_lib.engine.sampler import sample
from course_lib.engine.sampling_params import SamplingParams
from course_lib.model.attention import AttentionBackend, AttentionMetadata
from course_lib.model.config import ModelConfig
from course_lib.model.decoder import Decoder, LayerCache, StepInputs

#: Largest KV cache on a CPU, in bytes; as vLLM's default there.
CPU_KV_CACHE_BYTES = 4 * 2**30


def make_kv_cache(decoder: Decoder, num_blocks: int, block_size: int) -> list[LayerCache]:
    """Empty pages for each layer, of the decoder's dtype and on its device.

    Zeros, because masked positions are still multiplied by their weight 0, and the operating
    system commits a page of zeros only when it is first written.
    """
    config = decoder.config
    shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)
    weight = decoder.model.norm.weight

    def pages() -> torch.Tensor:
        if weight.device.type == "cpu":  # where PyTorch would write the zeros, the system has them
            memory = mmap.mmap(-1, math.prod(shape) * weight.dtype.itemsize)
            if hasattr(mmap, "MADV_HUGEPAGE"):  # in large pieces, which are committed in less time
                with suppress(OSError):  # a kernel without them
                    memory.madvise(mmap.MADV_HUGEPAGE)
            return torch.frombuffer(memory, dtype=weight.dtype).view(shape)
        return torch.zeros(shape, dtype=weight.dtype, device=weight.device)

    return [(pages(), pages()) for _ in range(config.num_layers)]


def num_blocks_for(
    budget_bytes: int, block_bytes: int, max_num_seqs: int, blocks_per_request: int
) -> int:
    """Blocks that a budget pays for, and the null block; no more than could ever be used."""
    return max(0, min(budget_bytes // block_bytes, max_num_seqs * blocks_per_request)) + 1


def cpu_kv_cache_bytes(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that the KV cache may take in main memory."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    weights = model.num_parameters * dtype.itemsize
    return min(CPU_KV_CACHE_BYTES, int(config.gpu_memory_utilization * total) - weights)


def gpu_kv_cache_bytes(
    decoder: Decoder, attention: AttentionBackend, config: EngineConfig, max_model_len: int
) -> int:
    """Bytes of GPU memory that are left for the KV cache, by running the largest step once.

    budget = utilization x total - what others hold - the peak of weights and activations.
    """
    device = decoder.rope.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    run_largest_step(decoder, attention, config, max_model_len)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    torch.cuda.empty_cache()
    return int(config.gpu_memory_utilization * total) - others - peak


@torch.inference_mode()
def run_largest_step(
    decoder: Decoder, attention: AttentionBackend, config: EngineConfig, max_model_len: int
) -> None:
    """A step of `max_num_batched_tokens` tokens, and a sampling step of `max_num_seqs` requests.

    All tokens share one page, so it needs no KV cache; what it computes means nothing.
    """
    num_tokens, device = config.max_num_batched_tokens, decoder.rope.device
    starts = np.append(np.arange(0, num_tokens, max_model_len), num_tokens).astype(np.int32)
    lens = np.diff(starts)
    num_pages = -(-int(lens.max()) // config.block_size)
    zeros = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    metadata = AttentionMetadata(
        block_tables=np.zeros((len(lens), num_pages), dtype=np.int32),
        context_lens=lens,
        query_start_loc=starts,
        block_size=config.block_size,
    )
    step = StepInputs(zeros, zeros, zeros, attention.plan(metadata))
    hidden = decoder(step, make_kv_cache(decoder, 1, config.block_size), attention)
    params = SamplingParams(temperature=1.0, top_p=0.9)
    requests = [
        Request(str(i), [0], params, arrival_time=0.0)
        for i in range(min(config.max_num_seqs, num_tokens))
    ]
    sample(decoder.logits(hidden[: len(requests)]), requests)
