"""What there is to choose from: GPUs and models, read from the YAML files of `data/catalog`.

`find_gpu("H100_80GB")` and `find_model("Llama-3-8B")` look up a name in any case; `find_model` also
takes a Hugging Face `config.json` or its directory. A `Gpu` is a line of a datasheet, a
`ModelShape` what a model's configuration says about its size: parameters and KV bytes per token are
computed from the shape, mixture-of-experts and grouped-query attention included.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from course_lib.validation import known_name, number, whole_number

CATALOG_DIR = Path(__file__).resolve().parents[2] / "data" / "catalog"

#: Bytes of one number. TF32 is how a tensor core reads FP32, so it takes as much memory.
PRECISION_BYTES = {
    "fp32": 4.0,
    "tf32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "int4": 0.5,
}

#: One direction of PCIe 4.0 x16, which cards without NVLink use: 16 lanes of 16 GT/s, coded 128 of
#: 130 bits (PCI-SIG, PCI Express 4.0).
PCIE_4_X16_GB_S = 31.5


@dataclass(frozen=True)
class MigProfile:
    """A kind of MIG instance, such as 3g.40gb.

    The GPU's memory and its bandwidth come in eighths, its compute in sevenths (NVIDIA MIG User
    Guide, "Concepts").
    """

    name: str
    compute_slices: int  # of 7
    memory_slices: int  # of 8, capacity and bandwidth alike
    memory_gb: float
    max_instances: int  # of this profile on one GPU


@dataclass(frozen=True)
class Gpu:
    """A GPU of the catalogue; `gpus.yaml` says what each figure means."""

    name: str
    source: str
    memory_gb: float
    usable_gb: float
    bandwidth_gb_s: float
    tflops: Mapping[str, float]  # dense, by precision
    nvlink_gb_s: float | None  # each way
    usd_per_hour: float  # an example
    mig: tuple[MigProfile, ...]

    @property
    def link_gb_s(self) -> float:
        """Bandwidth to the next GPU, each way: NVLink's, or that of a PCIe 4.0 slot."""
        return PCIE_4_X16_GB_S if self.nvlink_gb_s is None else self.nvlink_gb_s


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides its memory and its speed. Sizes count numbers, not bytes."""

    name: str
    source: str
    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int  # tokens
    tied_embeddings: bool
    dense_params: int  # all layers and norms; no embeddings, no head, no routed experts
    moe_layers: int  # layers whose feed-forward is a choice of experts
    num_experts: int  # routed experts of such a layer
    experts_per_token: int
    expert_params: int  # of one routed expert
    precision: str  # of the stored weights if they are quantized, otherwise bf16
    is_exact: bool  # False: an unknown architecture, counted as if it were a Llama

    @property
    def embedding_params(self) -> int:
        """The table of token embeddings; the output head has as many."""
        return self.vocab_size * self.hidden_size

    @property
    def total_params(self) -> int:
        """What has to be in memory. A head tied to the embeddings counts once."""
        tables = 1 if self.tied_embeddings else 2
        experts = self.moe_layers * self.num_experts * self.expert_params
        return tables * self.embedding_params + self.dense_params + experts

    @property
    def active_params(self) -> int:
        """What takes part in one token: `total_params` without the experts not chosen."""
        idle = self.num_experts - self.experts_per_token
        return self.total_params - self.moe_layers * idle * self.expert_params

    def streamed_params(self, tokens: int) -> float:
        """What one step over `tokens` tokens reads from memory, at least once.

        Embedding rows are looked up, not streamed, unless the table is also the head. Of E experts
        of which each token chooses k, `E * (1 - (1 - k/E) ** tokens)` are expected to be read if
        tokens choose evenly and independently of each other.
        """
        experts = 0.0
        if self.moe_layers:
            missed = (1 - self.experts_per_token / self.num_experts) ** tokens
            experts = self.moe_layers * self.num_experts * (1 - missed) * self.expert_params
        return self.embedding_params + self.dense_params + experts

    def kv_bytes_per_token(self, kv_bytes: float = 2) -> float:
        """Keys and values of one token in all layers, at `kv_bytes` bytes a number."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * kv_bytes


@dataclass(frozen=True)
class ReferenceFit:
    """A rule of thumb of `reference_fit.yaml`, to show beside the calculator."""

    model: str
    precision: str
    weights_gb: float
    kv_gb_per_1k_tokens: tuple[float, float]
    minimum: str


@cache
def gpus() -> Mapping[str, Gpu]:
    """Every GPU of `gpus.yaml` by name."""
    return {name: _parse_gpu(name, entry) for name, entry in read_yaml("gpus.yaml").items()}


