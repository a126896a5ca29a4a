"""PagedAttention against dense attention in float64, one code path after another and at random.

Every case has NaN in all places that are no token of a request, and in all memory that the kernel
is handed to write to.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels.paged_attention
from kernels.paged_attention import (
    Tiles,
    choose_num_splits,
    choose_tiles,
    launch_paged_attention,
    paged_attention,
)
from tests.kernels.accuracy import (
    DTYPES,
    assert_accurate,
    poisoned_memory,
    skip_unsupported,
    supported,
)
from tests.paged_cases import PagedCase, dense_attention, make_case, paged_cases

NAN = float("nan")

#: (query tokens, tokens before them) of each request.
BATCHES = {
    "one token": [(1, 0)],
    "exactly one block": [(1, 7), (8, 0), (3, 5)],
    "around block boundaries": [(1, 6), (1, 7), (1, 8), (7, 0), (9, 0), (8, 8), (3, 6), (17, 15)],
    "decode": [(1, 40), (1, 3), (1, 150), (1, 16)],
    "prefill": [(33, 0), (5, 0), (64, 0)],
    "chunk of a long prompt": [(19, 100)],
    "mix": [(1, 70), (21, 9), (1, 0), (18, 33), (2, 2)],
    "empty slots": [(0, 0), (1, 20), (0, 9), (0, 0), (6, 4), (0, 30)],
}


def random_case(lens: list[tuple[int, int]], **options: Any) -> PagedCase:
    options = {"dtype": torch.float32, "poison": NAN, **options}
    return make_case(lens, **options)


def launched(case: PagedCase, **options: Any) -> torch.Tensor:
    """What `launch_paged_attention` writes over NaN."""
    out = torch.full_like(case.q, NAN)
    with poisoned_memory():
        got = launch_paged_attention(
            *case.contract,
            scale=case.scale,
            sliding_window=case.sliding_window,
            out=out,
            **options,
        )
    assert got is out
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_every_kind_of_batch(batch: str, dtype: torch.dtype, device: str) -> None:
    skip_unsupported(dtype, device)
    case = random_case(BATCHES[batch], queries_per_kv=3, dtype=dtype, device=device)
    with poisoned_memory():
        got = paged_attention(*case.contract, scale=case.scale)
    assert_accurate(got, dense_attention(case))


@pytest.mark.parametrize("num_splits", [1, 2, 4, 8])
@pytest.mark.parametrize("sliding_window", [None, 1, 7, 40])
@pytest.mark.parametrize("batch", ["decode", "mix", "empty slots"])
def test_windows_and_splits(
    batch: str, sliding_window: int | None, num_splits: int, device: str
) -> None:
    """With more splits than tiles of keys too, where some splits have nothing to see."""
    case = random_case(BATCHES[batch], sliding_window=sliding_window, device=device)
    assert_accurate(launched(case, num_splits=num_splits), dense_attention(case))


@pytest.mark.parametrize(
    ("sliding_window", "num_splits"), [(None, 1), (None, 2), (1, 1), (15, 1), (16, 2), (17, 1)]
)
def test_every_offset_against_the_tiles_of_keys(
    sliding_window: int | None, num_splits: int, device: str
) -> None:
    """Requests whose 3 tokens begin at every place of two tiles of 16 keys and a bit."""
    case = random_case(
        [(3, before) for before in range(34)],
        num_kv_heads=1,
        sliding_window=sliding_window,
        device=device,
    )
    got = launched(case, tiles=Tiles(16, 16, 4, 1), num_splits=num_splits)
    assert_accurate(got, dense_attention(case))


@pytest.mark.parametrize(
    "tiles",
    [Tiles(16, 16, 1, 1), Tiles(16, 64, 4, 3), Tiles(32, 32, 4, 2), Tiles(64, 16, 8, 2)],
    ids=str,
)
def test_the_result_does_not_depend_on_the_tiles(tiles: Tiles, device: str) -> None:
    case = random_case(BATCHES["mix"], num_kv_heads=1, queries_per_kv=3, device=device)
    for num_splits in (1, 2):
        got = launched(case, tiles=tiles, num_splits=num_splits)
        assert_accurate(got, dense_attention(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("head_dim", "block_size"),
    [(16, 8), (24, 17), (64, 16), (80, 12), (96, 9), (128, 100), (256, 256)],
)
def test_sizes_of_heads_and_blocks(
    head_dim: int, block_size: int, dtype: torch.dtype, device: str
) -> None:
    lens = [(1, block_size - 1), (1, block_size), (5, 2 * block_size - 3), (2, 0)]
    case = random_case(lens, head_dim=head_dim, block_size=block_size, dtype=dtype, device=device)
    with poisoned_memory():
        got = paged_attention(*case.contract, scale=case.scale)
    assert_accurate(got, dense_attention(case))


@pytest.mark.parametrize(
    ("num_kv_heads", "queries_per_kv"), [(1, 1), (4, 1), (3, 2), (2, 5), (1, 16), (2, 12), (1, 71)]
)
def test_groups_of_query_heads(num_kv_heads: int, queries_per_kv: int, device: str) -> None:
    """Up to more query heads than rows of the tile that would be chosen."""
    case = random_case(
        [(1, 20), (7, 12)],
        num_kv_heads=num_kv_heads,
        queries_per_kv=queries_per_kv,
        device=device,
    )
    assert_accurate(launched(case), dense_attention(case))
    assert_accurate(launched(case, num_splits=2), dense_attention(case))


def test_many_requests_of_few_tokens(device: str) -> None:
    """Every tile finds its request, however tokens and empty slots are strewn."""
    lens = [(n * n % 7 % 4, n) for n in range(30)]
    case = random_case(lens, num_kv_heads=1, device=device)
    assert_accurate(launched(case), dense_attention(case))


@pytest.mark.parametrize("num_splits", [1, 4])
def test_a_slot_without_context_gets_zeros(num_splits: int, device: str) -> None:
    case = random_case([(1, 20), (1, 0), (3, 0), (1, 5)], device=device)
    case.context_lens[1:3] = 0
    out = launched(case, num_splits=num_splits)
    assert (out[1:5] == 0).all()
    want = dense_attention(case)
    assert_accurate(out[[0, 5]], want[[0, 5]])


def test_without_query_tokens_the_result_is_empty(device: str) -> None:
    for lens in ([(0, 5), (0, 0)], []):
        case = random_case([*lens, (1, 3)], device=device)
        case.block_tables = case.block_tables[:-1].contiguous()
        case.context_lens = case.context_lens[:-1].contiguous()
        case.query_start_loc = case.query_start_loc[:-1].contiguous()
        got = paged_attention(case.q[:0], *case.contract[1:], scale=1.0)
        assert got.shape == (0, *case.q.shape[1:])


def test_long_contexts_are_split_without_being_asked(device: str) -> None:
    case = random_case([(1, 700), (1, 5)], num_kv_heads=1, block_size=16, device=device)
    capacity = case.block_tables.shape[1] * 16
    assert choose_num_splits(2, capacity, 8) > 1
    with poisoned_memory():
        got = paged_attention(*case.contract, scale=case.scale)
    assert_accurate(got, dense_attention(case))


@pytest.mark.parametrize("num_splits", [1, 4])
def test_large_scores_do_not_overflow(num_splits: int, device: str) -> None:
    """Scores of hundreds, whose exponentials no float32 holds; the largest comes last or first."""
    case = random_case([(1, 90), (20, 30)], device=device)
    for keys in case.keys:
        keys.sign_().mul_(torch.linspace(1, 3, len(keys))[:, None, None])
    signs = torch.tensor([1.0, -1.0], device=device).repeat(case.q.shape[1] // 2)
    case.q = (signs[None, :, None].expand_as(case.q) * 100).contiguous()
    for row, keys in enumerate(case.keys):
        for position in range(len(keys)):
            block = case.block_tables[row, position // case.block_size]
            case.k_cache[block, position % case.block_size] = keys[position].to(device)
    got = launched(case, num_splits=num_splits).double().cpu()
    assert (dense_attention(case) - got).norm() <= 1e-3 * got.norm()


@pytest.mark.filterwarnings(
    "ignore:All-NaN slice"
)  # of the interpreter, combining what is not there
@pytest.mark.parametrize("num_splits", [1, 2])
def test_a_program_writes_the_rows_of_its_own_tokens_only(
    num_splits: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise programs that run at once would race. Here none but the first tile's run."""
    kernel = kernels.paged_attention._attention_kernel

    class FirstTile:
        def __getitem__(self, grid: tuple[int, int, int]) -> Any:
            return kernel[1, grid[1], grid[2]]

    monkeypatch.setattr("kernels.paged_attention._attention_kernel", FirstTile())
    case = random_case([(12, 9), (1, 3)], queries_per_kv=3, device=device)
    out = launched(case, tiles=Tiles(16, 16, 4, 1), num_splits=num_splits)
    assert_accurate(out[:5], dense_attention(case)[:5])  # 16 rows are 5 tokens of 3 heads
    assert out[5:].isnan().all()


