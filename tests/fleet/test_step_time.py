import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.engine.batch import ScheduledRequest
from course_lib.engine.request import Request
from course_lib.fleet.step_time import (
    FittedStepTime,
    RooflineStepTime,
    StepTimeModel,
    StepWork,
)
from course_lib.sizing.catalog import find_gpu, find_model, gpus, models
from course_lib.sizing.roofline import decode, prefill

H100 = find_gpu("H100_80GB")
LLAMA_8B = find_model("Llama-3-8B")
KNOWN = FittedStepTime(
    step_s=2e-3,
    batch_s=1e-3,
    prefill_token_s=5e-5,
    prefill_pair_s=2e-8,
    prefill_request_s=3e-4,
    decode_request_s=1e-4,
    context_token_s=4e-7,
)

costs = st.integers(0, 10**6).map(lambda n: n / 3e7)  # all their bits matter
fitted = st.builds(FittedStepTime, *[costs] * 7)
rooflines = st.builds(
    RooflineStepTime,
    st.sampled_from(sorted(models())).map(find_model),
    st.sampled_from(sorted(gpus())).map(find_gpu),
    st.sampled_from([1, 2, 8]),
    overhead_s=costs,
    compute_efficiency=st.floats(0.01, 1),
    bandwidth_efficiency=st.floats(0.01, 1),
)


class SquareRoot(StepTimeModel):
    """As somebody may write one: `seconds` and nothing else."""

    def seconds(self, work: StepWork) -> float:
        return 0.001 * work.num_decodes + work.context_tokens**0.5


def decode_work(num_decodes, context_tokens, later=0):
    return StepWork(num_decodes=num_decodes, context_tokens=context_tokens + later * num_decodes)


# What a step computes.


def scheduled(computed, num_tokens):
    request = Request("r", list(range(1, computed + num_tokens + 1)))
    return ScheduledRequest(request, computed, num_tokens)


def test_a_step_is_divided_into_prefills_and_decodes():
    batch = [scheduled(0, 3), scheduled(100, 4), scheduled(9, 1), scheduled(41, 1)]
    # 1 + 2 + 3 pairs of the first; 101 + 102 + 103 + 104 of the second.
    assert StepWork.of(batch) == StepWork(
        prefill_tokens=7, prefill_pairs=6 + 410, num_decodes=2, context_tokens=52, num_prefills=2
    )


def test_no_requests_are_no_work():
    assert StepWork.of([]) == StepWork()


# All steps of a run of decodes at once.


@given(
    st.one_of(fitted, rooflines, st.just(SquareRoot())),
    st.integers(1, 1024),
    st.integers(0, 10_000_000),
    st.integers(1, 40),
)
def test_a_run_of_decodes_takes_to_the_last_bit_what_its_steps_take(
    model, num_decodes, more_context, num_steps
):
    context = num_decodes + more_context
    durations = model.decode_seconds(num_decodes, context, num_steps)
    one_by_one = [
        model.seconds(decode_work(num_decodes, context, later)) for later in range(num_steps)
    ]
    assert durations.tolist() == one_by_one


@pytest.mark.parametrize(
    "model", [KNOWN, RooflineStepTime(LLAMA_8B, H100, overhead_s=1e-3)], ids=["fitted", "roofline"]
)
def test_a_run_may_be_of_any_length_and_does_not_change_the_next(model):
    durations = model.decode_seconds(3, 1000, 5000)
    assert len(durations) == 5000
    assert durations[-1] == model.seconds(decode_work(3, 1000, 4999))
    assert model.decode_seconds(3, 1000, 5000).tolist() == durations.tolist()
    assert model.decode_seconds(3, 1000, 10).tolist() == durations[:10].tolist()


# A fit.


