import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.sizing.catalog import find_gpu, find_model, gpus, models
from course_lib.sizing.roofline import (
    Roofline,
    compute_bound_batch_size,
    compute_precision,
    decode,
    decode_ceiling_tokens_per_s,
    prefill,
)

H100 = find_gpu("H100_80GB")
LLAMA_8B = find_model("Llama-3-8B")


@pytest.mark.parametrize(("model_gb", "ceiling"), [(14, 239.3), (7, 478.6), (140, 23.9)])
def test_decode_ceiling_of_an_h100(model_gb, ceiling):
    assert round(decode_ceiling_tokens_per_s(3350, model_gb), 1) == ceiling


@pytest.mark.parametrize("bad", [0, -1, True, "3350", float("nan")])
def test_a_ceiling_needs_numbers_above_0(bad):
    with pytest.raises(ValueError, match="bandwidth_gb_s must be a number above 0"):
        decode_ceiling_tokens_per_s(bad, 14)
    with pytest.raises(ValueError, match="model_gb must be a number above 0"):
        decode_ceiling_tokens_per_s(3350, bad)


def test_decode_of_one_request_streams_the_weights_once():
    phase = decode(LLAMA_8B, H100, 1, 0)
    streamed_gb = 2 * (LLAMA_8B.total_params - LLAMA_8B.embedding_params) / 1e9
    assert phase.bound == "memory"
    assert 1 / phase.seconds == pytest.approx(decode_ceiling_tokens_per_s(3350, streamed_gb))


def test_prefill_of_a_long_prompt_is_bound_by_compute_and_a_short_one_by_memory():
    assert prefill(LLAMA_8B, H100, 8192).bound == "compute"
    assert prefill(LLAMA_8B, H100, 16).bound == "memory"


def test_flops_are_those_of_the_matrices():
    """Count every product of a small model one by one."""
    model = find_model("Qwen2.5-0.5B")
    hidden, inner, heads, kv_heads, head_dim = 896, 4864, 14, 2, 64
    layer = 2 * hidden * (heads + 2 * kv_heads) * head_dim + 2 * heads * head_dim * hidden
    layer += 3 * 2 * hidden * inner
    attention = 2 * 2 * heads * head_dim * 100  # scores and values over 100 tokens of context
    expected = 24 * (layer + attention) + 2 * hidden * 151_936
    # Biases and norms are counted as products too; they are one in a thousand.
    assert decode(model, H100, 1, 100).flops == pytest.approx(expected, rel=1e-3)


@given(st.integers(1, 300))
def test_a_prompt_token_by_token_takes_the_flops_of_the_prompt_at_once(tokens):
    """But for the head, which a prefill applies to the last token only."""
    at_once = prefill(LLAMA_8B, H100, tokens).flops
    one_by_one = sum(decode(LLAMA_8B, H100, 1, seen + 1).flops for seen in range(tokens))
    assert one_by_one - at_once == pytest.approx((tokens - 1) * 2 * LLAMA_8B.embedding_params)


@given(
    st.sampled_from(list(models())),
    st.sampled_from(list(gpus())),
    st.integers(1, 512),
    st.integers(0, 100_000),
)
def test_more_requests_or_context_never_make_a_step_faster(name, gpu_name, batch, context):
    model, gpu = find_model(name), find_gpu(gpu_name)
    step = decode(model, gpu, batch, context)
    assert decode(model, gpu, batch + 1, context).seconds >= step.seconds
    assert decode(model, gpu, batch, context + 100).seconds >= step.seconds
    assert step.seconds >= max(step.compute_s, step.memory_s)


def test_int4_weights_make_decode_faster_but_less_than_four_times():
    bf16 = decode(LLAMA_8B, H100, 8, 4096)
    int4 = decode(LLAMA_8B, H100, 8, 4096, weights="int4")
    assert 1 < bf16.seconds / int4.seconds < 4


def test_tensor_parallel_is_faster_but_pays_for_communication():
    one, four = (decode(LLAMA_8B, H100, 8, 4096, gpus=count) for count in (1, 4))
    assert one.seconds / 4 < four.seconds < one.seconds
    assert four.communication_s > 0 == one.communication_s


def test_decode_turns_compute_bound_at_the_ratio_of_the_peaks():
    # 989e12 / 3.35e12 = 295 flops a byte; each weight of 2 bytes takes part in 2 flops a token.
    assert compute_bound_batch_size(LLAMA_8B, H100) == 296
    assert compute_bound_batch_size(LLAMA_8B, H100, weights="fp8") == 296


