"""The PyTorch expressions that kernels must equal, against expressions of another kind."""

import pytest
import torch
from hypothesis import given, settings

from kernels.paged_attention import paged_attention_reference
from kernels.rope_and_cache import rope_and_cache_reference
from tests.paged_cases import POISON, PagedCase, dense_attention, make_case, paged_cases


@given(paged_cases(empty_slots=True))
@settings(max_examples=40)
def test_attention_is_dense_attention(case: PagedCase) -> None:
    got = paged_attention_reference(
        *case.contract, scale=case.scale, sliding_window=case.sliding_window
    )
    torch.testing.assert_close(got, dense_attention(case))


@pytest.mark.parametrize("sliding_window", [None, 1, 7, 8, 100])
def test_attention_at_block_boundaries(sliding_window: int | None) -> None:
    lens = [(1, 0), (1, 7), (1, 8), (7, 0), (8, 0), (9, 0), (8, 8), (3, 6), (17, 15), (1, 31)]
    case = make_case(lens, sliding_window=sliding_window)
    got = paged_attention_reference(*case.contract, scale=case.scale, sliding_window=sliding_window)
    torch.testing.assert_close(got, dense_attention(case))


def test_attention_writes_into_out() -> None:
    case = make_case([(3, 5), (1, 9)])
    out = torch.empty_like(case.q)
    got = paged_attention_reference(*case.contract, scale=0.3, out=out)
    assert got is out
    torch.testing.assert_close(out, paged_attention_reference(*case.contract, scale=0.3))
    assert not torch.allclose(out, paged_attention_reference(*case.contract, scale=0.1))


def test_attention_takes_caches_of_another_dtype() -> None:
    case = make_case([(3, 5), (1, 9)])
    q, k_cache, v_cache, *tables = case.contract
    got = paged_attention_reference(
        q.float(), k_cache, v_cache, *tables, scale=case.scale, sliding_window=None
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), dense_attention(case), rtol=1e-4, atol=1e-5)


def test_keys_and_values_go_to_their_slots_and_nowhere_else() -> None:
    case = make_case([(5, 6), (1, 15), (8, 0)])
    num_tokens = len(case.slot_mapping)
    heads = torch.randn(num_tokens, 4 + 2 + 2, 16, dtype=torch.float64)
    no_turn = torch.tensor([1.0, 0.0]).view(1, 2, 1).expand(1, 2, 8)  # cosine 1, sine 0
    k_cache, v_cache = torch.full((2, *case.k_cache.shape), POISON, dtype=torch.float64)
    q = rope_and_cache_reference(
        heads.flatten(1),
        torch.zeros(num_tokens, dtype=torch.int64),
        no_turn,
        k_cache,
        v_cache,
        case.slot_mapping,
    )
    assert torch.equal(q, heads[:, :4])
    slots = case.slot_mapping.tolist()
    for new, cache in ((heads[:, 4:6], k_cache), (heads[:, 6:], v_cache)):
        for row, slot in enumerate(slots):
            assert torch.equal(cache[slot // case.block_size, slot % case.block_size], new[row])
        others = [s for s in range(cache.shape[0] * case.block_size) if s not in slots]
        assert (cache.flatten(0, 1)[others] == POISON).all()
