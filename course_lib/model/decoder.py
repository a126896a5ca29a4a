"""The forward pass: flat tokens of many requests in, hidden states out.

One class covers the supported families, since they differ only in biases, norms and windows. All
requests' tokens lie one after another in one dimension; only attention knows where one request
ends, through the plan that its backend made for the step. Parameters carry the names of Hugging
Face checkpoints, with q, k, v and gate, up fused so that a layer has four matrix products. What
lies between them comes from `Ops`: PyTorch expressions or fused kernels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from course_lib.model.attention import AttentionBackend
from course_lib.model.config import ModelConfig
from course_lib.model.ops import TORCH_OPS, Ops

#: Keys and values of one layer, each `[num_blocks, block_size, num_kv_heads, head_dim]`.
LayerCache = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class StepInputs:
    """The flat tokens of a step, the requests' one after another, on the device."""

    token_ids: torch.Tensor  # [num_tokens] int64
    positions: torch.Tensor  # [num_tokens] int64, each token's place in its own sequence
    slot_mapping: torch.Tensor  # [num_tokens] int64, its place in the KV cache
    plan: Any  # what the attention backend made of the block tables
    #: [num_outputs] int64, the tokens whose hidden states are wanted; None for all
    output_rows: torch.Tensor | None = None


class RMSNorm(nn.Module):
    """Scale to unit root mean square over the last dimension (Zhang & Sennrich, 2019)."""

    def __init__(self, size: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.ops = ops

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The normalised sum of the residual stream and `x`, both `[num_tokens, size]`, and it."""
        return self.ops.rms_norm(x, self.weight, self.eps, residual)


class FusedLinear(nn.Linear):
    """Several linear layers on the same input as one matrix product."""

    def __init__(self, in_features: int, row_sizes: list[int], bias: bool) -> None:
        super().__init__(in_features, sum(row_sizes), bias=bias)
        self.row_sizes = row_sizes


def rope_frequencies(config: ModelConfig) -> torch.Tensor:
    """Angle per position of each pair of dimensions, `[head_dim / 2]` in radians (float32).

    RoFormer (Su et al., 2021). "linear" scaling divides all angles by the factor. "llama3" leaves
    short wavelengths alone, divides long ones and blends between (Llama 3.1's rope scaling).
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    scaled = frequencies / scaling.factor
    if scaling.kind == "linear":
        return scaled
    # How many turns a pair makes within the original context decides: few turns, full scaling.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * scaled


def rope_table(config: ModelConfig, max_len: int) -> torch.Tensor:
    """Cosines and sines of every position, `[max_len, 2, head_dim / 2]` (float32)."""
    angles = torch.arange(max_len).float()[:, None] * rope_frequencies(config)
    return torch.stack((angles.cos(), angles.sin()), dim=1)


class Attention(nn.Module):
    """Projections, rotary embedding, and attention over the paged cache."""

    def __init__(self, config: ModelConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.qkv_proj = FusedLinear(config.hidden_size, [q_size, kv_size, kv_size], config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.o_bias)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, ops)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, ops)
        self.eps = config.rms_norm_eps
        self.sliding_window = config.sliding_windows[layer]
        self.scale = config.head_dim**-0.5

    def forward(
        self,
        x: torch.Tensor,
        step: StepInputs,
        rope: torch.Tensor,
        cache: LayerCache,
        backend: AttentionBackend,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`[num_tokens, hidden_size]` in and out; writes this step's keys and values.

        With `rows`, `[num_rows]`, the output is theirs only.
        """
        # Written before it is read, so that requests of one step can share blocks.
        q = self.ops.rope_and_cache(
            self.qkv_proj(x),
            step.positions,
            rope,
            *cache,
            step.slot_mapping,
            None if self.q_norm is None else self.q_norm.weight,
            None if self.k_norm is None else self.k_norm.weight,
            self.eps,
        )
        out = backend.attend(
            q, *cache, step.plan, scale=self.scale, sliding_window=self.sliding_window
        )
        return self.o_proj((out if rows is None else out[rows]).flatten(1))


class MLP(nn.Module):
    """The gated feed-forward layer, SwiGLU (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        inner = config.intermediate_size
        self.gate_up_proj = FusedLinear(config.hidden_size, [inner, inner], config.mlp_bias)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, hidden_size]` in and out."""
        return self.down_proj(self.ops.silu_and_mul(self.gate_up_proj(x)))


class DecoderLayer(nn.Module):
    """Attention and MLP; each normalises the residual stream with the last output added to it."""

    def __init__(self, config: ModelConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.self_attn = Attention(config, layer, ops)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.mlp = MLP(config, ops)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        *attention_inputs: Any,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output, which the next one adds, and the residual stream before that.

        Both are `[num_tokens, hidden_size]`, or `[num_rows, hidden_size]` of the `rows` that are
        wanted; the rest goes to `Attention.forward`.
        """
        x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, *attention_inputs, rows=rows)
        residual = residual if rows is None else residual[rows]
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual


class DecoderStack(nn.Module):
    """Embedding, layers and last norm; its parameters are named `model.*` in checkpoints."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        # Given its weight, it draws no random one, for which PyTorch would import a lot.
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=weight)
        self.layers = nn.ModuleList(DecoderLayer(config, i, ops) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)


class Decoder(nn.Module):
    """A decoder-only language model over a paged KV cache.

    Args:
        config: its shape.
        max_model_len: positions that the rotary table covers.
        dtype: of the parameters, whose values are undefined until `load_weights` has run.
        device: where they lie.
        ops: the operations between the matrix products.
    """

    def __init__(
        self,
        config: ModelConfig,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
        ops: Ops = TORCH_OPS,
    ) -> None:
        super().__init__()
        self.config = config
        self.ops = ops
        with torch.device("meta"):  # no time is spent on random initial values
            self.model = DecoderStack(config, ops)
            self.lm_head: nn.Module | None = None  # if the embedding serves as head
            if not config.tie_word_embeddings:
                self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # As `to_empty`, without what PyTorch imports for it.
        self._apply(lambda meta: torch.empty(meta.shape, dtype=dtype, device=device))
        self.rope = rope_table(config, max_model_len).to(device)

    def forward(
        self, step: StepInputs, kv_cache: Sequence[LayerCache], backend: AttentionBackend
    ) -> torch.Tensor:
        """Hidden states after the last norm, `[num_tokens, hidden_size]`, or of `output_rows`.

        Of the other tokens the last layer takes keys and values and nothing else: in a prefill that
        saves most of a layer.

        Args:
            step: the tokens.
            kv_cache: one entry a layer.
            backend: computes attention; it has made the step's plan.
        """
        x = self.ops.embedding(step.token_ids, self.model.embed_tokens.weight)
        residual = None
        last = self.model.layers[-1]
        for layer, cache in zip(self.model.layers, kv_cache, strict=True):
            rows = step.output_rows if layer is last else None
            x, residual = layer(x, residual, step, self.rope, cache, backend, rows=rows)
        return self.model.norm(x, residual)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[n, hidden_size]` to `[n, vocab_size]` in float32."""
        if self.lm_head is None:
            return F.linear(hidden, self.model.embed_tokens.weight).float()
        logits: torch.Tensor = self.lm_head(hidden)
        return logits.float()
