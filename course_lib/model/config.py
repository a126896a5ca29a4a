"""What a checkpoint says it is: `config.json` of a Hugging Face directory, checked and normalised.

The supported families are dense decoders that differ only in details: Llama (rope scaling, biases),
Mistral (sliding window), Qwen2 (biases on q, k, v) and Qwen3 (norm on queries and keys). Anything
that would change the result and is not implemented is refused by name.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn


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
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


class _Fields:
    """The fields of a JSON object, read with a check of their type and range."""

    def __init__(self, raw: dict[str, Any], path: Path) -> None:
        self.raw = raw
        self.path = path

    def refuse(self, name: str, expected: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {name} must be {expected}, found {self.raw[name]!r}")

    def get(self, name: str, kind: type, expected: str, default: Any = None) -> Any:
        """The field; `default` where it is missing or null."""
        value = self.raw.get(name)
        if value is not None and not isinstance(value, kind):
            self.refuse(name, expected)
        return default if value is None else value

    def size(self, name: str, default: int | None = None, largest: int = 2**26) -> int:
        """A positive integer; `largest` keeps a damaged number from filling the memory."""
        value = self.raw.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= largest:
            raise CheckpointError(
                f"{self.path}: {name} must be a positive integer up to {largest}, found {value!r}"
            )
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self.raw.get(name)
        if value is None and default is not None:
            return default
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        if value is None or not ok or not 0 < value <= sys.float_info.max:
            raise CheckpointError(f"{self.path}: {name} must be a positive number, found {value!r}")
        return float(value)

    def switch(self, name: str) -> bool:
        """True or false; false where it is missing."""
        return self.get(name, bool, "true or false", default=False)


def parse_config(raw: dict[str, Any], directory: Path) -> ModelConfig:
    """Normalise the contents of a `config.json`; `directory` is for error messages."""
    path = directory / "config.json"
    fields = _Fields(raw, path)
    architectures = fields.get("architectures", list, "a list of names") or ["missing"]
    architecture = architectures[0]
    if not isinstance(architecture, str) or architecture not in _FAMILIES:
        raise CheckpointError(
            f"{path}: architecture {architecture} is not supported; expected one of "
            + ", ".join(sorted(_FAMILIES))
        )
    quantization = fields.get("quantization_config", dict, "an object")
    if quantization:
        method = quantization.get("quant_method", "unknown")
        raise CheckpointError(
            f"{path}: weights quantized with {method!r} are not supported; "
            "expected float32, float16 or bfloat16 weights"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(
            f"{path}: hidden_act {raw['hidden_act']!r} is not supported; expected 'silu'"
        )

    def bias(which: str | bool) -> bool:
        return fields.switch(which) if isinstance(which, str) else which

    qkv_bias, o_bias, qk_norm = _FAMILIES[architecture]
    hidden_size, num_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    num_kv_heads = fields.size("num_key_value_heads", num_heads)
    num_layers = fields.size("num_hidden_layers", largest=10_000)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"{path}: num_attention_heads {num_heads} must be a multiple of num_key_value_heads "
            f"{num_kv_heads}"
        )
    head_dim = fields.size("head_dim", hidden_size // num_heads)
    if head_dim < 2 or head_dim % 2:
        raise CheckpointError(f"{path}: head_dim must be even for rotary, found {head_dim}")
    rope_theta, rope_scaling = _rope(fields)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=fields.size("max_position_embeddings", 2048),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_word_embeddings=fields.switch("tie_word_embeddings"),
        qkv_bias=bias(qkv_bias),
        o_bias=bias(o_bias),
        mlp_bias=architecture == "LlamaForCausalLM" and fields.switch("mlp_bias"),
        qk_norm=qk_norm,
        sliding_windows=_sliding_windows(fields, architecture, num_layers),
        dtype=_dtype(fields),
    )


def _dtype(fields: _Fields) -> str:
    """transformers 5 calls the field `dtype`, earlier ones `torch_dtype`."""
    name = "dtype" if fields.raw.get("dtype") is not None else "torch_dtype"
    dtype = fields.get(name, str, "the name of a floating type", default="float32")
    if dtype not in ("float64", "float32", "float16", "bfloat16"):
        fields.refuse(name, "float64, float32, float16 or bfloat16")
    return dtype


def _rope(fields: _Fields) -> tuple[float, RopeScaling | None]:
    """Base frequency and scaling. transformers 5 writes both into `rope_parameters`."""
    name = "rope_parameters" if fields.raw.get("rope_parameters") else "rope_scaling"
    rope = _Fields(fields.get(name, dict, "an object", default={}), fields.path)
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    if rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)) != 1:
        raise CheckpointError(f"{fields.path}: partial_rotary_factor other than 1 is not supported")
    kind = rope.raw.get("rope_type") or rope.raw.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind, rope.number("factor"))
    if kind == "llama3":
        scaling = RopeScaling(
            kind,
            rope.number("factor"),
            rope.number("low_freq_factor"),
            rope.number("high_freq_factor"),
            rope.size("original_max_position_embeddings"),
        )
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            rope.refuse("high_freq_factor", f"above low_freq_factor {scaling.low_freq_factor}")
        return theta, scaling
    raise CheckpointError(
        f"{fields.path}: rope scaling {kind!r} is not supported; expected default, linear or llama3"
    )


def _sliding_windows(fields: _Fields, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    if architecture == "LlamaForCausalLM" or not fields.raw.get("sliding_window"):
        return (None,) * num_layers
    if architecture == "MistralForCausalLM":
        return (fields.size("sliding_window"),) * num_layers
    if not fields.switch("use_sliding_window"):  # Qwen states a window even when it is off
        return (None,) * num_layers
    window = fields.size("sliding_window")
    kinds = fields.get("layer_types", list, "a list")
    if kinds is None:
        first = fields.get("max_window_layers", int, "an integer", default=num_layers)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    if len(kinds) != num_layers:
        raise CheckpointError(
            f"{fields.path}: layer_types must have {num_layers} entries, one a layer, "
            f"found {len(kinds)}"
        )
    if not all(kind in ("sliding_attention", "full_attention") for kind in kinds):
        fields.refuse("layer_types", "of 'full_attention' and 'sliding_attention'")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
