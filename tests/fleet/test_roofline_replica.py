import pytest

from course_lib.fleet.roofline_replica import replica_on
from course_lib.fleet.simulator import simulate
from course_lib.fleet.spec import FleetSpec
from course_lib.fleet.step_time import RooflineStepTime, StepWork
from course_lib.sizing.catalog import find_gpu, find_model
from course_lib.sizing.roofline import decode
from course_lib.traces.generators import steady


def test_the_cache_holds_what_weights_and_activations_leave():
    spec = replica_on("Llama-3-8B", "H100_80GB", max_model_len=4096)
    # 80 GB x 0.9 less 16.06 GB of weights and 0.27 GB of 2048 tokens of activations and 256 rows
    # of logits, at 131,072 bytes a token and 16 tokens a block.
    assert spec.num_blocks == pytest.approx((72e9 - 16.06e9 - 0.27e9) / (131_072 * 16), rel=2e-3)
    assert spec.max_model_len == 4096


def test_the_engine_may_be_given_less_of_the_memory():
    usual, half = (
        replica_on("Llama-3-8B", "H100_80GB", gpu_memory_utilization=share).num_blocks
        for share in (0.9, 0.5)
    )
    assert usual - half == pytest.approx(0.4 * 80e9 / (131_072 * 16), abs=1)


def test_the_longest_sequence_is_the_models_own_if_none_is_given():
    assert replica_on("Llama-3-8B", "H100_80GB").max_model_len == 8192


def test_more_gpus_cost_as_much_more_and_share_the_weights():
    one, four = (replica_on("Llama-3-8B", "H100_80GB", gpus=count) for count in (1, 4))
    assert one.usd_per_hour == find_gpu("H100_80GB").usd_per_hour
    assert four.usd_per_hour == 4 * one.usd_per_hour
    assert four.num_blocks > 4 * one.num_blocks
    work = StepWork(num_decodes=8, context_tokens=32_768)
    assert four.step_time.seconds(work) < one.step_time.seconds(work)


def test_smaller_numbers_leave_room_for_more_tokens():
    bf16 = replica_on("Llama-3-8B", "L4_24GB", max_model_len=4096)
    int4 = replica_on("Llama-3-8B", "L4_24GB", max_model_len=4096, weights="INT4")
    fp8_cache = replica_on("Llama-3-8B", "L4_24GB", max_model_len=4096, kv="fp8")
    assert int4.num_blocks > 2 * bf16.num_blocks
    assert fp8_cache.num_blocks == pytest.approx(2 * bf16.num_blocks, abs=1)


def test_steps_take_what_the_roofline_says_unless_efficiencies_say_otherwise():
    model, gpu = find_model("Llama-3-8B"), find_gpu("H100_80GB")
    work = StepWork(num_decodes=8, context_tokens=8 * 4096)
    floor = replica_on("Llama-3-8B", "H100_80GB").step_time.seconds(work)
    assert floor == decode(model, gpu, 8, 4096).seconds
    real = replica_on(
        "Llama-3-8B", "H100_80GB", overhead_s=1e-3, bandwidth_efficiency=0.5
    ).step_time.seconds(work)
    assert real == pytest.approx(2 * floor + 1e-3)
    prompt = StepWork(prefill_tokens=4096, prefill_pairs=4096 * 4097 // 2, num_prefills=1)
    floor = replica_on("Llama-3-8B", "H100_80GB").step_time.seconds(prompt)
    real = replica_on("Llama-3-8B", "H100_80GB", compute_efficiency=0.5).step_time.seconds(prompt)
    assert real == pytest.approx(2 * floor)


def test_arguments_of_the_engine_reach_the_spec():
    spec = replica_on("Llama-3-8B", "H100_80GB", block_size=32, max_num_seqs=64, usd_per_hour=1.25)
    assert (spec.block_size, spec.max_num_seqs, spec.usd_per_hour) == (32, 64, 1.25)
    halves = replica_on("Llama-3-8B", "H100_80GB", max_num_seqs=64)
    assert spec.num_blocks == halves.num_blocks // 2
    assert isinstance(spec.step_time, RooflineStepTime)


def test_a_fleet_of_them_serves_a_trace():
    spec = replica_on("Llama-3-8B", "H100_80GB")
    result = simulate(
        steady(2.0, 20.0, prompt_tokens=500, output_tokens=50), FleetSpec(spec, initial_replicas=2)
    )
    assert result.summary()["requests_finished"] == len(result.request_rows) > 10


@pytest.mark.parametrize(
    ("name", "gpu", "arguments", "message"),
    [
        ("Llama-9", "H100_80GB", {}, "unknown model 'Llama-9'"),
        ("Llama-3-8B", "B9000", {}, "unknown GPU 'B9000'"),
        ("Llama-3-8B", "H100_80GB", {"weights": "int3"}, "unknown precision 'int3'"),
        ("Llama-3-8B", "H100_80GB", {"kv": "int3"}, "unknown precision 'int3'"),
        ("Llama-3-8B", "H100_80GB", {"gpus": 3}, "3 GPUs cannot divide the 32 query and 8 KV"),
        ("Llama-3-8B", "H100_80GB", {"gpus": 0}, "gpus must be a whole number"),
        ("Llama-3-70B", "H100_80GB", {}, "room for 0 tokens .* max_model_len 8192; take more"),
        ("Llama-3-8B", "H100_80GB", {"overhead_s": -1}, "overhead_s must be"),
        ("Llama-3-8B", "H100_80GB", {"max_num_seqs": 0}, "max_num_seqs must be"),
    ],
)
def test_what_cannot_be_is_refused(name, gpu, arguments, message):
    with pytest.raises(ValueError, match=message):
        replica_on(name, gpu, **arguments)


def test_the_cache_must_hold_the_longest_sequence():
    """As many tokens as it holds are served, one more is not; the null block holds none."""
    spec = replica_on("Llama-3-8B", "L4_24GB", max_model_len=100)
    tokens = (spec.num_blocks - 1) * 16
    assert replica_on("Llama-3-8B", "L4_24GB", max_model_len=tokens).max_model_len == tokens
    with pytest.raises(ValueError, match=f"room for {tokens} tokens"):
        replica_on("Llama-3-8B", "L4_24GB", max_model_len=tokens + 1)
