"""Packed weights multiply as the plain ones do."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from course_lib.model.config import ModelConfig
from course_lib.model.decoder import MLP
from course_lib.model.ops import TORCH_OPS
from course_lib.model.packing import PackedLinear, PackedMLP
from kernels import cpu
from tests.kernels.accuracy import assert_accurate

REASON = cpu.why_not(torch.float32)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

DTYPES = [torch.float32, torch.bfloat16]
NUM_TOKENS = [1, 2, 3, 4, 5, 6, 7, 97, 257]


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize(("rows", "columns"), [(96, 40), (7, 130), (512, 64), (1, 2), (65, 3456)])
def test_products(dtype: torch.dtype, bias: bool, num_tokens: int, rows: int, columns: int) -> None:
    linear = nn.Linear(columns, rows, bias=bias).to(dtype)
    x = torch.randn(num_tokens, columns).to(dtype)
    got = PackedLinear(linear.weight, linear.bias)(x)
    assert_accurate(got, linear.double()(x.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("inner", [2, 32, 66, 352])
def test_gated_layers(dtype: torch.dtype, bias: bool, num_tokens: int, inner: int) -> None:
    config = ModelConfig.from_pretrained("data/models/merchant-chat")
    config = replace(config, intermediate_size=inner, mlp_bias=bias)
    mlp = MLP(config, TORCH_OPS).to(dtype)
    x = torch.randn(num_tokens, mlp.down_proj.out_features).to(dtype)
    got = PackedMLP(mlp)(x)
    assert got.dtype == dtype
    assert_accurate(got, mlp.double()(x.double()))


def test_nothing_else_is_read_or_written() -> None:
    """The last panel and the last rows of `x` end where their tensors end."""
    for dtype in DTYPES:
        memory = torch.full((64, 40), float("nan")).to(dtype)
        weight, x = memory[:7], memory[8:13]
        weight.normal_(), x.normal_()
        got = PackedLinear(weight)(x)
        assert got.shape == (5, 7) and got.isfinite().all()
