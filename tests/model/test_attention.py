"""The attention backends against dense attention on contiguous keys, and through the engine."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from course_lib import LLM, SamplingParams
from course_lib.model import attention
from course_lib.model.attention import (
    AttentionBackend,
    AttentionMetadata,
    FunctionAttention,
    TorchAttention,
    choose_backend,
)
from kernels import cpu
from kernels.paged_attention import paged_attention_reference
from kernels.runtime import INTERPRETED
from tests.checkpoints import random_model, save
from tests.paged_cases import PagedCase, dense_attention, make_case, paged_cases

CPU = torch.device("cpu")
BACKENDS = [TorchAttention(CPU), FunctionAttention(paged_attention_reference, CPU)]


def metadata_of(case: PagedCase) -> AttentionMetadata:
    return AttentionMetadata(
        block_tables=case.block_tables.cpu().numpy(),
        context_lens=case.context_lens.cpu().numpy(),
        query_start_loc=case.query_start_loc.cpu().numpy(),
        block_size=case.block_size,
    )


def attend(backend: AttentionBackend, case: PagedCase) -> torch.Tensor:
    return backend.attend(
        case.q,
        case.k_cache,
        case.v_cache,
        backend.plan(metadata_of(case)),
        scale=case.scale,
        sliding_window=case.sliding_window,
    )


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@given(case=paged_cases())
@settings(max_examples=40)
def test_attention_over_pages_is_dense_attention(
    backend: AttentionBackend, case: PagedCase
) -> None:
    torch.testing.assert_close(attend(backend, case), dense_attention(case))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", sorted(attention.BACKENDS))
def test_every_backend_that_has_a_name(name: str, device: str) -> None:
    if name == "TRITON_ATTN" and device == "cpu" and not INTERPRETED:
        pytest.skip("kernels are compiled in this process, so they take tensors on the GPU only")
    if name == "CPU_ATTN" and (device != "cpu" or cpu.why_not(torch.float32)):
        pytest.skip("the kernels in C++ need a CPU and a compiler")
    backend = choose_backend(name, torch.device(device), torch.float32)
    for window in (None, 7):
        case = make_case(
            [(1, 30), (9, 10), (12, 0), (1, 5)],
            dtype=torch.float32,
            device=device,
            sliding_window=window,
        )
        got, want = attend(backend, case).double().cpu(), dense_attention(case)
        assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize(
    "lens",
    [
        [(1, 7), (1, 8), (1, 0), (1, 30)],  # decodes only
        [(4, 0), (4, 9), (4, 12)],  # chunks of one length
        [(3, 0), (4, 4)],  # of one size class, padded
        [(1, 5), (33, 0), (1, 64), (2, 2), (16, 16), (17, 3)],  # of everything, interleaved
    ],
    ids=str,
)
@pytest.mark.parametrize("sliding_window", [None, 1, 5])
def test_every_kind_of_batch(lens: list[tuple[int, int]], sliding_window: int | None) -> None:
    case = make_case(lens, sliding_window=sliding_window, queries_per_kv=3)
    torch.testing.assert_close(attend(TorchAttention(CPU), case), dense_attention(case))


def test_sixteen_bit_and_float32_stay_close_to_float64() -> None:
    lens = [(1, 40), (9, 3), (20, 0)]
    want = dense_attention(make_case(lens, dtype=torch.float64))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        case = make_case(lens, dtype=torch.float64)
        case.q, case.k_cache, case.v_cache = (
            t.to(dtype) for t in (case.q, case.k_cache, case.v_cache)
        )
        got = attend(TorchAttention(CPU), case)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_one_plan_serves_layers_with_different_windows() -> None:
    backend = TorchAttention(CPU)
    case = make_case([(1, 20), (9, 10), (12, 0)])
    plan = backend.plan(metadata_of(case))
    for window in (None, 4, None, 6, 4):
        case.sliding_window = window
        got = backend.attend(
            case.q, case.k_cache, case.v_cache, plan, scale=case.scale, sliding_window=window
        )
        torch.testing.assert_close(got, dense_attention(case))


def test_a_function_gets_the_arguments_of_the_contract() -> None:
    case = make_case([(1, 12), (9, 3)], sliding_window=5)
    calls = []

    def mine(*args: torch.Tensor, **options: object) -> torch.Tensor:
        calls.append((args, options))
        return args[0] * 2

    backend = FunctionAttention(mine, CPU)
    assert backend.name == "mine"
    assert torch.equal(attend(backend, case), case.q * 2)
    [(args, options)] = calls
    assert all(torch.equal(got, want) for got, want in zip(args, case.contract, strict=True))
    assert all(table.dtype == torch.int32 for table in args[3:])
    assert options == {"scale": case.scale, "sliding_window": 5}


@pytest.mark.parametrize("family", ["mistral-sliding-window", "qwen3"])
def test_the_engine_gives_the_same_tokens_on_a_function(tmp_path: Path, family: str) -> None:
    directory = save(random_model(family), tmp_path)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(97, size=n).tolist() for n in (1, 30, 8, 17)]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    num_calls = 0

    def counted(*args: torch.Tensor, **options: object) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        return paged_attention_reference(*args, **options)

    def tokens(**parts: object) -> list[list[int]]:
        llm = LLM(directory, dtype="float32", block_size=8, max_num_batched_tokens=20, **parts)
        return [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]

    assert tokens(paged_attention=counted) == tokens()
    assert num_calls > 3 * 12
