"""The PyTorch expressions that kernels must equal, against attention on contiguous keys."""

import pytest
import torch
from hypothesis import given, settings

from kernels.kv_cache import write_kv_cache
from kernels.paged_attention import paged_attention_reference
from tests.paged_cases import POISON, PagedCase, dense_attention, make_case, paged_cases


@given(paged_cases())
@settings(max_examples=40)
def test_the_reference_is_dense_attention(case: PagedCase) -> None:
    got = paged_attention_reference(
        *case.contract, scale=case.scale, sliding_window=case.sliding_window
    )
    torch.testing.assert_close(got, dense_attention(case))


@pytest.mark.parametrize("sliding_window", [None, 1, 7, 8, 100])
def test_the_reference_at_block_boundaries(sliding_window: int | None) -> None:
    lens = [(1, 0), (1, 7), (1, 8), (7, 0), (8, 0), (9, 0), (8, 8), (3, 6), (17, 15), (1, 31)]
    case = make_case(lens, sliding_window=sliding_window)
    got = paged_attention_reference(*case.contract, scale=case.scale, sliding_window=sliding_window)
    torch.testing.assert_close(got, dense_attention(case))


def test_the_reference_writes_into_out() -> None:
    case = make_case([(3, 5), (1, 9)])
    out = torch.empty_like(case.q)
    got = paged_attention_reference(*case.contract, scale=0.3, out=out)
    assert got is out
    torch.testing.assert_close(out, paged_attention_reference(*case.contract, scale=0.3))
    assert not torch.allclose(out, paged_attention_reference(*case.contract, scale=0.1))


def test_the_reference_takes_caches_of_another_dtype() -> None:
    case = make_case([(3, 5), (1, 9)], dtype=torch.float64)
    q, k_cache, v_cache, *tables = case.contract
    got = paged_attention_reference(
        q.float(), k_cache, v_cache, *tables, scale=case.scale, sliding_window=None
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), dense_attention(case), rtol=1e-4, atol=1e-5)


def test_keys_and_values_go_to_their_slots_and_nowhere_else() -> None:
    case = make_case([(5, 6), (1, 15), (8, 0)])
    k, v = torch.randn(2, len(case.slot_mapping), *case.k_cache.shape[2:], dtype=torch.float64)
    k_cache, v_cache = torch.full((2, *case.k_cache.shape), POISON, dtype=torch.float64)
    write_kv_cache(k, v, k_cache, v_cache, case.slot_mapping)
    slots = case.slot_mapping.tolist()
    for new, cache in ((k, k_cache), (v, v_cache)):
        for row, slot in enumerate(slots):
            assert torch.equal(cache[slot // case.block_size, slot % case.block_size], new[row])
        others = [s for s in range(cache.shape[0] * case.block_size) if s not in slots]
        assert (cache.flatten(0, 1)[others] == POISON).all()
