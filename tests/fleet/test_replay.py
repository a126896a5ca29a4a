"""An engine whose steps take, by its clock, what a known model says: nothing is left to chance.

Its scheduler, its block pool and its loop are the real ones. Calibrating must find the model, and
the simulator must tell to the last digit what a replay gives.
"""

import math
from dataclasses import replace

import numpy as np
import pytest

from course_lib.engine.batch import StepResult
from course_lib.engine.config import EngineConfig
from course_lib.engine.engine import LLMEngine
from course_lib.fleet.calibration import calibrate, replay
from course_lib.fleet.simulator import simulate
from course_lib.fleet.spec import FleetSpec
from course_lib.fleet.step_time import FittedStepTime, StepWork
from course_lib.traces.generators import bursty, concurrent_users, merge, steady
from tests.checkpoints import random_model, save

KNOWN = FittedStepTime(
    step_s=2e-3,
    batch_s=1e-3,
    prefill_token_s=5e-5,
    prefill_pair_s=2e-6,
    prefill_request_s=3e-4,
    decode_request_s=1e-4,
    context_token_s=4e-6,
)
LENGTHS = {"prompt_tokens": (2, 120), "output_tokens": (1, 40)}
CROWD = concurrent_users(40, within_s=0, seed=4, **LENGTHS)


class Clock:
    """Goes only when told to, and then at least by the least that a float can."""

    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s

    def sleep(self, seconds):
        self.now_s = max(self.now_s + seconds, math.nextafter(self.now_s, math.inf))


class PacedExecutor:
    """Computes nothing; the time of each step passes on the clock."""

    def __init__(self, clock):
        self.clock = clock

    def execute(self, batch):
        self.clock.sleep(KNOWN.seconds(StepWork.of(batch.scheduled)))
        return StepResult([[7] if entry.samples else [] for entry in batch.scheduled])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(random_model("llama"), tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine(checkpoint):
    """A small one, whose cache is soon full."""
    return make_engine(checkpoint)


def make_engine(checkpoint, num_gpu_blocks_override=60):
    config = EngineConfig(
        checkpoint,
        num_gpu_blocks_override=num_gpu_blocks_override,
        max_num_seqs=16,
        max_num_batched_tokens=64,
    )
    clock = Clock()
    engine = LLMEngine(config, clock=clock)
    engine.executor = PacedExecutor(clock)
    return engine


def test_a_calibration_finds_what_the_steps_cost(engine):
    found = calibrate(engine, max_users=8)
    for name, value in vars(KNOWN).items():
        assert getattr(found.step_time, name) == pytest.approx(value, rel=1e-3), name
    assert all(errors.p95_error < 1e-3 for errors in found.errors)


def test_the_same_seed_sends_the_same_work(checkpoint):
    first, second, other = (
        calibrate(make_engine(checkpoint), max_users=4, seed=seed) for seed in (0, 0, 1)
    )
    assert first.errors == second.errors
    assert [errors.steps for errors in first.errors] != [errors.steps for errors in other.errors]


@pytest.mark.parametrize(
    "trace",
    [
        steady(20, 5, seed=1, **LENGTHS),
        bursty(15, 5, cv=4, seed=2, **LENGTHS),
        merge(steady(5, 5, seed=3, **LENGTHS), CROWD),
    ],
    ids=["steady", "bursty", "crowd"],
)
def test_where_steps_take_what_is_fitted_the_simulation_is_exact(engine, trace):
    finished, _ = replay(engine, trace, sleep=engine.clock.sleep)
    spec = replace(calibrate(engine, max_users=2).replica, step_time=KNOWN)
    requests = simulate(trace, FleetSpec(spec)).requests

    happened = sorted(
        (
            m.finished_time,
            m.arrival_time,
            m.first_scheduled_time,
            m.first_token_time,
            m.num_preemptions,
            len(m.token_times),
        )
        for m in finished
    )
    columns = [
        "finished_s",
        "arrival_s",
        "scheduled_s",
        "first_token_s",
        "preemptions",
        "output_tokens",
    ]
    predicted = sorted(requests[columns].itertuples(index=False, name=None))
    np.testing.assert_allclose(happened, predicted, rtol=0, atol=1e-9)


def test_the_crowd_fills_the_cache_so_that_preemptions_are_among_what_is_predicted(engine):
    finished, _ = replay(engine, CROWD, sleep=engine.clock.sleep)
    assert len(finished) == 40
    assert sum(metrics.num_preemptions for metrics in finished) > 0


def test_steps_take_as_long_as_the_clock_says(engine):
    _, steps = replay(engine, CROWD, sleep=engine.clock.sleep)
    assert [seconds for _, seconds in steps] == pytest.approx(
        [KNOWN.seconds(work) for work, _ in steps]
    )
