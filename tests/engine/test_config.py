"""What the engine's arguments resolve to: dtype, attention backend, and the line that says so."""

import warnings
from pathlib import Path

import pytest
import torch

from course_lib import LLM
from course_lib.engine.config import EngineConfig, resolve_dtype
from course_lib.model.attention import choose_backend
from kernels import cpu
from kernels.paged_attention import paged_attention_reference
from tests.checkpoints import random_model, save

AMPERE, TURING = (8, 0), (7, 5)
DEFAULT_ON_A_CPU = "CPU_ATTN" if cpu.why_not(torch.float32) is None else "TORCH_SDPA"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model("llama", num_hidden_layers=1), tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("asked", "checkpoint", "capability", "expected"),
    [
        ("auto", "bfloat16", None, torch.float32),  # a CPU
        ("auto", "float16", None, torch.float32),
        ("auto", "bfloat16", AMPERE, torch.bfloat16),
        ("auto", "float16", AMPERE, torch.float16),
        ("auto", "float32", AMPERE, torch.float16),
        ("auto", "float32", TURING, torch.float16),
        ("float32", "bfloat16", TURING, torch.float32),
        ("float", "float16", AMPERE, torch.float32),
        ("half", "float32", None, torch.float16),
        ("bfloat16", "float32", None, torch.bfloat16),
        (torch.float16, "float32", AMPERE, torch.float16),
        (torch.bfloat16, "float32", (9, 0), torch.bfloat16),
    ],
)
def test_the_dtype(
    asked: str | torch.dtype,
    checkpoint: str,
    capability: tuple[int, int] | None,
    expected: torch.dtype,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_dtype(asked, checkpoint, capability) == expected


@pytest.mark.parametrize(
    ("asked", "checkpoint"),
    [("auto", "bfloat16"), ("bfloat16", "float32"), (torch.bfloat16, "float16")],
)
def test_a_gpu_without_bfloat16_runs_in_float16_and_says_so(
    asked: str | torch.dtype, checkpoint: str
) -> None:
    with pytest.warns(UserWarning) as caught:
        assert resolve_dtype(asked, checkpoint, TURING) == torch.float16
    [warning] = caught
    assert str(warning.message) == (
        "this GPU has compute capability 7.5 and no bfloat16 arithmetic (that came with 8.0), so "
        "the model runs in float16"
    )


@pytest.mark.parametrize("dtype", ["int8", "fp16", "", None, 16, torch.int64, torch.float64])
def test_another_dtype_is_refused(dtype: object) -> None:
    with pytest.raises(ValueError, match=r"dtype must be 'auto' or one of .*'bfloat16', 'float'"):
        resolve_dtype(dtype, "float32", None)


@pytest.mark.parametrize("name", ["FLASH_ATTN", "triton_attn", "", 1])
def test_another_backend_is_refused(directory: Path, name: object) -> None:
    message = r"attention_backend must be one of \['CPU_ATTN', 'TORCH_SDPA', 'TRITON_ATTN'\]"
    with pytest.raises(ValueError, match=message):
        EngineConfig(directory, attention_backend=name)
    with pytest.raises(ValueError, match=message):
        choose_backend(name, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        (None, "cpu", DEFAULT_ON_A_CPU),
        (None, "cuda", "TRITON_ATTN"),
        ("TRITON_ATTN", "cpu", "TRITON_ATTN"),
        ("TORCH_SDPA", "cuda", "TORCH_SDPA"),
    ],
)
def test_the_device_has_a_backend_unless_one_is_named(
    name: str | None, device: str, expected: str
) -> None:
    backend = choose_backend(name, torch.device(device), torch.float32)
    assert backend.name == expected
    recorded = {("TRITON_ATTN", "cuda"), ("CPU_ATTN", "cpu")}
    assert backend.graph_safe == ((expected, device) in recorded)


@pytest.mark.parametrize(
    ("options", "backend"),
    [
        ({}, DEFAULT_ON_A_CPU),
        ({"attention_backend": "TRITON_ATTN"}, "TRITON_ATTN"),
        ({"paged_attention": paged_attention_reference}, "paged_attention_reference"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what runs on a CPU")
def test_an_engine_says_what_runs_where(
    directory: Path, options: dict[str, object], backend: str
) -> None:
    llm = LLM(directory, max_model_len=64, block_size=8, num_gpu_blocks_override=1201, **options)
    assert str(llm.llm_engine) == (
        f"{directory.name} in float32 on cpu, attention by {backend}, KV cache of 9,600 tokens in "
        "1,200 blocks of 8"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="graphs are used there")
def test_under_tritons_interpreter_there_are_no_graphs(directory: Path) -> None:
    llm = LLM(directory, max_model_len=64, attention_backend="TRITON_ATTN")
    assert llm.llm_engine.executor.graphs is None
