"""Jumping over steps alike changes nothing: the same events at the same times, to the last bit."""

import random
from collections.abc import Callable

import pytest

from course_lib.engine.scheduler import Scheduler
from course_lib.fleet import replica as replica_module
from course_lib.fleet.simulator import simulate
from course_lib.fleet.spec import FleetSpec, ReplicaSpec
from course_lib.traces.generators import steady
from course_lib.traces.trace import Trace, TraceRequest
from tests.fleet.random_fleets import STEP_TIME, random_fleet, random_trace

BATCHES_OF_SEEDS = [pytest.param(range(50), id="50")] + [
    pytest.param(range(first, first + 95), id=f"{first}", marks=pytest.mark.slow)
    for first in range(50, 1000, 95)
]


@pytest.mark.parametrize("seeds", BATCHES_OF_SEEDS)
def test_event_logs_are_identical_with_and_without_jumping(seeds: range) -> None:
    for seed in seeds:
        rng = random.Random(f"jump/{seed}")
        trace, fleet = random_trace(rng), random_fleet(rng)
        jumped, stepped = (
            simulate(trace, fleet, seed=seed, until_s=6.0, jump=jump, record_events=True)
            for jump in (True, False)
        )
        assert jumped.events == stepped.events, seed
        assert jumped.request_rows == stepped.request_rows, seed
        assert jumped.timeline_rows == stepped.timeline_rows, seed
        assert jumped.replica_timeline_rows == stepped.replica_timeline_rows, seed
        assert jumped.replica_rows == stepped.replica_rows, seed


class CountingScheduler(Scheduler):
    """Counts its calls."""

    calls = 0

    def schedule(self):
        type(self).calls += 1
        return super().schedule()


def _calls(jump: bool | None) -> int:
    CountingScheduler.calls = 0
    replica = ReplicaSpec(STEP_TIME, 1000, 4096, scheduler=CountingScheduler)
    trace = Trace("one", (TraceRequest(0.0, 100, 400),))
    result = simulate(trace, FleetSpec(replica), jump=jump)
    assert result.summary()["requests_finished"] == 1
    return CountingScheduler.calls


def test_a_jump_is_made_by_the_scheduler_of_the_engine() -> None:
    assert _calls(jump=False) == 400 + 1  # the last one finds nothing to do
    assert _calls(jump=True) == 3  # the prefill, one for all decodes, nothing to do


def test_a_scheduler_of_ones_own_is_asked_at_each_step() -> None:
    assert _calls(jump=None) == 400 + 1


@pytest.mark.parametrize(
    ("where", "what", "instead"),
    [
        (replica_module.Replica, "_still_blocked", lambda *_: True),
        (replica_module, "_final_tokens", lambda request: request.num_tokens + 50),
    ],
    ids=["past an arrival", "past an end"],
)
def test_a_jump_too_far_would_be_noticed(
    where: object, what: str, instead: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = FleetSpec(ReplicaSpec(STEP_TIME, 60, 200, max_num_batched_tokens=64))
    trace = steady(20, 3, prompt_tokens=(1, 100), output_tokens=(20, 60), seed=3)
    stepped = simulate(trace, fleet, jump=False, record_events=True)
    monkeypatch.setattr(where, what, instead)
    assert simulate(trace, fleet, jump=True, record_events=True).events != stepped.events
