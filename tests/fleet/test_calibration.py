"""Nothing here looks at how long steps took, only at what was timed and what became of it."""

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from course_lib.cli import app
from course_lib.data import DEFAULT_MODEL
from course_lib.engine.config import EngineConfig
from course_lib.engine.engine import LLMEngine
from course_lib.fleet.calibration import (
    Calibration,
    ComputingClock,
    StepErrors,
    calibrate,
    load_calibration,
    replay,
    save_calibration,
    step_errors,
)
from course_lib.fleet.simulator import simulate
from course_lib.fleet.spec import FleetSpec, ReplicaSpec
from course_lib.fleet.step_time import FittedStepTime, StepWork
from course_lib.traces.trace import Segment, Trace, TraceRequest

TRACE = Trace(
    "three",
    (
        TraceRequest(0.0, 40, 5, (Segment(1, 32),)),
        TraceRequest(0.0, 60, 3),
        TraceRequest(50.0, 40, 2, (Segment(1, 32),)),
    ),
)

RECORDED = Calibration(
    "some-chat",
    "some-chat in float32 on cpu",
    ReplicaSpec(FittedStepTime(4e-3, 1e-3, 1e-4), num_blocks=99, max_model_len=512),
    (StepErrors("1 decode", 10, 4.2, 4.1, 0.02, 0.08),),
)


@pytest.fixture(scope="module")
def clock() -> ComputingClock:
    return ComputingClock()


@pytest.fixture(scope="module")
def engine(clock: ComputingClock) -> LLMEngine:
    config = EngineConfig(DEFAULT_MODEL, max_model_len=512, num_gpu_blocks_override=300)
    return LLMEngine(config, clock=clock)