def test_what_lies_outside_the_tables_is_left_alone(device: str) -> None:
    case = random_case(BATCHES["mix"], device=device)
    before = [tensor.clone() for tensor in case.contract]
    launched(case, num_splits=2)
    for tensor, copy in zip(case.contract, before, strict=True):
        assert torch.equal(tensor.nan_to_num(7.5), copy.nan_to_num(7.5))


def test_the_public_function_makes_the_result_or_takes_a_tensor_for_it(device: str) -> None:
    case = random_case([(1, 9), (4, 4)], sliding_window=5, device=device)
    out = torch.full_like(case.q, NAN)
    options = {"scale": case.scale, "sliding_window": 5}
    assert paged_attention(*case.contract, **options, out=out) is out
    assert torch.equal(out, paged_attention(*case.contract, **options))
    assert_accurate(out, dense_attention(case))


@given(data=st.data())
@settings(max_examples=12)
def test_random_batches(data: st.DataObject, device: str) -> None:
    case = data.draw(
        paged_cases(
            block_sizes=(8, 9, 16, 24),
            head_dims=(16, 24, 40, 64, 80),
            empty_slots=True,
            dtypes=supported(device),
            device=device,
            poison=NAN,
        )
    )
    num_splits = data.draw(st.sampled_from([1, 2, 4, 8]))
    block_n = data.draw(st.sampled_from([None, 16, 32]))
    tiles = None if block_n is None else Tiles(16, block_n, 4, 2)
    got = launched(case, tiles=tiles, num_splits=num_splits)
    assert_accurate(got, dense_attention(case))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_sizes_of_a_real_model_on_a_gpu(head_dim: int, dtype: torch.dtype) -> None:
    skip_unsupported(dtype, "cuda")
    for lens in ([(1, 2000), (1, 31)], [(300, 200), (1, 999), (128, 0)]):
        case = random_case(
            lens,
            block_size=16,
            num_kv_heads=2,
            queries_per_kv=4,
            head_dim=head_dim,
            dtype=dtype,
            device="cuda",
        )
        want = dense_attention(case)
        for num_splits in (None, 1, 8):
            assert_accurate(launched(case, num_splits=num_splits), want)
        case.sliding_window = 300
        assert_accurate(launched(case), dense_attention(case))


