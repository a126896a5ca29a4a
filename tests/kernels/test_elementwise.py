"""RMSNorm with its addition, and SiLU with its product, against float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.rms_norm import rms_norm, rms_norm_reference
from kernels.silu_and_mul import silu_and_mul, silu_and_mul_reference
from tests.kernels.accuracy import (
    DTYPES,
    assert_accurate,
    poisoned_memory,
    skip_unsupported,
    supported,
)

EPS = 1e-3
ROWS_AND_SIZES = [(1, 1), (3, 128), (2, 1000), (1, 4096), (5, 8), (1, 8191)]


def randn(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype).to(device)


def check_rms_norm(
    rows: int, size: int, add: bool, dtype: torch.dtype, device: str, seed: int = 0
) -> None:
    x, residual = randn(2, rows, size, dtype=dtype, device=device, seed=seed)
    weight = randn(size, dtype=dtype, device=device, seed=seed + 1)
    copies = x.clone(), residual.clone()
    with poisoned_memory():
        got, total = rms_norm(x, weight, EPS, residual if add else None)
    added = x + residual if add else x
    if (
        dtype == torch.bfloat16 and device == "cpu"
    ):  # the interpreter cuts off where it should round
        assert_accurate(total, added.double())
    else:
        assert torch.equal(total, added)
    stream = total.double()  # the rounded sum is what the next layer adds to, so it is normalised
    want = stream / (stream.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    assert got.dtype == dtype
    assert_accurate(got, want)
    assert torch.equal(x, copies[0]) and torch.equal(residual, copies[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("add", [False, True], ids=["alone", "with residual"])
@pytest.mark.parametrize(("rows", "size"), ROWS_AND_SIZES)
def test_rms_norm(rows: int, size: int, add: bool, dtype: torch.dtype, device: str) -> None:
    skip_unsupported(dtype, device)
    check_rms_norm(rows, size, add, dtype, device)


def test_what_is_normalised_is_the_rounded_sum(device: str) -> None:
    """So that a model gives the same numbers with the kernel as with the expression."""
    x, residual = randn(2, 2, 4096, dtype=torch.float16, device=device)
    weight = randn(4096, dtype=torch.float16, device=device)
    got, total = rms_norm(x, weight, EPS, residual)
    stream = total.double()
    want = stream / (stream.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    assert (got == want.half()).double().mean() > 0.99


@given(data=st.data())
@settings(max_examples=15)
def test_rms_norm_of_random_shapes(data: st.DataObject, device: str) -> None:
    check_rms_norm(
        data.draw(st.integers(1, 12), "rows"),
        data.draw(st.integers(1, 300), "size"),
        data.draw(st.booleans(), "add"),
        data.draw(st.sampled_from(supported(device)), "dtype"),
        device,
        data.draw(st.integers(0, 1000), "seed"),
    )


def check_silu_and_mul(
    rows: int, size: int, dtype: torch.dtype, device: str, seed: int = 0
) -> None:
    gate_up = randn(rows, 2 * size, dtype=dtype, device=device, seed=seed) * 3
    with poisoned_memory():
        got = silu_and_mul(gate_up)
    gate, up = gate_up.double().split(size, dim=1)
    assert got.dtype == dtype
    assert_accurate(got, gate * torch.sigmoid(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size"), ROWS_AND_SIZES)
def test_silu_and_mul(rows: int, size: int, dtype: torch.dtype, device: str) -> None:
    skip_unsupported(dtype, device)
    check_silu_and_mul(rows, size, dtype, device)


@given(data=st.data())
@settings(max_examples=15)
def test_silu_and_mul_of_random_shapes(data: st.DataObject, device: str) -> None:
    check_silu_and_mul(
        data.draw(st.integers(1, 12), "rows"),
        data.draw(st.integers(1, 2100), "size"),
        data.draw(st.sampled_from(supported(device)), "dtype"),
        device,
        data.draw(st.integers(0, 1000), "seed"),
    )


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # intended: it makes the zero
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_gate_that_is_shut_gives_zero_and_not_nan(dtype: torch.dtype, device: str) -> None:
    gate_up = torch.tensor([[-6e4, -200.0, 6e4, 2.0, 2.0, 0.5]], dtype=dtype, device=device)
    torch.testing.assert_close(
        silu_and_mul(gate_up).cpu(), torch.tensor([[0, 0, 3e4]], dtype=dtype), rtol=1e-3, atol=0
    )


def test_the_expressions_and_the_kernels_have_one_contract(device: str) -> None:
    x, residual = randn(2, 4, 48, dtype=torch.float32, device=device)
    weight = randn(48, dtype=torch.float32, device=device)
    for arguments in ((x, weight, EPS), (x, weight, EPS, residual)):
        torch.testing.assert_close(rms_norm(*arguments), rms_norm_reference(*arguments))
    torch.testing.assert_close(silu_and_mul(x), silu_and_mul_reference(x))


def test_no_rows(device: str) -> None:
    x = torch.empty(0, 16, device=device)
    out, total = rms_norm(x, torch.ones(16, device=device), EPS, x)
    assert out.shape == total.shape == (0, 16)
    assert silu_and_mul(x).shape == (0, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(8)}, r"x must have shape \[any, any\], got \[8\]"),
        ({"x": torch.ones(8, 3).T}, "x must be contiguous; pass x.contiguous"),
        ({"weight": torch.ones(7)}, r"weight must have shape \[8\], got \[7\]"),
        ({"weight": torch.ones(8).half()}, "weight must be torch.float32, got torch.float16"),
        ({"weight": torch.ones(8, device="meta")}, "weight must be on cpu, got meta"),
        ({"residual": torch.ones(2, 8)}, r"residual must have shape \[3, 8\], got \[2, 8\]"),
        ({"residual": torch.ones(8, 3).T}, "residual must be contiguous"),
        ({"residual": torch.ones(3, 8).double()}, "residual must be torch.float32, got torch.flo"),
    ],
)
def test_what_rms_norm_refuses(changes: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.ones(3, 8), "weight": torch.ones(8), "eps": EPS} | changes
    with pytest.raises(ValueError, match=message):
        rms_norm(**arguments)


@pytest.mark.parametrize(
    ("gate_up", "message"),
    [
        (torch.ones(3, 7), "gate_up must have an even number of columns, got 7"),
        (torch.ones(2, 3, 8), r"gate_up must have shape \[any, any\], got \[2, 3, 8\]"),
        (torch.ones(8, 3).T, "gate_up must be contiguous"),
    ],
)
def test_what_silu_and_mul_refuses(gate_up: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        silu_and_mul(gate_up)
