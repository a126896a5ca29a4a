"""Rotation and cache write in one kernel, against a rotation of complex numbers in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.rope_and_cache import rope_and_cache, rope_and_cache_reference
from tests.kernels.accuracy import (
    DTYPES,
    assert_accurate,
    poisoned_memory,
    skip_unsupported,
    supported,
)

EPS = 1e-3
NAN = float("nan")
CACHE = ("k_cache", "v_cache")


def make_inputs(
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    block_size: int = 8,
    norm: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """The arguments by name; slots in random order, the rest of the cache NaN."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).to(device)

    angles = torch.rand(50, head_dim // 2, generator=generator) * 6
    num_blocks = num_tokens // block_size + 3
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:num_tokens]
    cache_shape = (num_blocks, block_size, num_kv_heads, head_dim)
    return {
        "qkv": randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim),
        "positions": torch.randint(50, (num_tokens,), generator=generator).to(device),
        "rope": torch.stack((angles.cos(), angles.sin()), dim=1).to(device),
        "k_cache": torch.full(cache_shape, NAN, dtype=dtype, device=device),
        "v_cache": torch.full(cache_shape, NAN, dtype=dtype, device=device),
        "slot_mapping": slots.to(device),
        "q_norm": randn(head_dim) if norm else None,
        "k_norm": randn(head_dim) if norm else None,
        "eps": EPS,
    }


def turned(
    x: torch.Tensor, weight: torch.Tensor | None, positions: torch.Tensor, rope: torch.Tensor
) -> torch.Tensor:
    """Normalised and rotated heads in float64: each pair of dimensions is a complex number."""
    x = x.double().cpu()
    if weight is not None:
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double().cpu()
    first, second = x.chunk(2, dim=-1)
    cos, sin = rope.double().cpu()[positions.cpu()][:, None].unbind(2)
    product = torch.complex(first, second) * torch.complex(cos, sin)
    return torch.cat((product.real, product.imag), dim=-1)


def check(inputs: dict[str, Any]) -> None:
    """The kernel's queries, keys and values are right, and the rest of the cache as it was."""
    num_kv_heads, head_dim = inputs["k_cache"].shape[2:]
    slots = inputs["slot_mapping"].cpu()
    heads = inputs["qkv"].view(len(slots), -1, head_dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    k_cache, v_cache = (inputs[name].clone() for name in CACHE)
    with poisoned_memory():
        got = rope_and_cache(**{**inputs, "k_cache": k_cache, "v_cache": v_cache})
    places = inputs["positions"], inputs["rope"]
    assert got.dtype == q.dtype
    assert_accurate(got, turned(q, inputs["q_norm"], *places))
    k_rows, v_rows = (cache.flatten(0, 1).cpu() for cache in (k_cache, v_cache))
    assert_accurate(k_rows[slots], turned(k, inputs["k_norm"], *places))
    assert torch.equal(v_rows[slots], v.cpu())
    others = torch.ones(len(k_rows), dtype=torch.bool)
    others[slots] = False
    assert k_rows[others].isnan().all() and v_rows[others].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads", "head_dim"),
    [(1, 1, 1, 16), (5, 4, 2, 64), (9, 3, 1, 80), (2, 7, 7, 24), (3, 16, 1, 128), (2, 9, 3, 256)],
)
def test_shapes(
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    norm: bool,
    dtype: torch.dtype,
    device: str,
) -> None:
    skip_unsupported(dtype, device)
    shape = (num_tokens, num_heads, num_kv_heads, head_dim)
    check(make_inputs(*shape, norm=norm, dtype=dtype, device=device))