@pytest.mark.gpu
def test_a_cache_of_more_than_two_to_the_31_elements() -> None:
    per_block = 16 * 8 * 128
    num_blocks = 2**31 // per_block + 10
    needed = 2 * 2 * num_blocks * per_block + 2**30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free GPU memory")
    small = random_case(
        [(1, 40), (9, 30)], block_size=16, num_kv_heads=8, head_dim=128, dtype=torch.float16
    )
    moved = num_blocks - small.k_cache.shape[0]
    k_cache, v_cache = (
        torch.zeros(num_blocks, 16, 8, 128, dtype=torch.float16, device="cuda") for _ in "kv"
    )
    k_cache[moved:], v_cache[moved:] = small.k_cache, small.v_cache
    case = replace(
        small,
        q=small.q.cuda(),
        k_cache=k_cache,
        v_cache=v_cache,
        block_tables=(small.block_tables + moved).cuda(),
        context_lens=small.context_lens.cuda(),
        query_start_loc=small.query_start_loc.cuda(),
    )
    assert_accurate(launched(case), dense_attention(small))


# What is refused.


def refused(message: str, **changes: Any) -> None:
    """The public function refuses a valid case with these arguments changed."""
    case = make_case([(1, 9), (4, 4)], dtype=torch.float32)
    names = ("q", "k_cache", "v_cache", "block_tables", "context_lens", "query_start_loc")
    arguments = dict(zip(names, case.contract, strict=True)) | {"scale": 0.25}
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    with pytest.raises(ValueError, match=message):
        paged_attention(**arguments)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", torch.Tensor.double, "q must be float16, bfloat16 or float32, got torch.float64"),
        ("q", torch.Tensor.half, "k_cache must be torch.float16, got torch.float32"),
        ("q", lambda q: q[0], r"q must have shape \[any, any, any\], got \[4, 16\]"),
        ("q", lambda q: q.mT.contiguous().mT, "q must be contiguous; pass q.contiguous"),
        ("q", lambda q: q[:, :3].contiguous(), "3 heads of q must be a multiple of the 2 KV heads"),
        ("q", lambda q: q[:, :0].contiguous(), "0 heads of q must be a multiple"),
        (
            "k_cache",
            lambda k: k[..., :8].contiguous(),
            r"k_cache must have shape \[any, any, any, 16\], got \[\d+, 8, 2, 8\]",
        ),
        ("k_cache", lambda k: k.transpose(0, 1), "k_cache must be contiguous"),
        ("v_cache", torch.Tensor.bfloat16, "v_cache must be torch.float32, got torch.bfloat16"),
        ("v_cache", lambda v: v[:-1], r"v_cache must have shape \[\d+, 8, 2, 16\], got"),
        ("v_cache", lambda v: v.to("meta"), "v_cache must be on cpu, got meta"),
        ("block_tables", torch.Tensor.long, "block_tables must be torch.int32, got torch.int64"),
        ("block_tables", lambda t: t[0], r"block_tables must have shape \[any, any\], got \[2\]"),
        ("block_tables", lambda t: t.T.contiguous().T, "block_tables must be contiguous"),
        (
            "block_tables",
            lambda t: t[:, :1].contiguous(),
            r"context_lens\[0\] is 10; it must be .* at most the 8 tokens that its block table",
        ),
        ("block_tables", lambda t: t + 1000, r"block_tables\[0\] names block 10\d\d; the cache ha"),
        ("block_tables", lambda t: t - 1000, r"names block -9\d\d; the cache has blocks 0 to \d"),
        ("context_lens", torch.Tensor.long, "context_lens must be torch.int32"),
        ("context_lens", lambda c: c[:1], r"context_lens must have shape \[2\], got \[1\]"),
        ("context_lens", lambda c: c * 0 + 3, r"context_lens\[1\] is 3; .* request's 4 query tok"),
        ("query_start_loc", torch.Tensor.long, "query_start_loc must be torch.int32"),
        ("query_start_loc", lambda s: s[:2], r"query_start_loc must have shape \[3\], got \[2\]"),
        ("query_start_loc", lambda s: s + 1, "must rise from 0 to the 5 tokens of q, got .1, 2, 6"),
        ("query_start_loc", lambda s: s.flip(0), r"must rise from 0 .*, got \[5, 1, 0\]"),
        ("query_start_loc", lambda s: s * 2, "must rise from 0 to the 5 tokens of q, got .0, 2, 1"),
        ("out", torch.empty(5, 4, 15), r"out must have shape \[5, 4, 16\], got \[5, 4, 15\]"),
        ("out", torch.empty(5, 4, 16).half(), "out must be torch.float32, got torch.float16"),
        ("out", torch.empty(5, 16, 4).mT, "out must be contiguous"),
        ("scale", float("nan"), "scale must be a finite number above 0, got nan"),
        ("scale", 0.0, "scale must be a finite number above 0, got 0.0"),
        ("scale", -0.25, "scale must be a finite number above 0, got -0.25"),
        ("scale", float("inf"), "scale must be a finite number above 0, got inf"),
        ("scale", "0.5", "scale must be a finite number above 0, got '0.5'"),
        ("sliding_window", 0, "sliding_window must be at least 1 token or None, got 0"),
        ("sliding_window", 2.5, "sliding_window must be at least 1 token or None, got 2.5"),
    ],
)
def test_what_cannot_be_read_is_refused(name: str, change: Any, message: str) -> None:
    refused(message, **{name: change})