@cache
def models() -> Mapping[str, ModelShape]:
    """Every model of `models.yaml` by name."""
    return {
        name: parse_model(entry["config"], name, entry["source"])
        for name, entry in read_yaml("models.yaml").items()
    }


def reference_fits() -> tuple[ReferenceFit, ...]:
    """The rules of thumb, smallest model first."""
    return tuple(
        ReferenceFit(**{**row, "kv_gb_per_1k_tokens": tuple(row["kv_gb_per_1k_tokens"])})
        for row in read_yaml("reference_fit.yaml")
    )


def find_gpu(name: str) -> Gpu:
    """A GPU by its name in the catalogue, in any case.

    Raises:
        ValueError: there is none. The message lists the known ones.
    """
    return gpus()[known_name("GPU", name, gpus())]


def find_model(name: str | Path) -> ModelShape:
    """A model by its name in the catalogue, in any case, or by the path of a `config.json`.

    Raises:
        ValueError: there is no such name or file (the message lists the known names), or the file
            does not describe a model whose size we can tell.
    """
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    is_file = path.suffix == ".json" and path.is_file()
    if not is_file:
        if path.suffix == ".json":
            raise ValueError(f"{path} does not exist; expected a Hugging Face config.json")
        try:
            return models()[known_name("model", str(name), models())]
        except ValueError as error:
            raise ValueError(f"{error}; or the path of a Hugging Face config.json") from None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(config).__name__}")
    name = path.parent.resolve().name if path.name == "config.json" else path.stem
    return parse_model(config, name, str(path))


@dataclass(frozen=True)
class _Family:
    """How an architecture differs from a Llama. A text names the config's switch for it."""

    qkv_bias: str | bool = False
    o_bias: str | bool = False
    mlp_bias: str | bool = False
    qk_norm: bool = False
    norms_per_layer: int = 2
    shared_expert_gate: bool = False
    ties_by_default: bool = False


#: By `model_type`; checked against transformers' own models in tests/sizing/test_catalog.py.
_FAMILIES = {
    "llama": _Family("attention_bias", "attention_bias", "mlp_bias"),
    "mistral": _Family(),
    "phi3": _Family(),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family("attention_bias", "attention_bias", qk_norm=True),
    "gemma2": _Family("attention_bias", "attention_bias", norms_per_layer=4, ties_by_default=True),
    "gemma3_text": _Family(
        "attention_bias", "attention_bias", qk_norm=True, norms_per_layer=4, ties_by_default=True
    ),
    "mixtral": _Family(),
    "qwen2_moe": _Family(qkv_bias=True, shared_expert_gate=True),
    "qwen3_moe": _Family("attention_bias", "attention_bias", qk_norm=True),
}

#: Keys of architectures whose cache is not "keys and values of every layer".
_OTHER_CACHES = {
    "kv_lora_rank": "multi-head latent attention",
    "linear_num_key_heads": "linear attention",
    "mamba_d_state": "state-space layers",
    "ssm_cfg": "state-space layers",
    "state_size": "state-space layers",
}