def test_a_replay_is_the_trace_on_the_engine(engine, clock):
    finished, samples = replay(engine, TRACE, sleep=clock.sleep)
    by_arrival = sorted(finished, key=lambda metrics: (metrics.arrival_time, metrics.ttft_s))
    assert [m.arrival_time for m in by_arrival] == pytest.approx([0, 0, 50])
    assert sorted(len(m.token_times) for m in finished) == [2, 3, 5]
    assert all(m.first_scheduled_time >= m.arrival_time for m in finished)
    assert finished[-1].finished_time > 50
    assert samples[0][0] == StepWork(100, 40 * 41 // 2 + 60 * 61 // 2, 0, 0, 2)
    # The first 32 tokens of the third prompt are those of the first one, which the cache has.
    last_prompt = samples[-2][0]
    assert last_prompt == StepWork(8, 8 * 32 + 8 * 9 // 2, 0, 0, 1)
    assert all(seconds > 0 for _, seconds in samples)


def test_a_replay_leaves_the_engine_as_it_was(engine, clock):
    executor = engine.executor
    first, again = (replay(engine, TRACE, sleep=clock.sleep)[1] for _ in range(2))
    assert [work for work, _ in first] == [work for work, _ in again]
    assert again[0][0].prefill_tokens == 100  # the cache was emptied
    assert engine.executor is executor
    too_long = Trace("long", (TraceRequest(0.0, 20, 2), TraceRequest(0.0, 600, 2)))
    with pytest.raises(ValueError, match="prompt of 600 tokens"):
        replay(engine, too_long)
    assert engine.executor is executor
    assert not engine.has_unfinished_requests()


def test_the_simulator_computes_the_same_steps_as_the_engine(engine, clock):
    """With the same batches, errors of a prediction are those of the step times alone."""
    works: list[StepWork] = []

    class Watching(FittedStepTime):
        def seconds(self, work: StepWork) -> float:
            works.append(work)
            return super().seconds(work)

    together = Trace("together", tuple(TraceRequest(0.0, 30 + i, 4 + i) for i in range(6)))
    replica = ReplicaSpec(Watching(step_s=1.0), num_blocks=300, max_model_len=512)
    simulate(together, FleetSpec(replica), jump=False)
    _, samples = replay(engine, together, sleep=clock.sleep)
    assert works == [work for work, _ in samples]
    assert len(works) == 9 and works[0].num_prefills == 6


def test_a_calibration_covers_all_kinds_of_steps(engine):
    calibration = calibrate(engine, max_users=9, max_prompt_tokens=64)
    assert {errors.kind for errors in calibration.errors} == {
        "1 decode", "2 to 7 decodes", "8 decodes or more", "prefill", "prefill and decodes",
    }  # fmt: skip
    assert calibration.model == "merchant-chat"
    assert calibration.replica.num_blocks == 300
    assert calibration.replica.max_model_len == 512
    work = StepWork(0, 0, 4, 200)
    assert calibration.replica.step_time.seconds(work) > 0
    assert not engine.has_unfinished_requests()


def test_a_calibration_needs_an_idle_engine_and_sensible_numbers(engine):
    with pytest.raises(ValueError, match="max_users must be a whole number from 1 to 256"):
        calibrate(engine, max_users=257)
    with pytest.raises(ValueError, match="max_prompt_tokens must be a whole number from 2 to 511"):
        calibrate(engine, max_prompt_tokens=512)
    engine.add_request("busy", [1, 2, 3])
    with pytest.raises(ValueError, match="unfinished requests; calibrate one that is idle"):
        calibrate(engine)
    engine.abort_request("busy")


def test_errors_are_told_by_kind():
    model = FittedStepTime(step_s=1.0)
    decode, prompt = StepWork(0, 0, 1, 5), StepWork(4, 10, 0, 0, 1)
    one, many = step_errors(model, [(decode, 1.0), (prompt, 2.0), (decode, 1.25), (decode, 0.8)])
    assert (one.kind, one.steps, many.kind, many.steps) == ("1 decode", 3, "prefill", 1)
    assert one.median_error == pytest.approx(0.2)
    assert one.measured_ms == pytest.approx(1e3 * 3.05 / 3)
    assert many.predicted_ms == pytest.approx(1000)
    assert many.p95_error == pytest.approx(0.5)


def test_a_saved_calibration_is_read_back_as_it_was(tmp_path):
    other = dataclasses.replace(RECORDED, model="other-chat")
    save_calibration(RECORDED, tmp_path)
    save_calibration(other, tmp_path)
    assert load_calibration("some-chat", directory=tmp_path) == RECORDED
    assert load_calibration("other-chat", directory=tmp_path) == other


def test_the_shipped_models_calibration_on_a_cpu_can_be_simulated_with():
    found = load_calibration("merchant-chat", device="CPU")
    result = simulate(TRACE, FleetSpec(found.replica))
    assert result.summary()["requests_finished"] == 3
    assert 0 < result.summary()["ttft_p50_s"] < 1


def test_what_is_not_recorded_is_said(tmp_path):
    with pytest.raises(ValueError, match="no calibration of any model on any device is recorded"):
        load_calibration(directory=tmp_path)
    path = save_calibration(RECORDED, tmp_path)
    with pytest.raises(ValueError, match=r"of some-chat on H100 is recorded in .*course calibrate"):
        load_calibration("some-chat", device="H100", directory=tmp_path)
    broken = json.loads(path.read_text())
    broken["rows"][1]["surprise_s"] = 1
    path.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=r"surprise_s.*record it anew with course"):
        load_calibration(directory=tmp_path)


def test_the_command_prints_costs_and_errors_and_saves(tmp_path, monkeypatch):
    monkeypatch.setattr("course_lib.fleet.calibration.calibrate", lambda *_, **__: RECORDED)
    monkeypatch.setattr(
        "course_lib.fleet.calibration.save_calibration",
        lambda found: save_calibration(found, tmp_path),
    )
    result = CliRunner().invoke(app, ["calibrate", "--save"])
    assert result.exit_code == 0, result.output
    for words in ("prefill token", "100", "1 decode", "4.20", "8.0%", "wrote"):
        assert words in result.output
    assert load_calibration(directory=tmp_path) == RECORDED


def test_the_command_says_what_is_wrong():
    result = CliRunner().invoke(app, ["calibrate", "--users", "1000"])
    assert result.exit_code == 1
    assert "max_users must be a whole number from 1 to 256, got 1000" in result.output