@pytest.mark.parametrize(("head_dim", "block_size"), [(8, 8), (264, 8), (16, 7), (16, 257)])
def test_sizes_that_the_kernel_does_not_take(head_dim: int, block_size: int) -> None:
    case = make_case([(1, 3)], head_dim=head_dim, block_size=block_size, dtype=torch.float32)
    message = "head_dim must be 16 to 256, got" if block_size == 8 else "block_size must be 8 to"
    with pytest.raises(ValueError, match=message):
        paged_attention(*case.contract, scale=1.0)


def test_block_ids_are_checked_only_where_they_are_used(device: str) -> None:
    """The rest of a row of the block table may hold anything."""
    case = random_case([(1, 3), (1, 30)], device=device)
    case.block_tables[0, 1:] = 10**6
    got = paged_attention(*case.contract, scale=case.scale)
    assert_accurate(got, dense_attention(case))


# What a launch chooses.


@given(st.integers(1, 10**5), st.integers(1, 10**6), st.integers(1, 200))
def test_splits_are_a_power_of_two_and_stop_when_the_gpu_is_full(
    num_programs: int, max_context_len: int, num_sms: int
) -> None:
    splits = choose_num_splits(num_programs, max_context_len, num_sms)
    assert splits in (1, 2, 4, 8, 16, 32, 64)
    if num_programs > num_sms or max_context_len < 512:
        assert splits == 1
    assert splits == 1 or max_context_len / splits >= 256
    assert splits * num_programs <= max(num_programs, 2 * num_sms)