@pytest.mark.parametrize("name", list(models()))
@pytest.mark.parametrize("context", [0, 50])
def test_the_compute_bound_batch_is_the_smallest(name, context):
    model = find_model(name)
    batch = compute_bound_batch_size(model, H100, context)
    if batch is None:
        assert decode(model, H100, 2**20, context).bound == "memory"
    else:
        assert decode(model, H100, batch, context).bound == "compute"
        assert decode(model, H100, batch - 1, context).bound == "memory"


def test_at_long_context_no_batch_is_compute_bound():
    assert compute_bound_batch_size(LLAMA_8B, H100, 32_768) is None


def test_computing_precision_follows_the_weights_and_the_gpu():
    a100, a10g = find_gpu("A100_80GB"), find_gpu("A10G_24GB")
    assert compute_precision(H100, "fp8") == "fp8"
    assert compute_precision(a100, "fp8") == "bf16"
    assert compute_precision(H100, "int4") == "bf16"
    assert compute_precision(H100, "fp32") == "tf32"
    with pytest.raises(ValueError, match="unknown A10G_24GB precision 'fp32'; known are bf16"):
        compute_precision(a10g, "fp32")
    with pytest.raises(ValueError, match="unknown precision 'int3'; known are fp32"):
        decode(LLAMA_8B, H100, 1, 1, weights="int3")


@pytest.mark.parametrize("bad", [0, -5, 1.5, True, "8"])
def test_bad_sizes_are_refused_by_name(bad):
    with pytest.raises(ValueError, match="prompt_tokens must be a whole number"):
        prefill(LLAMA_8B, H100, bad)
    with pytest.raises(ValueError, match="batch_size must be a whole number"):
        decode(LLAMA_8B, H100, bad, 100)
    with pytest.raises(ValueError, match="gpus must be a whole number"):
        decode(LLAMA_8B, H100, 1, 100, gpus=bad)


# Steps that compute prompts and decodes together.


def test_a_mixed_step_computes_what_its_parts_compute_and_reads_the_weights_once():
    roofline = Roofline(LLAMA_8B, H100)
    chunk = {"prefill_tokens": 512, "prefill_pairs": 512 * 513 // 2, "num_prefills": 1}
    decodes = {"num_decodes": 8, "context_tokens": 8 * 1000}
    prompt, others, both = (
        roofline.step(**chunk),
        roofline.step(**decodes),
        roofline.step(**chunk, **decodes),
    )
    assert both.flops == pytest.approx(prompt.flops + others.flops)
    weights = LLAMA_8B.streamed_params(1) * 2
    assert both.memory_bytes == pytest.approx(prompt.memory_bytes + others.memory_bytes - weights)
    assert max(prompt.seconds, others.seconds) < both.seconds < prompt.seconds + others.seconds


def test_a_later_chunk_reads_the_keys_and_values_of_those_before():
    roofline = Roofline(LLAMA_8B, H100)
    first = roofline.step(512, 512 * 513 // 2, 1)
    later = roofline.step(512, 512 * 3000 + 512 * 513 // 2, 1)
    kv_bytes = 3000 * LLAMA_8B.kv_bytes_per_token()
    assert later.memory_bytes - first.memory_bytes == pytest.approx(kv_bytes)
    assert later.flops > first.flops


def test_a_prompt_in_chunks_takes_the_flops_of_the_prompt_at_once_but_for_the_logits():
    roofline = Roofline(LLAMA_8B, H100)
    at_once = roofline.step(1000, 1000 * 1001 // 2, 1)
    halves = [roofline.step(500, 500 * start + 500 * 501 // 2, 1) for start in (0, 500)]
    extra = sum(half.flops for half in halves) - at_once.flops
    assert extra == pytest.approx(2 * LLAMA_8B.embedding_params)
    assert sum(half.seconds for half in halves) > at_once.seconds


def test_a_step_of_a_mixture_of_experts_reads_the_experts_of_all_its_tokens():
    roofline = Roofline(find_model("Mixtral-8x7B"), H100, gpus=4)
    alone = roofline.step(num_decodes=1, context_tokens=1)
    many = roofline.step(num_decodes=64, context_tokens=64)
    assert many.memory_bytes > 3 * alone.memory_bytes
    assert many.communication_s == 64 * alone.communication_s


def test_what_several_chunks_read_is_never_counted_higher_than_it_is():
    """Of prompts of unlike lengths, no token was computed before, so none of them is read."""
    pairs = 1000 * 1001 // 2 + 2 * 3 // 2
    step = Roofline(LLAMA_8B, H100).step(1002, pairs, 2)
    written = 1002 * LLAMA_8B.kv_bytes_per_token()
    weights = 2 * (LLAMA_8B.total_params - LLAMA_8B.embedding_params)
    assert step.memory_bytes == pytest.approx(weights + written)
