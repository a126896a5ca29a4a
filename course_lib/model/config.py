"""What a checkpoint says it is: `config.json` of a Hugging Face directory, checked and normalised.

The supported families are dense decoders that differ only in details: Llama (rope scaling, biases),
Mistral (sliding window), Qwen2 (biases on q, k, v) and Qwen3 (norm on queries and keys). Anything
that would change the result and is not implemented is refused by name.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint that cannot be served. The message names the file and what was expected."""


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies stretched for longer contexts; see `decoder.rope_frequencies`."""

    kind: str  # "linear" or "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder. Lengths in tokens, sizes in elements."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    #: One entry a layer: the window in tokens, or None for full attention.
    sliding_windows: tuple[int | None, ...]
    dtype: str  # of the stored weights, e.g. "float16"

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Keys and values of one token in all layers, at `itemsize` bytes a number."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize

    @property
    def num_parameters(self) -> int:
        """Numbers in the checkpoint."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a checkpoint of this shape holds."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q_size = self.num_heads * self.head_dim
        kv_size = self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        linears = {
            "self_attn.q_proj": (q_size, hidden, self.qkv_bias),
            "self_attn.k_proj": (kv_size, hidden, self.qkv_bias),
            "self_attn.v_proj": (kv_size, hidden, self.qkv_bias),
            "self_attn.o_proj": (hidden, q_size, self.o_bias),
            "mlp.gate_proj": (inner, hidden, self.mlp_bias),
            "mlp.up_proj": (inner, hidden, self.mlp_bias),
            "mlp.down_proj": (hidden, inner, self.mlp_bias),
        }
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            for name, (rows, columns, bias) in linears.items():
                shapes[f"{prefix}{name}.weight"] = (rows, columns)
                if bias:
                    shapes[f"{prefix}{name}.bias"] = (rows,)
            for name in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{prefix}{name}.weight"] = (hidden,)
            if self.qk_norm:
                shapes[f"{prefix}self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[f"{prefix}self_attn.k_norm.weight"] = (self.head_dim,)
        return shapes

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "ModelConfig":
        """Read `config.json`.

        Raises:
            CheckpointError: it is missing, unreadable, or describes something unsupported.
        """
        return parse_config(read_json(Path(directory) / "config.json"), Path(directory))


#: Architecture -> what distinguishes it: (bias on q, k, v), (bias on o), (norm on q and k). A
#: string is the config's switch for it.
_FAMILIES: dict[str, tuple[str | bool, str | bool, bool]] = {
    "LlamaForCausalLM": ("attention_bias", "attention_bias", False),
    "MistralForCausalLM": (False, False, False),
    "Qwen2ForCausalLM": (True, False, False),
    "Qwen3ForCausalLM": ("attention_bias", "attention_bias", True),
}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint.

    Raises:
        CheckpointError: the file is missing or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist; expected a Hugging Face checkpoint directory"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


def parse_config(raw: dict[str, Any], directory: Path) -> ModelConfig:
    """Normalise the contents of a `config.json`; `directory` is for error messages."""
    path = directory / "config.json"
    architecture = (raw.get("architectures") or ["missing"])[0]
    if architecture not in _FAMILIES:
        raise CheckpointError(
            f"{path}: architecture {architecture} is not supported; expected one of "
            + ", ".join(sorted(_FAMILIES))
        )
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise CheckpointError(
            f"{path}: weights quantized with {method!r} are not supported; "
            "expected float32, float16 or bfloat16 weights"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(
            f"{path}: hidden_act {raw['hidden_act']!r} is not supported; expected 'silu'"
        )

    def size(name: str, default: int | None = None) -> int:
        value = raw.get(name, default)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{path}: {name} must be a positive integer, found {value!r}")
        return value

    def switch(which: str | bool) -> bool:
        return bool(raw.get(which, False)) if isinstance(which, str) else which

    qkv_bias, o_bias, qk_norm = _FAMILIES[architecture]
    hidden_size, num_heads = size("hidden_size"), size("num_attention_heads")
    num_kv_heads, num_layers = size("num_key_value_heads", num_heads), size("num_hidden_layers")
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"{path}: num_attention_heads {num_heads} must be a multiple of num_key_value_heads "
            f"{num_kv_heads}"
        )
    head_dim = size("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise CheckpointError(f"{path}: head_dim must be even for rotary, found {head_dim}")
    rope_theta, rope_scaling = _rope(raw, path)
    return ModelConfig(
        architecture=architecture,
        vocab_size=size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=size("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=size("max_position_embeddings", 2048),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=switch(qkv_bias),
        o_bias=switch(o_bias),
        mlp_bias=architecture == "LlamaForCausalLM" and bool(raw.get("mlp_bias", False)),
        qk_norm=qk_norm,
        sliding_windows=_sliding_windows(raw, architecture, num_layers, path),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
    )


def _rope(raw: dict[str, Any], path: Path) -> tuple[float, RopeScaling | None]:
    """Base frequency and scaling. transformers 5 writes both into `rope_parameters`."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return theta, None
    try:
        if kind == "linear":
            return theta, RopeScaling(kind, float(parameters["factor"]))
        if kind == "llama3":
            return theta, RopeScaling(
                kind,
                float(parameters["factor"]),
                float(parameters["low_freq_factor"]),
                float(parameters["high_freq_factor"]),
                int(parameters["original_max_position_embeddings"]),
            )
    except KeyError as missing:
        raise CheckpointError(f"{path}: rope scaling {kind!r} lacks {missing}") from None
    raise CheckpointError(
        f"{path}: rope scaling {kind!r} is not supported; expected default, linear or llama3"
    )


def _sliding_windows(
    raw: dict[str, Any], architecture: str, num_layers: int, path: Path
) -> tuple[int | None, ...]:
    window = raw.get("sliding_window")
    if architecture == "LlamaForCausalLM" or not window:
        return (None,) * num_layers
    if architecture == "MistralForCausalLM":
        return (int(window),) * num_layers
    if not raw.get("use_sliding_window", False):  # Qwen states a window even when it is off
        return (None,) * num_layers
    kinds = raw.get("layer_types")
    if kinds is None:
        first = int(raw.get("max_window_layers", num_layers))
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    if len(kinds) != num_layers:
        raise CheckpointError(
            f"{path}: layer_types must have {num_layers} entries, one a layer, found {len(kinds)}"
        )
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)
