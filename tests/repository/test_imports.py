"""What importing the package needs: only the core dependencies, and PyTorch only where it computes.

Each test imports in a fresh interpreter in which the forbidden packages cannot be imported.
"""

import subprocess
import sys

import pytest

# Installed by extras, or on some systems only. Each may be imported only inside the module or the
# function that uses it.
OPTIONAL = [
    "fastapi",
    "IPython",
    "ipywidgets",
    "jupyterlab",
    "matplotlib",
    "nbformat",
    "pandas",
    "prometheus_client",
    "ray",
    "statsmodels",
    "transformers",
    "uvicorn",
    "vllm",
]
CORE_IMPORTS = [
    "from course_lib import LLM, SamplingParams, RequestOutput",
    "from course_lib.engine.engine import LLMEngine",
    "import course_lib.cli",
]


def run_without(forbidden: list[str], code: str) -> None:
    """Run code in a new interpreter where importing one of the forbidden packages fails."""
    blocker = (
        "import importlib.abc, sys\n"
        "class Blocker(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name.split('.')[0] in {set(forbidden)!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r} (blocked)', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    done = subprocess.run([sys.executable, "-c", blocker + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_blocker_blocks():
    with pytest.raises(AssertionError, match="blocked"):
        run_without(["json"], "import json")


def test_the_package_itself_imports_without_pytorch():
    run_without(["torch"], "import course_lib; assert course_lib.__version__")


@pytest.mark.parametrize("module", ["request", "block_pool", "scheduler"])
def test_the_bookkeeping_imports_without_pytorch(module):
    run_without(["torch", "triton", *OPTIONAL], f"import course_lib.engine.{module}")


@pytest.mark.parametrize("statement", CORE_IMPORTS)
def test_the_core_needs_no_extra(statement):
    run_without(OPTIONAL, statement)


@pytest.mark.parametrize("statement", CORE_IMPORTS)
def test_the_core_imports_on_macos_which_has_no_triton(statement):
    # PyTorch comes first: its Linux build would look for macOS's own modules.
    run_without(["triton"], f"import sys, torch; sys.platform = 'darwin'\n{statement}")


def test_another_package_named_kernels_is_named_with_the_cure(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(name): ...\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import course_lib.model"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    last_line = result.stderr.strip().splitlines()[-1]
    assert "ImportError" in last_line and str(tmp_path) in last_line
    assert "pip uninstall kernels" in last_line
