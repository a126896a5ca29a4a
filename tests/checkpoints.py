"""Small random checkpoints of every supported family, written by transformers itself.

Weights are drawn wide enough that greedy decoding does not settle into one token, so that a test
which compares tokens sees a mistake.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

#: Name -> model type and what it adds to or changes of the common shape.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3-rope-scaling": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-linear-rope-scaling": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-multi-query": ("llama", {"num_key_value_heads": 1}),
    "llama-multi-head": ("llama", {"num_key_value_heads": 4}),
    "llama-wide-heads": ("llama", {"head_dim": 20}),  # 4 * 20 is not the hidden size
    "mistral-sliding-window": ("mistral", {"sliding_window": 12}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-some-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-tied-biases": (
        "qwen3",
        {"head_dim": 24, "tie_word_embeddings": True, "attention_bias": True},
    ),
}


def random_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model with random weights, float32, in eval mode."""
    model_type, specific = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **{**_COMMON, **specific, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.25)
    return model.eval()


def save(model: PreTrainedModel, directory: Path, **options: Any) -> Path:
    """Write a Hugging Face checkpoint directory; `max_shard_size` makes it a sharded one."""
    model.save_pretrained(directory, **options)
    return directory


def greedy_tokens(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """What transformers' `generate` continues the prompt with, greedily, in float32."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
    )
    return output[0, len(prompt) :].tolist()