@given(data=st.data())
@settings(max_examples=15)
def test_random_shapes(data: st.DataObject, device: str) -> None:
    check(
        make_inputs(
            data.draw(st.integers(1, 20), "tokens"),
            data.draw(st.integers(1, 12), "query heads"),
            data.draw(st.integers(1, 5), "KV heads"),
            2 * data.draw(st.integers(1, 60), "half of head_dim"),
            block_size=data.draw(st.integers(1, 20), "block size"),
            norm=data.draw(st.booleans(), "norm"),
            dtype=data.draw(st.sampled_from(supported(device)), "dtype"),
            device=device,
            seed=data.draw(st.integers(0, 1000), "seed"),
        )
    )


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "normed"])
def test_the_expression_and_the_kernel_have_one_contract(norm: bool, device: str) -> None:
    inputs = make_inputs(6, 4, 2, 16, norm=norm, device=device)
    copies = {name: inputs[name].clone() for name in CACHE}
    got, want = rope_and_cache(**inputs), rope_and_cache_reference(**{**inputs, **copies})
    torch.testing.assert_close(got, want)
    for name in CACHE:
        torch.testing.assert_close(inputs[name], copies[name], equal_nan=True)


def test_no_tokens(device: str) -> None:
    inputs = make_inputs(0, 4, 2, 16, device=device)
    assert rope_and_cache(**inputs).shape == (0, 4, 16)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qkv", lambda x: x[0], r"qkv must have shape \[any, any\], got \[128\]"),
        ("qkv", lambda x: x[:, :120].contiguous(), r"120 columns; .*num_heads \+ 2 x 2 heads of "),
        ("qkv", lambda x: x[:, :64].contiguous(), "qkv has 64 columns; expected"),
        ("qkv", lambda x: x.T.contiguous().T, "qkv must be contiguous; pass qkv.contiguous"),
        ("qkv", torch.Tensor.half, "k_cache must be torch.float16, got torch.float32"),
        ("positions", torch.Tensor.int, "positions must be torch.int64, got torch.int32"),
        ("positions", lambda x: x[1:], r"positions must have shape \[3\], got \[2\]"),
        ("slot_mapping", torch.Tensor.int, "slot_mapping must be torch.int64, got torch.int32"),
        ("slot_mapping", lambda x: x[1:], r"slot_mapping must have shape \[3\], got \[2\]"),
        ("rope", torch.Tensor.double, "rope must be torch.float32, got torch.float64"),
        ("rope", lambda x: x[..., 1:], r"rope must have shape \[any, 2, 8\], got \[50, 2, 7\]"),
        ("k_cache", lambda x: x.transpose(1, 2), "k_cache must be contiguous"),
        ("k_cache", lambda x: x[0], r"k_cache must have shape \[any, any, any, any\]"),
        ("v_cache", lambda x: x[1:], r"v_cache must have shape \[3, 8, 2, 16\], got \[2, 8, 2, 16"),
        ("v_cache", lambda x: x.to("meta"), "v_cache must be on cpu, got meta"),
        ("q_norm", None, "give both q_norm and k_norm, or neither"),
        ("k_norm", None, "give both q_norm and k_norm, or neither"),
        ("q_norm", lambda x: x[1:], r"q_norm must have shape \[16\], got \[15\]"),
        ("k_norm", torch.Tensor.half, "k_norm must be torch.float32, got torch.float16"),
    ],
)
def test_what_cannot_be_read_is_refused(name: str, change: Any, message: str) -> None:
    inputs = make_inputs(3, 4, 2, 16, norm=True)
    inputs[name] = change(inputs[name]) if callable(change) else change
    with pytest.raises(ValueError, match=message):
        rope_and_cache(**inputs)


def test_heads_of_an_odd_size_cannot_be_paired() -> None:
    inputs = make_inputs(3, 4, 2, 16)
    inputs["k_cache"] = inputs["v_cache"] = torch.zeros(2, 8, 2, 15)
    inputs["rope"] = torch.zeros(50, 2, 7)
    inputs["qkv"] = torch.zeros(3, 8 * 15)
    with pytest.raises(ValueError, match="head_dim 15, which must be even"):
        rope_and_cache(**inputs)
