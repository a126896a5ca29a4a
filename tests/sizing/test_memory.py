import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.sizing.catalog import PRECISION_BYTES, find_model, gpus
from course_lib.sizing.memory import (
    KvAccounting,
    context_growth,
    estimate_gpu_requirements,
    kv_cache_gb,
    kv_capacity,
    paged_kv_accounting,
    peak_activations_gb,
    requirements_of,
    weights_gb,
)

LLAMA_8B = find_model("Llama-3-8B")
SIZES = {
    "model_params_b": st.floats(0.1, 700),
    "num_layers": st.integers(1, 128),
    "num_kv_heads": st.integers(1, 64),
    "head_dim": st.sampled_from([64, 96, 128, 256]),
    "context_len": st.integers(1, 200_000),
    "target_concurrency": st.integers(1, 500),
}


def test_8b_in_bf16_at_4k_for_8_users_fits_one_h100():
    needs = estimate_gpu_requirements(8, 32, 8, 128, 4096, 8)
    assert round(needs.weights_gb, 1) == 16.0
    assert round(needs.kv_cache_gb, 1) == 4.3
    assert round(needs.total_with_overhead_gb, 1) == 23.3
    assert needs.gpu_options["H100_80GB"].needed == 1


def test_70b_in_bf16_at_8k_for_4_users_takes_three_h100_and_not_two():
    needs = estimate_gpu_requirements(70, 80, 8, 128, 8192, 4)
    assert round(needs.weights_gb, 1) == 140.0
    assert round(needs.kv_cache_gb, 1) == 10.7
    assert round(needs.total_with_overhead_gb, 1) == 173.3
    assert needs.gpu_options["H100_80GB"].needed == 3


def test_70b_in_int8_takes_two_though_its_weights_fit_one():
    needs = estimate_gpu_requirements(70, 80, 8, 128, 8192, 4, weight_bytes=1)
    assert needs.weights_gb < 76
    assert needs.gpu_options["H100_80GB"].needed == 2


def test_every_gpu_of_the_catalogue_is_an_option():
    options = estimate_gpu_requirements(8, 32, 8, 128, 4096, 8).gpu_options
    assert {name: option.memory_gb for name, option in options.items()} == {
        name: gpu.usable_gb for name, gpu in gpus().items()
    }


@given(st.fixed_dictionaries(SIZES), st.sampled_from(list(SIZES)), st.floats(1, 8))
def test_more_of_anything_never_needs_fewer_gpus(sizes, grown, factor):
    before = estimate_gpu_requirements(**sizes)
    size = sizes[grown] * factor
    more = {**sizes, grown: size if grown == "model_params_b" else math.ceil(size)}
    after = estimate_gpu_requirements(**more)
    assert after.total_with_overhead_gb >= before.total_with_overhead_gb
    for name, option in before.gpu_options.items():
        assert after.gpu_options[name].needed >= option.needed


@given(st.fixed_dictionaries(SIZES))
def test_the_gpus_hold_the_need_and_one_fewer_would_not(sizes):
    needs = estimate_gpu_requirements(**sizes)
    for option in needs.gpu_options.values():
        assert option.needed * option.memory_gb >= needs.total_with_overhead_gb * (1 - 1e-12)
        assert option.needed == 1 or (
            (option.needed - 1) * option.memory_gb < needs.total_with_overhead_gb
        )


def test_a_model_of_the_catalogue_is_sized_by_its_shape():
    needs = requirements_of(LLAMA_8B, 4096, 8)
    assert needs == estimate_gpu_requirements(8.030261248, 32, 8, 128, 4096, 8)


def test_weights_by_precision():
    sizes = {name: weights_gb(70, size) for name, size in PRECISION_BYTES.items()}
    assert (sizes["fp32"], sizes["bf16"]) == (280, 140)
    assert (sizes["fp8"], sizes["int8"], sizes["int4"]) == (70, 70, 35)


def test_grouped_query_attention_saves_kv_cache():
    assert kv_cache_gb(32, 32, 128, 4096) == 4 * kv_cache_gb(32, 8, 128, 4096)


