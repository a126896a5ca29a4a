"""The checks of C1 name the mistake, and a diagnosis is asked about records that tell no names."""

import random

import pytest

from course_lib.classroom.checks import CheckFailed, check
from course_lib.classroom.exercises import c1, c1_incidents
from course_lib.classroom.incidents.records import CAUSES
from course_lib.classroom.parts import load_object, part
from course_lib.classroom.plots.incidents import plot_incident
from tests.classroom import answers_c1 as answers
from tests.classroom.hints import hint_shown

HINTS = [
    ("C1.1", answers.split_without_cold_start, "waited for the cold start"),
    ("C1.1", answers.split_with_the_whole_start, "from the later of the two beginnings"),
    ("C1.1", answers.split_with_negative_times, "not a negative time"),
    ("C1.1", answers.split_counting_twice, "what is cold start is not gateway"),
    ("C1.1", answers.split_without_retries, "After a retry"),
    ("C1.1", answers.split_with_the_queue_from_arrival, "begins when the request is dispatched"),
    ("C1.2", answers.increase_without_resets, "began anew at 0"),
    ("C1.2", answers.increase_of_those_inside, "begin with the last scrape up to"),
    ("C1.2", answers.increase_of_all, "between the two moments"),
    ("C1.2", answers.increase_since_the_beginning, "up to `start_s`"),
    ("C1.2", answers.increase_last_value, "is a difference"),
    ("C1.3", answers.ratio_of_means, "Take the medians"),
    ("C1.3", answers.ratio_upside_down, "comes first"),
    ("C1.3", answers.ratio_with_everybody, "other replicas only"),
    ("C1.3", answers.ratio_with_short_replies, "has no TPOT"),
    ("C1.4", answers.diagnose_by_kv_usage, "Count the `preemptions`"),
    ("C1.4", answers.diagnose_in_words, "one of the names in CAUSES"),
]


@pytest.fixture(autouse=True)
def own_parts(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COURSE_PARTS_DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("exercise", "answer", "hint"), HINTS, ids=lambda v: getattr(v, "__name__", "")
)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_mistake_gets_the_hint_that_fits_it(exercise, answer, hint: str, seed: int) -> None:
    assert hint in hint_shown(exercise, answer, seed)


def test_the_courses_own_answers_pass() -> None:
    for exercise in c1.EXERCISES:
        exercise.verify(load_object(exercise.reference), random.Random(4))


def test_a_failed_diagnosis_names_one_incident_and_what_was_said() -> None:
    with pytest.raises(CheckFailed) as failure:
        check("C1.4", answers.diagnose_by_largest_phase, seed=1)
    difference = str(failure.value).splitlines()[1]
    assert "of 120 held-out incidents have the right cause; 85% are needed" in difference
    assert "held-out incident" in difference and "diagnose said" in difference


def test_a_diagnosis_sees_no_name_twice_and_no_cause() -> None:
    seen = []

    def spy(incident):
        seen.append(incident)
        return "queue_overflow"

    for seed in (1, 2):
        with pytest.raises(c1_incidents.Mismatch):
            c1_incidents.verify_diagnose(spy, random.Random(seed))
    half = len(seen) // 2
    orders = [
        [incident.request.first_token_s for incident in part] for part in (seen[:half], seen[half:])
    ]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    assert not any(cause in repr(incident) for incident in seen for cause in CAUSES)
    (new,) = c1_incidents.fresh(random.Random(1), held_out=True, causes=("slow_replica",))
    assert not any(cause in repr(new.incident) for cause in CAUSES)


def test_a_diagnosis_that_passed_is_the_part() -> None:
    assert part("diagnose").__module__ == "course_lib.classroom.diagnosis"
    check("C1.4", answers.diagnose_by_rules, seed=1)
    assert part("diagnose").__name__ == "diagnose_by_rules"


def test_every_practice_cause_can_be_drawn() -> None:
    split = load_object("course_lib.classroom.diagnosis:split_timeline")
    drawn = set()
    for case in c1_incidents.load("practice"):
        if case.cause not in drawn:
            drawn.add(case.cause)
            request = case.incident.request
            figure = plot_incident(case.incident, split(request, case.incident.replica))
            assert figure.axes[-1].get_xlabel().endswith("(s)")
    assert drawn == set(CAUSES)
