"""The checks of A4 name the mistake, and what they let pass keeps a fleet warm in the simulator."""

import random
from pathlib import Path

import pytest
import yaml

from course_lib.classroom.checks import CheckFailed, check
from course_lib.classroom.crd import crd_errors, find_crd
from course_lib.classroom.exercises import a4
from course_lib.classroom.parts import load_object, part
from tests.classroom import answers_a4 as answers
from tests.classroom.hints import hint_shown

HINTS = [
    ("A4.1", answers.backlog_in_bytes, "a GB is 8 Gbit"),
    ("A4.1", answers.backlog_bits_the_wrong_way, "multiply the GB by 8"),
    ("A4.1", answers.backlog_gib_as_gb, "a GiB is 2**30 bytes"),
    ("A4.1", answers.backlog_gib_the_wrong_way, "A GiB is more than a GB"),
    ("A4.1", answers.backlog_without_warm_up, "still warms up"),
    ("A4.1", answers.backlog_longest_phase, "follow one another"),
    ("A4.1", answers.backlog_per_minute, "divide by 60"),
    ("A4.1", answers.backlog_of_all_arrivals, "served meanwhile"),
    ("A4.1", answers.backlog_below_zero, "No queue is shorter"),
    ("A4.1", answers.backlog_nobody_comes_later, "customers go on coming"),
    ("A4.1", answers.backlog_drains_in_minutes, "drain_s is in seconds"),
    ("A4.1", answers.backlog_always_ends, "math.inf"),
    ("A4.2", answers.pool_of_the_whole_ramp, "not the whole rush"),
    ("A4.2", answers.pool_beyond_the_ramp, "grows no further"),
    ("A4.2", answers.pool_ready_in_minutes, "ready_s is in seconds"),
    ("A4.2", answers.pool_per_minute, "capacity is per second"),
    ("A4.2", answers.pool_rounded_down, "needs a whole one"),
    ("A4.2", answers.pool_rounded, "needs a whole one"),
    ("A4.2", answers.pool_one_more, "but not beyond"),
    ("A4.2", answers.pool_paid_all_day, "may be fewer than 24"),
    ("A4.2", answers.pool_paid_one_hour, "is for an hour"),
    ("A4.3", answers.NowAlone, "serves only in ready_time_s"),
    ("A4.3", answers.EndAlone, "may come and go"),
    ("A4.3", answers.LastStepLeftOut, "range stops one before"),
    ("A4.3", answers.ThisStepLeftOut, "in which now lies"),
    ("A4.3", answers.OneStepTooMany, "The last step that counts"),
    ("A4.3", answers.NoNewDay, "the first one follows"),
    ("A4.3", answers.IndexBeyond, "the first one follows"),
    ("A4.3", answers.MeanLoad, "not their mean"),
    ("A4.3", answers.SumOfLoads, "not their sum"),
    ("A4.3", answers.CurrentForgotten, "needed - current_replicas"),
    ("A4.3", answers.RoundedDown, "needs a whole one"),
    ("A4.3", answers.Rounded, "needs a whole one"),
    ("A4.3", answers.NoLimits, "Last of all"),
    ("A4.3", answers.NoMinimum, "Never fewer than"),
    ("A4.3", answers.NoMaximum, "Never more than"),
    ("A4.3", answers.LimitsTooEarly, "Subtract current_replicas first"),
    ("A4.3", answers.MinimumOnTop, "not an addition"),
    ("A4.3", answers.RealTimePlan, "Ask self.clock()"),
    ("A4.3", answers.NumberAlone, "Return ScalingDecision"),
    ("A4.3", answers.NoReason, "Say why"),
    ("A4.4", answers.yaml_waiting_alone, "Waiting alone is the trap"),
    ("A4.4", answers.yaml_running_alone, "Those who wait"),
    ("A4.4", answers.yaml_two_triggers, "The load is the sum"),
    ("A4.4", answers.yaml_nulls_are_zero, "ignoreNullValues"),
    ("A4.4", answers.yaml_number_as_threshold, "The CRD wants texts"),
    ("A4.4", answers.yaml_without_minimum, "Without minReplicaCount"),
    ("A4.4", answers.yaml_without_maximum, "Without maxReplicaCount"),
    ("A4.4", answers.yaml_without_fallback, "When the metrics stay away"),
    ("A4.4", answers.yaml_fallback_shrinks, "keeps what runs"),
    ("A4.4", answers.yaml_fallback_late, "failureThreshold is 3"),
    ("A4.4", answers.yaml_fallback_of_the_minimum, "are fallback_replicas"),
    ("A4.4", answers.yaml_default_window, "stabilizationWindowSeconds"),
    ("A4.4", answers.yaml_window_is_cooldown, "stabilizationWindowSeconds"),
    ("A4.4", answers.yaml_window_up, "Going up does not wait"),
    ("A4.4", answers.yaml_target_of_one, "requests for each replica"),
    ("A4.4", answers.yaml_without_indentation, "YAML goes by its indentation"),
    ("A4.4", answers.yaml_as_a_dict, "as one text"),
]


@pytest.mark.parametrize(
    ("exercise", "answer", "hint"), HINTS, ids=lambda v: getattr(v, "__name__", "")
)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_mistake_gets_the_hint_that_fits_it(exercise, answer, hint: str, seed: int) -> None:
    assert hint in hint_shown(exercise, answer, seed)


def test_the_courses_own_versions_keep_the_rules_that_the_checks_ask_for() -> None:
    for seed in range(5):
        for exercise in a4.EXERCISES:
            exercise.verify(load_object(exercise.reference), random.Random(seed))


@pytest.mark.parametrize("answer", answers.RIGHT["A4.3"])
def test_a_plan_that_passed_is_saved_as_a_part(
    answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COURSE_PARTS_DIR", str(tmp_path))
    check("A4.3", answer)
    saved = part("cold_start")
    assert saved.__name__ == answer.__name__ and saved is not answer
    assert saved([1, 5], 60, 1, 30, clock=lambda: 45).decide(1).replicas == 4


def test_a_plan_that_keeps_its_past_outside_of_itself_fails_in_the_fleet() -> None:
    class Shared(answers.PlainPlan):
        most = 0

        def decide(self, current_replicas):
            decision = super().decide(current_replicas)
            if len(self.forecast) > 50:
                Shared.most = max(Shared.most, decision.replicas)
                return type(decision)(Shared.most, "held")
            return decision

    with pytest.raises(CheckFailed, match="simulated fleet"):
        check("A4.3", Shared, seed=1)


@pytest.mark.skipif(find_crd() is None, reason="no copy of KEDA's CRD is here")
@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (answers.yaml_as_text, None),
        (answers.yaml_as_json, None),
        (answers.yaml_number_as_threshold, "is not of type 'string'"),
        (answers.yaml_with_a_wrong_field, "'minReplicas' was unexpected"),
    ],
)
def test_the_crd_says_what_an_api_server_would(answer, error: str | None) -> None:
    given = {
        "name": "chat", "prometheus": "http://prometheus:9090", "waiting": "sum(waiting)",
        "running": "sum(running)", "target": 4, "min_replicas": 1, "max_replicas": 9,
        "fallback_replicas": 3, "window_s": 600,
    }  # fmt: skip
    errors = crd_errors(yaml.safe_load(answer(**given)), find_crd())
    assert errors == [] if error is None else any(error in found for found in errors)
