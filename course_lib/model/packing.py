"""Weights in the order in which the CPU's matrix products read them.

`kernels/cpu/linear.cpp` multiplies by panels, not by rows. The weights are cut into panels once,
after loading, and the rows are given up.
"""

from typing import Any

import torch
from torch import nn

from course_lib.model.decoder import MLP, Decoder
from kernels import cpu


class PackedLinear(nn.Module):
    """A linear layer whose weights are packed.

    Args:
        weight: `[out_features, in_features]`, float32 or bfloat16; for bfloat16 `in_features` is
            even.
        bias: `[out_features]`.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.out_features = weight.shape[0]
        self.panels = cpu.pack(weight)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, in_features]` to `[num_tokens, out_features]`."""
        return cpu.linear(x, self.panels, self.out_features, self.bias)


class PackedMLP(nn.Module):
    """A layer's MLP, of which the gate is a part of the first product.

    Args:
        mlp: its weights; the same conditions as for `PackedLinear`.
    """

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        gate_up, down = mlp.gate_up_proj, mlp.down_proj
        self.inner_features = down.in_features
        self.panels = cpu.pack(cpu.gates_beside(gate_up.weight))
        self.bias = None if gate_up.bias is None else cpu.gates_beside(gate_up.bias)
        self.down_proj = PackedLinear(down.weight, down.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, hidden_size]` in and out."""
        return self.down_proj(cpu.gated_linear(x, self.panels, self.inner_features, self.bias))


@torch.inference_mode()
def pack_weights(decoder: Decoder) -> bool:
    """Pack every linear layer, one after another, so that only one is there twice.

    A head that is tied to the embedding becomes a matrix of its own: the embedding is read by rows.
    Nothing is packed if a size is odd, which no published model has: bfloat16 goes in pairs.

    Returns:
        Whether they were packed.
    """
    if decoder.config.hidden_size % 2 or decoder.config.intermediate_size % 2:
        return False
    layers: Any = decoder.model.layers
    for layer in layers:
        attention = layer.self_attn
        attention.qkv_proj = PackedLinear(attention.qkv_proj.weight, attention.qkv_proj.bias)
        attention.o_proj = PackedLinear(attention.o_proj.weight, attention.o_proj.bias)
        layer.mlp = PackedMLP(layer.mlp)
    head: Any = decoder.lm_head or decoder.model.embed_tokens
    decoder.lm_head = PackedLinear(head.weight)
    return True
