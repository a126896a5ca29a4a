"""The forward pass: flat tokens of many requests in, hidden states out.

One class covers the supported families, since they differ only in biases, norms and windows. All
requests' tokens lie one after another in one dimension; only attention knows where one request
ends, through the plan that its backend made for the step. Parameters carry the names of Hugging
Face checkpoints, with q, k, v and gate, up fused so that a layer has four matrix products.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from course_lib.model.attention import AttentionBackend
from course_lib.model.config import ModelConfig

#: Keys and values of one layer, each `[num_blocks, block_size, num_kv_heads, head_dim]`.
LayerCache = tuple[torch.Tensor, torch.Tensor]


class RMSNorm(nn.Module):
    """Scale to unit root mean square over the last dimension (Zhang & Sennrich, 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise `[..., size]`; the arithmetic is in float32 whatever the dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


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


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `[num_tokens, num_heads, head_dim]`; dimension i pairs with i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Projections, rotary embedding, and attention over the paged cache."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        q_size = self.num_heads * self.head_dim
        kv_size = self.num_kv_heads * self.head_dim
        self.qkv_proj = FusedLinear(config.hidden_size, [q_size, kv_size, kv_size], config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm: RMSNorm | None = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm: RMSNorm | None = RMSNorm(self.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = None
        self.sliding_window = config.sliding_windows[layer]
        self.scale = self.head_dim**-0.5

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: LayerCache,
        backend: AttentionBackend,
        plan: Any,
    ) -> torch.Tensor:
        """`[num_tokens, hidden_size]` in and out; writes this step's keys and values."""
        heads = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        qk, v = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split([self.num_heads, self.num_kv_heads], dim=1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        q, k = apply_rope(qk, cos, sin).split([self.num_heads, self.num_kv_heads], dim=1)
        # Written before it is read, so that requests of one step can share blocks.
        backend.write(k, v, *cache, plan)
        out = backend.attend(q, *cache, plan, scale=self.scale, sliding_window=self.sliding_window)
        return self.o_proj(out.flatten(1))


class MLP(nn.Module):
    """The gated feed-forward layer, SwiGLU (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = config.intermediate_size
        self.gate_up_proj = FusedLinear(config.hidden_size, [inner, inner], config.mlp_bias)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, hidden_size]` in and out."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Attention and MLP, each normalised before and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, *attention_inputs: Any) -> torch.Tensor:
        """`[num_tokens, hidden_size]` in and out; the rest goes to `Attention.forward`."""
        x = x + self.self_attn(self.input_layernorm(x), *attention_inputs)
        return x + self.mlp(self.post_attention_layernorm(x))


class DecoderStack(nn.Module):
    """Embedding, layers and last norm; its parameters are named `model.*` in checkpoints."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A decoder-only language model over a paged KV cache.

    Args:
        config: its shape.
        max_model_len: positions that the rotary table covers.
        dtype: of the parameters, whose values are undefined until `load_weights` has run.
        device: where they lie.
    """

    def __init__(
        self, config: ModelConfig, max_model_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):  # no time is spent on random initial values
            self.model = DecoderStack(config)
            if not config.tie_word_embeddings:
                self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.to(dtype).to_empty(device=device)
        self.rope = rope_table(config, max_model_len).to(device)

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: Sequence[LayerCache],
        backend: AttentionBackend,
        plan: Any,
    ) -> torch.Tensor:
        """Hidden states after the last norm.

        Args:
            token_ids: `[num_tokens]`, the requests' tokens of this step one after another.
            positions: `[num_tokens]`, each token's place in its own sequence.
            kv_cache: one entry a layer.
            backend: computes attention.
            plan: `backend.plan(...)` of this step.

        Returns:
            `[num_tokens, hidden_size]`.
        """
        x = self.model.embed_tokens(token_ids)
        cos, sin = self.rope[positions].to(x.dtype)[:, None].unbind(dim=2)
        for layer, cache in zip(self.model.layers, kv_cache, strict=True):
            x = layer(x, cos, sin, cache, backend, plan)
        return self.model.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[n, hidden_size]` to `[n, vocab_size]` in float32."""
        tied = self.config.tie_word_embeddings
        head = self.model.embed_tokens if tied else self.lm_head
        return F.linear(hidden, head.weight).float()
