"""Kernels run in Triton's interpreter on any machine, and compiled on a GPU: the same tests."""

import pytest

from kernels.runtime import INTERPRETED


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test's tensors lie."""
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("kernels are compiled in this process, so they take tensors on the GPU only")
    return request.param
