"""Weights in the order in which the CPU's matrix products read them.

oneDNN, which PyTorch uses on a CPU, multiplies by a matrix that is cut into small tiles. Given
rows, it cuts them anew in every call, and for a few tokens that takes longer than the product. Here
the weights are cut once, after loading, and the rows are given up.
"""

import torch
from torch import nn

from course_lib.model.decoder import Decoder

#: Tokens for which oneDNN chooses the tiles: those of a busy decode step. They are right, though
#: maybe not the fastest, for any other number.
EXPECTED_TOKENS = 64


class PackedLinear(nn.Module):
    """A linear layer whose weights are in oneDNN's order.

    Args:
        weight: `[out_features, in_features]`.
        bias: `[out_features]`.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self.weight = reorder(weight.detach(), EXPECTED_TOKENS)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, in_features]` to `[num_tokens, out_features]`."""
        multiply = torch.ops.mkldnn._linear_pointwise
        packed: torch.Tensor = multiply(x, self.weight, self.bias, "none", [], "")
        return packed


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN is here and multiplies this dtype."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


@torch.inference_mode()
def pack_weights(decoder: Decoder) -> None:
    """Pack every linear layer, one after another, so that only one is there twice.

    A head that is tied to the embedding becomes a matrix of its own: the embedding is read by rows.
    """
    for module in list(decoder.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(module, name, PackedLinear(layer.weight, layer.bias))
    if decoder.lm_head is None:
        decoder.lm_head = PackedLinear(decoder.model.embed_tokens.weight)
