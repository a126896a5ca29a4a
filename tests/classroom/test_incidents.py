"""The incident bank: what its records hold, how far naive rules get, that both runners agree."""

import random
from collections import Counter
from dataclasses import fields
from itertools import chain

import pytest

from course_lib.classroom.diagnosis import diagnose, split_timeline
from course_lib.classroom.incidents import bank
from course_lib.classroom.incidents.conditions import choose, make_condition
from course_lib.classroom.incidents.records import (
    CAUSES,
    Incident,
    cut,
    from_json,
    renamed,
    to_json,
)
from course_lib.classroom.incidents.simulated import draw_gpu, run_simulated
from course_lib.fleet.metrics import METRICS
from tests.classroom import answers_c1 as answers

PRACTICE, HELD_OUT = bank.load("practice"), bank.load("held_out")
BOTH = [*PRACTICE, *HELD_OUT]


def _share_right(rule, cases) -> float:
    return sum(rule(case.incident) == case.cause for case in cases) / len(cases)


def test_there_are_300_incidents_of_ten_causes_and_a_third_of_those_held_out_are_real() -> None:
    assert len(BOTH) >= 300 and len(CAUSES) >= 10
    for cases in (PRACTICE, HELD_OUT):
        assert set(Counter(case.cause for case in cases)) == set(CAUSES)
    assert sum(case.source == "engine" for case in HELD_OUT) >= len(HELD_OUT) / 3


def test_the_reference_is_right_on_held_out_incidents_where_naive_rules_are_not() -> None:
    assert _share_right(diagnose, HELD_OUT) >= 0.95
    most_frequent = Counter(case.cause for case in HELD_OUT).most_common(1)[0][1]
    assert most_frequent / len(HELD_OUT) < 0.2
    assert _share_right(answers.diagnose_by_largest_phase, HELD_OUT) < 0.6
    assert _share_right(answers.diagnose_by_seconds, HELD_OUT) < 0.4


def test_the_reference_is_right_on_the_real_engine_alone() -> None:
    real = [case for case in BOTH if case.source == "engine"]
    assert _share_right(diagnose, real) >= 0.9


@pytest.mark.parametrize("case", BOTH[::10], ids=lambda case: f"{case.source}-{case.cause}")
def test_a_record_is_what_was_logged_and_scraped_up_to_its_end(case) -> None:
    incident = case.incident
    request, settings = incident.request, incident.settings
    assert request.arrival_s == 0
    assert 0 <= request.dispatched_s <= request.scheduled_s < request.first_token_s
    assert set(incident.fleet) == set(METRICS)
    end_s = request.finished_s + 3 * settings.scrape_interval_s + 1e-3
    scrapes = [
        incident.fleet["queue_age_s"],
        *(s for log in incident.replicas.values() for s in log.metrics.values()),
    ]
    assert all(time_s <= end_s for series in scrapes for time_s in series.times_s)
    assert all(line.finished_s <= end_s for line in incident.neighbours)
    assert all(decision.time_s <= end_s for decision in incident.decisions)
    for line in [request, *incident.neighbours]:
        assert line.replica in incident.replicas
    for log in incident.replicas.values():
        assert log.ready_s is None or log.started_s <= log.ready_s <= end_s
        assert log.ended_s is None or log.ended_s <= end_s
    total_s = sum(split_timeline(request, incident.replica).values())
    assert total_s == pytest.approx(request.finished_s, abs=1e-3)


def test_no_record_says_its_cause() -> None:
    assert not {"cause", "source", "seed"} & {field.name for field in fields(Incident)}
    for case in BOTH:
        words = repr(case.incident)
        assert not any(cause in words for cause in CAUSES)


def test_held_out_conditions_come_from_other_ranges() -> None:
    steps = {
        held_out: [draw_gpu(random.Random(seed), held_out).step_time.step_s for seed in range(50)]
        for held_out in (False, True)
    }
    assert max(steps[False]) < min(steps[True])
    for source in bank.SOURCES:
        seats = [
            {c.incident.settings.max_num_seqs for c in cases if c.source == source}
            for cases in (PRACTICE, HELD_OUT)
        ]
        assert not seats[0] & seats[1]


def test_a_record_survives_the_file_and_new_names() -> None:
    incident = HELD_OUT[0].incident
    assert from_json(to_json(incident)) == incident
    names = {name: f"{name}-x" for name in incident.replicas}
    back = {new: old for old, new in names.items()}
    assert renamed(renamed(incident, names, "x"), back, incident.name) == incident


@pytest.mark.parametrize(
    "cause", ["queue_overflow", "slow_replica", "spot_reclaim", "kv_exhaustion"]
)
def test_a_condition_and_a_seed_give_the_same_incident(cause: str) -> None:
    first, again = (
        list(bank.fresh(random.Random(5), held_out=False, causes=(cause,))) for _ in range(2)
    )
    assert first == again


def test_without_the_fault_the_slow_request_is_fast() -> None:
    """What the label names is what made it slow: mended, the same trace answers in time."""
    from dataclasses import replace

    for cause, mended in (
        ("slow_replica", {"slowdowns": {}}),
        ("gateway_overload", {"gateway_s": 0.0}),
        ("spot_reclaim", {"spot_life_s": None}),
    ):
        rng = random.Random(11)
        gpu = draw_gpu(rng, False)
        condition = make_condition(cause, rng, gpu.pace, False)
        run = run_simulated(condition, gpu.step_time, 3)
        (slow,) = choose(condition, run, rng)
        healthy = run_simulated(replace(condition, **mended), gpu.step_time, 3)
        same = next(r for r in healthy.requests if r.request_id == slow.request_id)
        assert same.ttft_s < slow.ttft_s / 3, cause


@pytest.mark.slow
def test_real_engines_log_what_the_simulator_logs() -> None:
    from course_lib.classroom.incidents.engine_pace import engine_pace
    from course_lib.classroom.incidents.real import run_real

    rng = random.Random(2)
    condition = make_condition("slow_replica", rng, engine_pace(), False)
    run = run_real(condition, 1)
    assert len(run.requests) == len(condition.trace.requests)
    (slow,) = choose(condition, run, rng)
    incident = cut(run, slow, "slow")
    (simulated,) = bank.fresh(random.Random(1), held_out=False, causes=("slow_replica",))
    assert set(incident.metrics) == set(simulated.incident.metrics)
    assert set(incident.fleet) == set(simulated.incident.fleet)
    tokens = chain.from_iterable(log.metrics.items() for log in incident.replicas.values())
    assert any(name == "vllm:generation_tokens_total" and s.values[-1] > 0 for name, s in tokens)
    assert diagnose(incident) == "slow_replica"
