"""The engine's arguments, with vLLM's names, and what follows from them.

`EngineConfig` is what the caller said; `resolve` combines it with the checkpoint and the machine:
dtype, device, context length, number of KV blocks. What cannot work is refused there.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from course_lib.model.config import ModelConfig
from course_lib.validation import number, whole_number

#: Largest KV cache on a CPU, in bytes; as vLLM's default there.
CPU_KV_CACHE_BYTES = 4 * 2**30

_DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "float16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class EngineConfig:
    """Arguments of `LLM`, as in vLLM.

    Args:
        model: a Hugging Face checkpoint directory.
        dtype: "auto", "float32", "float16" or "bfloat16". "auto" is float32 on a CPU; on a GPU it
            is the checkpoint's, and float16 for a float32 checkpoint.
        max_model_len: longest sequence in tokens; by default what the model was made for.
        block_size: tokens in a KV block.
        num_gpu_blocks_override: number of KV blocks, the null block included, instead of as many
            as memory allows.
        gpu_memory_utilization: share of the device's memory that weights and KV cache may take.
        max_num_seqs: requests that may run at once.
        max_num_batched_tokens: tokens a step may compute.
        enable_prefix_caching: share the KV blocks of equal beginnings.
        seed: of requests that bring none.
    """

    model: str | Path
    dtype: str | torch.dtype = "auto"
    max_model_len: int | None = None
    block_size: int = 16
    num_gpu_blocks_override: int | None = None
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("block_size", 1), ("max_num_seqs", 1), ("max_num_batched_tokens", 1)):
            whole_number(name, getattr(self, name), at_least=low)
        for name, low in (("max_model_len", 2), ("num_gpu_blocks_override", 2)):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), at_least=low)
        whole_number("seed", self.seed, at_least=-(2**63))
        number("gpu_memory_utilization", self.gpu_memory_utilization, above=0, at_most=1)
        if not isinstance(self.enable_prefix_caching, bool):
            raise ValueError(
                f"enable_prefix_caching must be True or False, got {self.enable_prefix_caching!r}"
            )
        if not isinstance(self.model, str | Path):
            raise ValueError(f"model must be the path of a directory, got {self.model!r}")
        if not Path(self.model).is_dir():
            raise ValueError(
                f"model {str(self.model)!r} is not a directory; expected a Hugging Face checkpoint "
                "such as data/models/merchant-chat (names of a model hub are not downloaded)"
            )


@dataclass(frozen=True)
class ResolvedConfig:
    """What the engine runs with."""

    device: torch.device
    dtype: torch.dtype
    max_model_len: int  # tokens
    num_blocks: int  # the null block included


def resolve(config: EngineConfig, model: ModelConfig) -> ResolvedConfig:
    """Settle what the caller left open.

    Raises:
        ValueError: a lone request of `max_model_len` could not finish within the cache, the model
            was not made for that length, or the dtype is unknown.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = _resolve_dtype(config.dtype, model, device)
    max_model_len = config.max_model_len or model.max_position_embeddings
    if not 1 < max_model_len <= model.max_position_embeddings:
        raise ValueError(
            f"max_model_len must be between 2 and {model.max_position_embeddings}, the positions "
            f"the model was made for, got {max_model_len}"
        )
    needed = -(-max_model_len // config.block_size)
    if config.num_gpu_blocks_override is not None:
        num_blocks = config.num_gpu_blocks_override
    else:
        block_bytes = model.kv_bytes_per_token(dtype.itemsize) * config.block_size
        budget = _kv_cache_budget(config, model, dtype, device)
        num_blocks = min(budget // block_bytes, config.max_num_seqs * needed) + 1
    if num_blocks - 1 < needed:
        fits = (num_blocks - 1) * config.block_size
        raise ValueError(
            f"max_model_len {max_model_len} needs {needed} KV blocks of {config.block_size} "
            f"tokens, but there are {num_blocks - 1} ({fits} tokens) beside the null block; set "
            f"max_model_len to at most {fits}, or raise num_gpu_blocks_override or "
            "gpu_memory_utilization"
        )
    return ResolvedConfig(device, dtype, max_model_len, num_blocks)


def _resolve_dtype(
    dtype: str | torch.dtype, model: ModelConfig, device: torch.device
) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if model.dtype == "bfloat16" else torch.float16
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"dtype must be 'auto' or one of {sorted(_DTYPES)}, got {dtype!r}")
    return _DTYPES[dtype]


def _kv_cache_budget(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> int:
    """Bytes that the KV cache may take, before the weights are loaded."""
    weights = model.num_parameters * dtype.itemsize
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(config.gpu_memory_utilization * total) - (total - free) - weights
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(CPU_KV_CACHE_BYTES, int(config.gpu_memory_utilization * total) - weights)
