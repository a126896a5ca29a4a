"""The kernels in C++ against float64, and what happens where they cannot be compiled."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from course_lib import LLM, SamplingParams, doctor
from kernels import cpu
from kernels.cpu import build
from kernels.rope_and_cache import rope_and_cache_reference
from tests.kernels.accuracy import assert_accurate, poisoned_memory
from tests.kernels.test_paged_attention import BATCHES
from tests.kernels.test_rope_and_cache import make_inputs
from tests.paged_cases import PagedCase, dense_attention, make_case, paged_cases

REASON = cpu.why_not(torch.float32)
DTYPES = [torch.float32, torch.bfloat16]
NAN = float("nan")

compiled = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_attention(case: PagedCase) -> None:
    with poisoned_memory():
        got = cpu.paged_attention(
            *case.contract, scale=case.scale, sliding_window=case.sliding_window
        )
    assert_accurate(got, dense_attention(case))


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("batch", list(BATCHES))
def test_attention(batch: str, window: int | None, dtype: torch.dtype) -> None:
    check_attention(make_case(BATCHES[batch], dtype=dtype, poison=NAN, sliding_window=window))


@compiled
@given(case=paged_cases(dtypes=[torch.float32, torch.bfloat16]))
@settings(max_examples=60)
def test_attention_at_random(case: PagedCase) -> None:
    check_attention(case)


@compiled
@pytest.mark.parametrize("head_dim", [64, 128, 20])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 4), (6, 2), (4, 4), (5, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_any_heads(
    head_dim: int, heads: int, kv_heads: int, dtype: torch.dtype
) -> None:
    for lens in ([(1, 300)], [(1, n) for n in range(10)], [(40, 3)]):
        check_attention(
            make_case(
                lens,
                num_kv_heads=kv_heads,
                queries_per_kv=heads // kv_heads,
                head_dim=head_dim,
                dtype=dtype,
                poison=NAN,
            )
        )


@compiled
def test_scores_of_any_size_and_nan_in_a_key() -> None:
    case = make_case([(1, 20)], dtype=torch.float32, poison=NAN)
    for scale in (1e-30, 1.0, 1e4):
        got = cpu.paged_attention(*case.contract, scale=scale)
        assert got.isfinite().all()
    case.k_cache[:] = NAN
    assert cpu.paged_attention(*case.contract, scale=1.0).isnan().all()


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("add", [False, True], ids=["alone", "with residual"])
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 128), (2, 1000), (65, 77), (1, 4096)])
def test_rms_norm(rows: int, size: int, add: bool, dtype: torch.dtype) -> None:
    x, residual = randn(2, rows, size, dtype=dtype)
    weight = randn(size, dtype=dtype, seed=1)
    with poisoned_memory():
        got, total = cpu.rms_norm(x, weight, 1e-3, residual if add else None)
    assert torch.equal(total, x + residual if add else x)
    stream = total.double()
    want = stream / (stream.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    assert_accurate(got, want)


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 77, 128])
def test_embedding(size: int, dtype: torch.dtype) -> None:
    weight = randn(50, size, dtype=dtype)
    token_ids = torch.tensor([49, 0, 7, 7, 0])
    assert torch.equal(cpu.embedding(token_ids, weight), F.embedding(token_ids, weight))
    assert cpu.embedding(token_ids[:0], weight).shape == (0, size)


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_and_mul(dtype: torch.dtype) -> None:
    gate_up = torch.cat([randn(33, 250, dtype=dtype) * 4, randn(33, 250, dtype=dtype, seed=1)], 1)
    gate_up[0, :6] = torch.tensor([0, -0.0, 87, -87, 300, -300], dtype=dtype)
    with poisoned_memory():
        got = cpu.silu_and_mul(gate_up)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_accurate(got, F.silu(gate) * up)
    assert got.isfinite().all()


@compiled
@given(
    num_tokens=st.integers(1, 40),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    half=st.integers(1, 40),
    norm=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_rope_and_cache(
    num_tokens: int,
    heads: tuple[int, int],
    half: int,
    norm: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    inputs = make_inputs(num_tokens, *heads, 2 * half, norm=norm, dtype=dtype, seed=seed)
    exact: dict[str, Any] = {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    with poisoned_memory():
        q = cpu.rope_and_cache(**inputs)
    assert_accurate(q, rope_and_cache_reference(**exact))
    for name in ("k_cache", "v_cache"):
        written = ~exact[name].isnan()
        assert torch.equal(written, ~inputs[name].isnan())  # nothing else was touched
        assert_accurate(inputs[name][written], exact[name][written])


def forget() -> None:
    """The library is looked for anew."""
    build.load_library.cache_clear()
    build.kernels.cache_clear()


@pytest.fixture
def forgetful() -> Iterator[None]:
    """The library is looked for anew, before and after."""
    forget()
    yield
    forget()


def tokens_of(model: Path) -> tuple[str, list[int]]:
    llm = LLM(model, max_model_len=128)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    [output] = llm.generate(["Where is my order?"], params, use_tqdm=False)
    return llm.llm_engine.attention.name, list(output.outputs[0].token_ids)


@compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what runs on a CPU")
def test_without_a_compiler_the_engine_says_the_same(
    forgetful: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path("data/models/merchant-chat")
    name, expected = tokens_of(model)
    assert name == "CPU_ATTN"
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    forget()
    assert cpu.why_not(torch.float32) == ("there is no C++ compiler: install g++ or clang++")
    assert tokens_of(model) == ("TORCH_SDPA", expected)
    [finding] = [f for f in doctor.examine() if f.name == "CPU kernels"]
    assert finding.value == "not there" and "install g++ or clang++" in finding.hint
    with pytest.raises(ValueError, match=r"CPU_ATTN cannot run here: there is no C\+\+ compiler"):
        LLM(model, attention_backend="CPU_ATTN")


def test_a_compiler_that_fails_is_quoted(
    forgetful: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('unknown option -march')\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    reason = cpu.why_not(torch.float32)
    assert reason == "the compiler fails on the kernels: unknown option -march\n"
    assert not list((tmp_path / "cache" / "gpu-serving-labs").iterdir())


@compiled
def test_they_are_compiled_once(
    forgetful: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.load_library()
    [made] = (tmp_path / "gpu-serving-labs").iterdir()
    before = made.stat().st_mtime_ns
    forget()
    build.load_library()
    assert [made] == list((tmp_path / "gpu-serving-labs").iterdir())
    assert made.stat().st_mtime_ns == before
    forget()
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-DANOTHER"])
    build.load_library()
    assert len(list((tmp_path / "gpu-serving-labs").iterdir())) == 2


#: Vectors of 4 and 8 floats, and 16 without instructions for bfloat16: other machines' code paths.
MACHINES = ["x86-64", "x86-64-v3", "x86-64-v4"]


def can_run(machine: str) -> bool:
    """Whether this CPU has the instructions of that level."""
    wanted = {"x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512vl"}[machine]
    info = Path("/proc/cpuinfo")
    return info.exists() and f" {wanted} " in info.read_text()


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_on_a_machine_with_other_vectors(
    machine: str, forgetful: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not can_run(machine):
        pytest.skip(f"this CPU has no instructions of {machine}")
    flags = [flag for flag in build.FLAGS if not flag.startswith("-march")]
    monkeypatch.setattr(build, "FLAGS", [*flags, f"-march={machine}"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cpu.why_not(torch.float32) is None
    columns = {"x86-64": 16, "x86-64-v3": 16, "x86-64-v4": 64}
    assert build.load_library().panel_columns() == columns[machine]
    for dtype in DTYPES:
        for head_dim in (64, 128, 20):
            for lens in ([(1, 300), (1, 5)], [(40, 3), (3, 250)]):
                check_attention(
                    make_case(
                        lens, num_kv_heads=2, queries_per_kv=3, head_dim=head_dim, dtype=dtype,
                        poison=NAN, sliding_window=None if head_dim == 64 else 50,
                    )
                )  # fmt: skip
        test_rms_norm(3, 77, True, dtype)
        test_silu_and_mul(dtype)
        for num_tokens in (1, 5, 97):
            x, weight = randn(num_tokens, 130, dtype=dtype), randn(70, 130, dtype=dtype, seed=1)
            got = cpu.linear(x, cpu.pack(weight), 70)
            assert_accurate(got, x.double() @ weight.double().T)
            got = cpu.gated_linear(x, cpu.pack(cpu.gates_beside(weight)), 35)
            gate, up = (x.double() @ weight.double().T).chunk(2, dim=-1)
            assert_accurate(got, F.silu(gate) * up)


def test_there_are_no_kernels_for_other_dtypes() -> None:
    assert cpu.why_not(torch.float16) == (
        "there are kernels for float32, bfloat16, not for torch.float16"
    )
