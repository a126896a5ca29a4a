"""How far from float64 a kernel may be, and memory in which nothing unwritten goes unnoticed."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

#: Largest ||out - reference|| / ||reference||.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE)


def assert_accurate(got: torch.Tensor, want: torch.Tensor) -> None:
    """`got` lies within the tolerance of its dtype around `want`, which is float64."""
    assert got.shape == want.shape
    error, size = (got.double().cpu() - want.cpu()).norm().item(), want.norm().item()
    limit = TOLERANCE[got.dtype] * size
    assert error <= limit, f"off by {error:.3g}, of {size:.3g}; at most {limit:.3g} allowed"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """In here PyTorch hands out memory full of NaN, so a place that is not written shows."""
    torch.use_deterministic_algorithms(True)  # which fill what `torch.empty` returns
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def supported(device: str) -> list[torch.dtype]:
    """The dtypes that the kernels run in there."""
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        return [torch.float32, torch.float16]
    return DTYPES


def skip_unsupported(dtype: torch.dtype, device: str) -> None:
    if dtype not in supported(device):
        pytest.skip("this GPU has no bfloat16 arithmetic")