def test_a_lone_long_context_is_spread_over_the_gpu() -> None:
    assert choose_num_splits(8, 32768, 132) == 32
    assert choose_num_splits(8, 2048, 132) == 8
    assert choose_num_splits(1, 10**6, 132) == 64


def test_the_launch_does_not_depend_on_the_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured graph is replayed with other tables, so only shapes may decide."""
    launches = []

    class Recorder:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: launches.append((grid, options))

    monkeypatch.setattr("kernels.paged_attention._attention_kernel", Recorder())
    monkeypatch.setattr("kernels.paged_attention._combine_kernel", Recorder())
    case = random_case([(1, 900), (1, 4), (1, 0)])
    for context_lens in ([901, 5, 1], [1, 1, 1], [0, 0, 0]):
        case.context_lens = torch.tensor(context_lens, dtype=torch.int32)
        launch_paged_attention(*case.contract, scale=case.scale)
    assert launches[:2] == launches[2:4] == launches[4:]


@given(
    st.integers(1, 10**4),
    st.integers(16, 256),
    st.sampled_from(DTYPES),
    st.sampled_from([(7, 5), (8, 0), (8, 6), (9, 0), (10, 0)]),
)
def test_tiles_are_powers_of_two_that_products_take(
    rows: int, head_dim: int, dtype: torch.dtype, capability: tuple[int, int]
) -> None:
    tiles = choose_tiles(rows, head_dim, dtype, capability)
    assert math.log2(tiles.block_m).is_integer() and 16 <= tiles.block_m <= 128
    assert math.log2(tiles.block_n).is_integer() and 16 <= tiles.block_n <= 64
    assert tiles.num_warps in (4, 8) and 1 <= tiles.num_stages <= 5
    assert tiles.block_m == 16 or tiles.block_m < 2 * rows
