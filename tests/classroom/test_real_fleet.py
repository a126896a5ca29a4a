"""Notebook A4's two real servers: the loop over them, and the recording where they cannot run."""

import pytest

from course_lib.classroom import real_fleet
from course_lib.classroom.real_fleet import MOMENTS, RECORDING, SERVERS, can_run, described, watch
from course_lib.fleet.control_loop import NoMetrics, SafeAutoscaler, read_record
from course_lib.fleet.proportional import ProportionalAutoscaler
from course_lib.fleet.proportional_base import LOAD_METRICS

SEEN = {
    "nobody is there": ("0 wait, 0 run, 2 servers answer", 2, 2),
    "24 customers": ("16 wait, 8 run, 2 servers answer", 2, 6),
    "they have gone": ("0 wait, 0 run, 2 servers answer", 6, 6),
    "Prometheus is gone": ("no metrics", 6, 6),
}


def four_each(clock):
    rule = ProportionalAutoscaler(target_per_replica=4, min_replicas=SERVERS, clock=clock)
    return SafeAutoscaler(rule, LOAD_METRICS)


def told(steps):
    return {
        moment: (described(step.metrics), step.current, step.decision.replicas)
        for moment, step in zip(MOMENTS, steps, strict=True)
    }


@pytest.mark.slow
@pytest.mark.skipif(not can_run(), reason="needs the program prometheus and the extra [serve]")
def test_the_real_thing_shows_what_the_notebook_compares():
    assert told(watch(four_each)) == SEEN


def test_the_recording_shows_the_same(monkeypatch):
    monkeypatch.setattr(real_fleet, "can_run", lambda: False)
    assert told(watch(four_each)) == SEEN


def test_on_the_recording_another_autoscaler_decides_anew(monkeypatch):
    monkeypatch.setattr(real_fleet, "can_run", lambda: False)

    def two_each(clock):
        rule = ProportionalAutoscaler(target_per_replica=2, min_replicas=SERVERS, clock=clock)
        return SafeAutoscaler(rule, LOAD_METRICS)

    steps = watch(two_each)
    assert [step.current for step in steps] == [2, 2, 6, 6]  # as it was then
    assert [step.decision.replicas for step in steps] == [2, 12, 6, 6]


def test_the_recording_is_of_two_servers_and_of_a_prometheus_that_went_away():
    *seen, gone = read_record(RECORDING.read_text().splitlines())
    for step in seen:
        assert [replica.ready for replica in step.metrics.replicas] == [True] * SERVERS
        assert set(LOAD_METRICS) <= set(step.metrics)
    assert isinstance(gone.metrics, NoMetrics) and "does not answer" in gone.metrics.reason
