"""The engine's arguments, with vLLM's names, and what follows from them.

`EngineConfig` is what the caller said; `resolve` combines it with the checkpoint and the machine:
device, dtype and context length. What cannot work is refused there.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from course_lib.model.attention import BACKENDS
from course_lib.model.config import ModelConfig
from course_lib.validation import number, whole_number

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
        enforce_eager: no CUDA graphs on a GPU, no recorded decode steps on a CPU.
        load_format: "auto", or "dummy" for random weights at the shape of `config.json`.
        attention_backend: "TRITON_ATTN", the default on a GPU; "CPU_ATTN", on a CPU where there is
            a C++ compiler; or "TORCH_SDPA", which runs anywhere.
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
    enforce_eager: bool = False
    load_format: str = "auto"
    attention_backend: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("block_size", 1), ("max_num_seqs", 1), ("max_num_batched_tokens", 1)):
            whole_number(name, getattr(self, name), at_least=low)
        for name, low in (("max_model_len", 2), ("num_gpu_blocks_override", 2)):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), at_least=low)
        whole_number("seed", self.seed, at_least=-(2**63))
        number("gpu_memory_utilization", self.gpu_memory_utilization, above=0, at_most=1)
        for name in ("enable_prefix_caching", "enforce_eager"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.load_format not in ("auto", "dummy"):
            raise ValueError(f"load_format must be 'auto' or 'dummy', got {self.load_format!r}")
        if self.attention_backend is not None and self.attention_backend not in BACKENDS:
            raise ValueError(
                f"attention_backend must be one of {sorted(BACKENDS)} or None, got "
                f"{self.attention_backend!r}"
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


def resolve(config: EngineConfig, model: ModelConfig) -> ResolvedConfig:
    """Settle what the caller left open.

    Raises:
        ValueError: the model was not made for that length, or the dtype is unknown.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    dtype = resolve_dtype(config.dtype, model.dtype, capability)
    max_model_len = config.max_model_len or model.max_position_embeddings
    if not 1 < max_model_len <= model.max_position_embeddings:
        raise ValueError(
            f"max_model_len must be between 2 and {model.max_position_embeddings}, the positions "
            f"the model was made for, got {max_model_len}"
        )
    return ResolvedConfig(device, dtype, max_model_len)


def check_num_blocks(num_blocks: int, max_model_len: int, block_size: int) -> None:
    """Refuse a cache in which a lone request of `max_model_len` could not finish.

    Raises:
        ValueError: with the length that would fit.
    """
    needed = -(-max_model_len // block_size)
    if num_blocks - 1 < needed:
        fits = (num_blocks - 1) * block_size
        raise ValueError(
            f"max_model_len {max_model_len} needs {needed} KV blocks of {block_size} "
            f"tokens, but there are {num_blocks - 1} ({fits} tokens) beside the null block; set "
            f"max_model_len to at most {fits}, or raise num_gpu_blocks_override or "
            "gpu_memory_utilization"
        )


def resolve_dtype(
    dtype: str | torch.dtype, checkpoint_dtype: str, capability: tuple[int, int] | None
) -> torch.dtype:
    """The dtype to compute in.

    Args:
        dtype: what the caller asked for.
        checkpoint_dtype: that of the stored weights.
        capability: compute capability of the GPU; None for a CPU.

    Raises:
        ValueError: there is no such dtype.
    """
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype == "auto":
        if capability is None:
            return torch.float32
        dtype = "bfloat16" if checkpoint_dtype == "bfloat16" else "float16"
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"dtype must be 'auto' or one of {sorted(_DTYPES)}, got {dtype!r}")
    if dtype == "bfloat16" and capability is not None and capability < (8, 0):
        major, minor = capability
        warnings.warn(
            f"this GPU has compute capability {major}.{minor} and no bfloat16 arithmetic (that "
            "came with 8.0), so the model runs in float16",
            stacklevel=2,
        )
        return torch.float16
    return _DTYPES[dtype]
