"""Packed weights multiply as the plain ones do."""

import pytest
import torch
from torch import nn

from course_lib.model.packing import PackedLinear, can_pack

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 3, 64, 257])
@pytest.mark.parametrize(("rows", "columns"), [(96, 40), (7, 130), (512, 64)])
def test_products(dtype: torch.dtype, bias: bool, num_tokens: int, rows: int, columns: int) -> None:
    if not can_pack(dtype, CPU):
        pytest.skip(f"oneDNN does not multiply {dtype} here")
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows, bias=bias).to(dtype)
    x = torch.randn(num_tokens, columns).to(dtype)
    want = nn.functional.linear(
        x.double(), linear.weight.double(), linear.bias.double() if bias else None
    )
    with torch.inference_mode():
        got = PackedLinear(linear.weight, linear.bias)(x)
    assert got.dtype == dtype
    assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm()


def test_what_cannot_be_packed() -> None:
    assert not can_pack(torch.float32, torch.device("cuda"))
    assert not can_pack(torch.float64, CPU)