def parse_model(config: Mapping[str, Any], name: str, source: str) -> ModelShape:
    """Work out a shape from the contents of a `config.json`.

    An architecture that is not in the table but has the keys of a Llama is counted as one and
    marked `is_exact=False`. A sliding window is not taken off the KV cache, so sizes of models
    with one are upper bounds at long context.

    Raises:
        ValueError: a size is missing or not a positive whole number, or the model keeps something
            else than keys and values.
    """
    config = config.get("text_config") or config  # the language model of a multimodal one
    for key, kind in _OTHER_CACHES.items():
        if config.get(key):
            raise ValueError(
                f"{source} has {key}, so it uses {kind}, whose memory is not that of keys and "
                "values in every layer; pass numbers to estimate_gpu_requirements instead"
            )

    def size(*keys: str, default: int | None = None, at_least: int = 1) -> int:
        present = [config[key] for key in keys if config.get(key) is not None]
        value = present[0] if present else default
        return whole_number(f"{source}: {' or '.join(keys)}", value, at_least=at_least)

    def switch(which: str | bool) -> bool:
        return bool(config.get(which, False)) if isinstance(which, str) else which

    model_type = str(config.get("model_type", "unknown"))
    family = _FAMILIES.get(model_type, _Family("attention_bias", "attention_bias", "mlp_bias"))
    hidden, layers = size("hidden_size"), size("num_hidden_layers")
    inner = size("intermediate_size", "moe_intermediate_size")
    heads = size("num_attention_heads")
    kv_heads = size("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise ValueError(
            f"{source}: num_attention_heads {heads} must be a multiple of num_key_value_heads "
            f"{kv_heads}"
        )
    head_dim = size("head_dim", default=hidden // heads)

    q_size, kv_size = heads * head_dim, kv_heads * head_dim
    attention = hidden * (2 * q_size + 2 * kv_size)
    attention += switch(family.qkv_bias) * (q_size + 2 * kv_size)
    attention += switch(family.o_bias) * hidden + family.qk_norm * 2 * head_dim
    feed_forward = 3 * hidden * inner + switch(family.mlp_bias) * (2 * inner + hidden)

    num_experts = size(
        "num_local_experts", "num_experts", "n_routed_experts", default=0, at_least=0
    )
    moe_layers, experts_per_token, expert_params, beside_experts = 0, 0, 0, 0
    if num_experts:
        moe_layers = _count_moe_layers(config, layers)
        experts_per_token = size("num_experts_per_tok", "experts_per_token")
        if experts_per_token > num_experts:
            raise ValueError(
                f"{source}: num_experts_per_tok must be at most the {num_experts} experts, "
                f"got {experts_per_token}"
            )
        expert_size = size("moe_intermediate_size", "intermediate_size")
        expert_params = 3 * hidden * expert_size
        shared = size("shared_expert_intermediate_size", default=0, at_least=0)
        shared += size("n_shared_experts", default=0, at_least=0) * expert_size
        router = hidden * num_experts
        beside_experts = router + 3 * hidden * shared + family.shared_expert_gate * hidden

    return ModelShape(
        name=name,
        source=source,
        model_type=model_type,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=size("vocab_size"),
        max_position_embeddings=size("max_position_embeddings", default=2048),
        tied_embeddings=bool(config.get("tie_word_embeddings", family.ties_by_default)),
        dense_params=(
            layers * (attention + family.norms_per_layer * hidden)
            + (layers - moe_layers) * feed_forward
            + moe_layers * beside_experts
            + hidden  # the last norm
        ),
        moe_layers=moe_layers,
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        expert_params=expert_params,
        precision=_stored_precision(config.get("quantization_config")),
        is_exact=model_type in _FAMILIES,
    )


def _count_moe_layers(config: Mapping[str, Any], layers: int) -> int:
    """Every `decoder_sparse_step`-th layer, but for the first ones and those listed as dense."""
    step = config.get("decoder_sparse_step") or 1
    first = config.get("first_k_dense_replace") or 0
    dense = set(config.get("mlp_only_layers") or ())
    return sum((layer + 1) % step == 0 and layer not in dense for layer in range(first, layers))


def _stored_precision(quantization: Mapping[str, Any] | None) -> str:
    if not quantization:
        return "bf16"
    method = quantization.get("quant_method")
    if method in ("fp8", "fbgemm_fp8"):
        return "fp8"
    if method == "mxfp4" or quantization.get("bits") == 4 or quantization.get("load_in_4bit"):
        return "int4"
    if quantization.get("bits") == 8 or quantization.get("load_in_8bit"):
        return "int8"
    return "bf16"


def _parse_gpu(name: str, entry: Mapping[str, Any]) -> Gpu:
    def figure(key: str) -> float:
        return number(f"gpus.yaml: {key} of {name}", entry.get(key), above=0)

    memory_gb = figure("memory_gb")
    usable_gb = figure("usable_gb")
    number(f"gpus.yaml: usable_gb of {name}", usable_gb, at_most=memory_gb)
    for precision in entry["tflops"]:
        known_name(f"precision of {name}", precision, PRECISION_BYTES)
    return Gpu(
        name=name,
        source=entry["source"],
        memory_gb=memory_gb,
        usable_gb=usable_gb,
        bandwidth_gb_s=figure("bandwidth_gb_s"),
        tflops=entry["tflops"],
        nvlink_gb_s=None if entry["nvlink_gb_s"] is None else figure("nvlink_gb_s"),
        usd_per_hour=figure("usd_per_hour"),
        mig=tuple(_parse_mig(mig, count, memory_gb) for mig, count in entry["mig"].items()),
    )


def _parse_mig(name: str, max_instances: int, gpu_memory_gb: float) -> MigProfile:
    compute, memory = name.removesuffix("gb").split("g.")
    memory_gb = float(memory)
    return MigProfile(
        name=name,
        compute_slices=int(compute),
        memory_slices=round(8 * memory_gb / gpu_memory_gb),
        memory_gb=memory_gb,
        max_instances=max_instances,
    )


def read_yaml(name: str) -> Any:
    """The contents of a file of `data/catalog`."""
    return yaml.safe_load((CATALOG_DIR / name).read_text(encoding="utf-8"))
