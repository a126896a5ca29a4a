import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.sizing.catalog import find_model
from course_lib.sizing.parallelism import (
    ALL_REDUCES_PER_LAYER,
    CommunicationEvents,
    communication_events,
    pipeline_bubble_share,
    pipeline_communication,
    ring_all_reduce_bytes,
    smallest_tensor_parallel_size,
    tensor_parallel_communication,
)

LLAMA_70B = find_model("Llama-3-70B")


def test_events_of_80_layers_in_4_stages_over_32_steps():
    assert communication_events(80, 4, 32) == CommunicationEvents(2560, 96)


def test_a_real_layer_synchronises_twice():
    events = communication_events(80, 4, 32, ALL_REDUCES_PER_LAYER)
    assert events.tensor_parallel_sync_events == 5120


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 1), "layers must be a whole number of at least 1"),
        ((4, 5, 1), "pipeline_stages must be a whole number from 1 to 4, got 5"),
        ((4, 0, 1), "pipeline_stages must be a whole number from 1 to 4, got 0"),
        ((4, 2, -1), "decode_steps must be a whole number of at least 1"),
        ((4, 2, 1, 0), "syncs_per_layer must be a whole number of at least 1"),
    ],
)
def test_bad_counts_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        communication_events(*arguments)


@given(st.integers(1, 32), st.integers(1, 8))
def test_a_ring_sends_what_reduce_scatter_and_all_gather_send(gpus, chunk):
    """Walk the ring: in each of n-1 steps of either half, a GPU passes on one of n chunks."""
    sent = sum(chunk for _ in range(2) for _ in range(gpus - 1))
    assert ring_all_reduce_bytes(gpus * chunk, gpus) == pytest.approx(sent)


def test_tensor_parallel_bytes_and_time_over_nvlink():
    traffic = tensor_parallel_communication(LLAMA_70B, 16, 4, 450)
    message = 16 * 8192 * 2
    assert traffic.events == 160
    assert traffic.bytes_per_gpu == 160 * 1.5 * message
    assert traffic.seconds == pytest.approx(160 * 1.5 * message / 450e9)


def test_one_gpu_talks_to_nobody():
    assert tensor_parallel_communication(LLAMA_70B, 16, 1, 450).bytes_per_gpu == 0
    assert pipeline_communication(LLAMA_70B, 16, 1, 450).seconds == 0


def test_a_pipeline_sends_far_less_than_tensor_parallel():
    tensor = tensor_parallel_communication(LLAMA_70B, 16, 4, 450)
    pipeline = pipeline_communication(LLAMA_70B, 16, 4, 450)
    assert (pipeline.events, pipeline.bytes_per_gpu) == (3, 16 * 8192 * 2)
    assert pipeline.seconds == pytest.approx(3 * 16 * 8192 * 2 / 450e9)
    assert pipeline.seconds < tensor.seconds / 50


def test_bubbles_shrink_with_microbatches():
    assert pipeline_bubble_share(1, 8) == 0
    assert pipeline_bubble_share(4, 1) == 0.75
    assert pipeline_bubble_share(4, 12) == 0.2


@given(st.integers(1, 6), st.integers(1, 10))
def test_the_bubble_share_is_what_a_schedule_shows(stages, microbatches):
    """Stage s works on microbatch m in step s + m, and otherwise waits."""
    steps = stages + microbatches - 1
    idle = stages * steps - stages * microbatches
    assert pipeline_bubble_share(stages, microbatches) == pytest.approx(idle / (stages * steps))


@pytest.mark.parametrize(
    ("model", "at_least", "size"),
    [
        ("Llama-3-70B", 3, 4),
        ("Llama-3-70B", 9, 16),  # 16 copies of 8 KV heads in pairs
        ("Llama-3-70B", 65, None),
        ("Qwen2.5-0.5B", 1, 1),
        ("Qwen2.5-0.5B", 3, 14),  # 7 divides the 14 query heads but not the 2 KV heads
        ("Llama-3.2-3B", 5, 8),  # 6 divides the 24 query heads but not the 8 KV heads
    ],
)
def test_tensor_parallel_divides_the_heads(model, at_least, size):
    assert smallest_tensor_parallel_size(find_model(model), at_least) == size
