"""What all tests share: GPU tests are skipped without a GPU, and hypothesis has no time limit."""

import shutil

import pytest
from hypothesis import settings

import kernels.runtime  # noqa: F401 - switches the interpreter on before transformers imports Triton

# The machine is shared with other test processes, so a slow example says nothing.
settings.register_profile("course", deadline=None)
settings.load_profile("course")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    if shutil.which("nvidia-smi") is None:
        pytest.skip("needs an NVIDIA GPU, and this machine has none")
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU, and PyTorch sees none (CPU build, or no driver)")