def steps(count, seed=0):
    """Steps of all kinds: decodes, prompts and chunks, and both together."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        decodes = int(rng.integers(0, 40)) if rng.random() < 0.8 else 0
        prefills = int(rng.integers(1, 4)) if rng.random() < 0.5 or not decodes else 0
        tokens = pairs = 0
        for _ in range(prefills):
            chunk, start = int(rng.integers(2, 600)), int(rng.integers(0, 2000))
            tokens += chunk
            pairs += chunk * start + chunk * (chunk + 1) // 2
        yield StepWork(tokens, pairs, decodes, decodes * int(rng.integers(20, 1500)), prefills)


def test_a_fit_finds_the_coefficients_that_made_the_times():
    samples = [(work, KNOWN.seconds(work)) for work in steps(300)]
    found = FittedStepTime.fit(samples)
    for name, value in vars(KNOWN).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-6), name


def test_noise_moves_the_fit_little_and_pauses_do_not():
    rng = np.random.default_rng(1)
    samples = []
    for place, work in enumerate(steps(3000)):
        seconds = KNOWN.seconds(work) * rng.normal(1, 0.05)
        samples.append((work, seconds + 0.5 if place % 50 == 0 else seconds))
    found = FittedStepTime.fit(samples)
    for work in steps(100, seed=2):
        assert found.seconds(work) == pytest.approx(KNOWN.seconds(work), rel=0.03)


def test_a_fit_is_right_on_average_under_noise_though_pauses_are_left_out():
    rng = np.random.default_rng(0)
    works = list(steps(3000))
    noise = rng.gamma(25, 1 / 25, 3000)  # of mean 1, standard deviation 0.2
    pauses = np.where(rng.random(3000) < 0.03, 20.0, 1.0)
    samples = [(w, KNOWN.seconds(w) * n * p) for w, n, p in zip(works, noise, pauses, strict=True)]
    found = FittedStepTime.fit(samples)
    ratios = [found.seconds(work) / KNOWN.seconds(work) for work in works]
    assert np.mean(ratios) == pytest.approx(1, abs=0.015)
    assert np.abs(np.array(ratios) - 1).max() < 0.1


def test_coefficients_are_those_of_scipys_non_negative_least_squares():
    nnls = pytest.importorskip("scipy.optimize").nnls
    rng = np.random.default_rng(1)
    works = list(steps(400))
    truth = FittedStepTime(4e-3, 0, 1e-4, 0, 0, 2e-4, 0)  # so that others want to be negative
    seconds = np.array([truth.seconds(work) * rng.uniform(0.9, 1.1) for work in works])
    found = FittedStepTime.fit(list(zip(works, seconds.tolist(), strict=True)))
    # The fit ends when its weights are those of its own predictions.
    weights = 1 / np.array([found.seconds(work) for work in works])
    features = np.array(
        [
            [1, w.prefill_tokens + w.num_decodes > 1, w.prefill_tokens, w.prefill_pairs,
             w.num_prefills, w.num_decodes, w.context_tokens]
            for w in works
        ]
    )  # fmt: skip
    scale = features.max(axis=0)
    expected = nnls(features / scale * weights[:, None], seconds * weights)[0]
    predicted = features @ (expected / scale)
    assert predicted.tolist() == pytest.approx([found.seconds(w) for w in works], rel=1e-3)
    assert min(expected) == 0


def test_no_coefficient_is_below_0_though_the_times_ask_for_it():
    """Steps that take less the more context there is: it is left out, the mean stays right."""
    samples = [
        (StepWork(num_decodes=4, context_tokens=context), 0.02 - 1e-6 * context)
        for context in range(100, 10_000, 100)
    ]
    found = FittedStepTime.fit(samples)
    assert found.context_token_s == 0
    assert found.seconds(samples[50][0]) == pytest.approx(0.015, rel=0.05)


def test_one_sample_is_enough_to_give_it_back():
    work = StepWork(num_decodes=4, context_tokens=100)
    assert FittedStepTime.fit([(work, 0.02)]).seconds(work) == pytest.approx(0.02)


def test_a_fit_needs_steps_that_took_time():
    with pytest.raises(ValueError, match="a fit needs measured steps, got none"):
        FittedStepTime.fit([])
    with pytest.raises(ValueError, match="seconds must be a number above 0"):
        FittedStepTime.fit([(StepWork(num_decodes=1, context_tokens=1), 0.0)])


@pytest.mark.parametrize("bad", [-1e-9, float("nan"), "1", None])
@pytest.mark.parametrize("name", list(vars(KNOWN)))
def test_bad_coefficients_are_refused_by_name(name, bad):
    with pytest.raises(ValueError, match=f"{name} must be a number"):
        FittedStepTime(**{name: bad})


def test_a_lone_token_is_spared_what_a_batch_costs():
    lone = KNOWN.seconds(decode_work(1, 100))
    assert lone == pytest.approx(2e-3 + 1e-4 + 4e-5)
    assert KNOWN.seconds(decode_work(2, 100)) == pytest.approx(lone + 1e-4 + 1e-3)
    prompt = StepWork(prefill_tokens=10, prefill_pairs=55, num_prefills=1)
    assert KNOWN.seconds(prompt) == pytest.approx(3e-3 + 3e-4 + 5e-4 + 1.1e-6)
    both = StepWork(10, 55, 1, 100, 1)
    assert KNOWN.seconds(both) == pytest.approx(KNOWN.seconds(prompt) + lone - 2e-3)


# The roofline.


def test_without_efficiencies_a_step_takes_the_floor_of_its_phase():
    model = RooflineStepTime(LLAMA_8B, H100, gpus=2)
    assert (
        model.seconds(decode_work(8, 8 * 4096)) == decode(LLAMA_8B, H100, 8, 4096, gpus=2).seconds
    )
    prompt = StepWork(prefill_tokens=500, prefill_pairs=500 * 501 // 2, num_prefills=1)
    assert model.seconds(prompt) == prefill(LLAMA_8B, H100, 500, gpus=2).seconds


def test_each_efficiency_slows_what_it_is_of():
    short, long = decode_work(4, 4000), StepWork(4096, 4096 * 4097 // 2, 0, 0, 1)
    floor = RooflineStepTime(LLAMA_8B, H100)
    slow_memory = RooflineStepTime(LLAMA_8B, H100, bandwidth_efficiency=0.5)
    slow_compute = RooflineStepTime(LLAMA_8B, H100, compute_efficiency=0.5)
    assert slow_memory.seconds(short) == 2 * floor.seconds(short)
    assert slow_memory.seconds(long) == floor.seconds(long)
    assert slow_compute.seconds(short) == floor.seconds(short)
    assert slow_compute.seconds(long) == 2 * floor.seconds(long)


def test_overhead_and_communication_come_on_top():
    work = decode_work(4, 4000)
    floor = RooflineStepTime(LLAMA_8B, H100, 4)
    phase = floor.roofline.step(num_decodes=4, context_tokens=4000)
    slow = RooflineStepTime(LLAMA_8B, H100, 4, overhead_s=2e-3, bandwidth_efficiency=0.5)
    assert phase.communication_s > 0
    assert slow.seconds(work) == pytest.approx(2 * phase.memory_s + phase.communication_s + 2e-3)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("overhead_s", -1.0),
        ("compute_efficiency", 0.0),
        ("compute_efficiency", 1.1),
        ("bandwidth_efficiency", 0.0),
        ("bandwidth_efficiency", 1.1),
    ],
)
def test_bad_arguments_of_the_roofline_are_refused_by_name(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be a number"):
        RooflineStepTime(LLAMA_8B, H100, **{argument: value})