def test_a_long_conversation_outgrows_its_plan():
    points = context_growth(LLAMA_8B, "L4_24GB", [1024, 8192, 32_768, 131_072], 1)
    assert [point.gpus_needed for point in points] == [1, 1, 2, 2]
    assert [point.context_len for point in points] == [1024, 8192, 32_768, 131_072]
    assert points[3].kv_cache_gb == pytest.approx(128 * points[0].kv_cache_gb)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_params_b": 0}, "model_params_b must be a number above 0"),
        ({"model_params_b": math.nan}, "model_params_b must be a number above 0"),
        ({"model_params_b": "8"}, "model_params_b must be a number above 0"),
        ({"num_layers": -1}, "num_layers must be a whole number of at least 1"),
        ({"num_layers": True}, "num_layers must be a whole number"),
        ({"num_kv_heads": 0}, "num_kv_heads must be a whole number"),
        ({"head_dim": 12.5}, "head_dim must be a whole number"),
        ({"context_len": -8}, "context_len must be a whole number"),
        ({"target_concurrency": 0}, "target_concurrency must be a whole number"),
        ({"weight_bytes": -2}, "weight_bytes must be a number above 0"),
        ({"kv_bytes": 0}, "kv_bytes must be a number above 0"),
        ({"overhead_factor": 0.9}, "overhead_factor must be a number at least 1"),
    ],
)
def test_bad_sizes_are_refused_by_name(change, message):
    good = {
        "model_params_b": 8,
        "num_layers": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "context_len": 4096,
        "target_concurrency": 8,
    }
    with pytest.raises(ValueError, match=message):
        estimate_gpu_requirements(**{**good, **change})


def test_kv_capacity_is_what_weights_and_activations_leave():
    capacity = kv_capacity(LLAMA_8B, 80, 0.9, activations_gb=2)
    assert capacity.budget_gb == pytest.approx(72)
    assert capacity.kv_cache_gb == pytest.approx(72 - 2 * 8.030261248 - 2)
    assert capacity.blocks == int(capacity.kv_cache_gb * 1e9 // (131_072 * 16))
    assert capacity.tokens == capacity.blocks * 16


def test_fp8_keys_and_values_double_the_capacity():
    whole, half = (kv_capacity(LLAMA_8B, 80, kv_bytes=size) for size in (2, 1))
    assert half.tokens in (2 * whole.tokens, 2 * whole.tokens + 16)


def test_a_model_that_does_not_fit_leaves_no_kv_cache():
    capacity = kv_capacity(find_model("Llama-3-70B"), 80)
    assert (capacity.kv_cache_gb, capacity.blocks, capacity.tokens) == (0, 0, 0)
    assert kv_capacity(find_model("Llama-3-70B"), 80, gpus=4).tokens > 0


@given(st.floats(20, 200), st.floats(0.3, 0.9), st.integers(1, 64))
def test_the_kv_cache_stays_within_the_budget(memory_gb, utilization, block):
    capacity = kv_capacity(LLAMA_8B, memory_gb, utilization, tokens_per_block=block)
    used = capacity.tokens * LLAMA_8B.kv_bytes_per_token() / 1e9
    assert used <= capacity.kv_cache_gb <= max(0, capacity.budget_gb - capacity.weights_gb) + 1e-9
    more = kv_capacity(LLAMA_8B, memory_gb, utilization + 0.1, tokens_per_block=block)
    assert more.tokens >= capacity.tokens


@pytest.mark.parametrize("utilization", [0, 1.1, -0.5, True, math.nan])
def test_a_utilization_outside_0_and_1_is_refused(utilization):
    with pytest.raises(ValueError, match="gpu_memory_utilization must be a number above 0 and at"):
        kv_capacity(LLAMA_8B, 80, utilization)


def test_activations_grow_with_the_tokens_of_a_step():
    # The gated feed-forward is the largest: 2 x 4096 + 3 x 14336 numbers a token.
    assert peak_activations_gb(LLAMA_8B, 8192) == 8192 * (2 * 4096 + 3 * 14_336) * 2 / 1e9
    # In a small step for many requests the logits are: 128256 numbers of 4 bytes each.
    assert peak_activations_gb(LLAMA_8B, 64, 64) == (64 * 4096 * 2 + 64 * 128_256 * 4) / 1e9


def test_paged_blocks_against_fixed_reservation():
    assert paged_kv_accounting([320, 75, 900, 250], 2048, 16) == KvAccounting(
        used_tokens=1545,
        fixed_reservation_blocks=512,
        paged_blocks=98,
        reserved_tokens_avoided=6624,
    )


@given(st.lists(st.integers(0, 2048), max_size=30), st.integers(1, 256))
def test_paging_wastes_less_than_a_block_a_request(cached, block):
    account = paged_kv_accounting(cached, 2048, block)
    assert account.used_tokens == sum(cached)
    assert 0 <= account.paged_blocks * block - account.used_tokens <= len(cached) * (block - 1)
    assert account.paged_blocks <= account.fixed_reservation_blocks
    avoided = account.fixed_reservation_blocks - account.paged_blocks
    assert account.reserved_tokens_avoided == avoided * block


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([-1], 2048, 16), r"cached_tokens\[0\] must be a whole number from 0 to 2048"),
        (([5, 4096], 2048, 16), r"cached_tokens\[1\] must be a whole number from 0 to 2048"),
        (([5], 0, 16), "max_tokens_per_request must be a whole number"),
        (([5], 2048, 0), "tokens_per_block must be a whole number"),
    ],
)
def test_bad_cache_sizes_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        paged_kv_accounting(*arguments)
