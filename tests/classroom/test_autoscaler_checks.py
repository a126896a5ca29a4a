"""The checks of A3 name the mistake, and what they let pass runs a fleet in the simulator."""

import random
from pathlib import Path

import pytest

from course_lib.classroom.checks import CheckFailed, check
from course_lib.classroom.exercises import a3
from course_lib.classroom.parts import load_object, part
from course_lib.fleet.simulator import simulate
from course_lib.fleet.spec import FleetSpec, ReplicaSpec
from course_lib.fleet.step_time import RooflineStepTime
from course_lib.sizing.catalog import find_gpu, find_model
from course_lib.traces.generators import concurrent_users
from tests.classroom import answers_a3 as answers
from tests.classroom.hints import hint_shown

HINTS = [
    ("A3.1", answers.SignalsAtTheLimit, "at its limit is not above it"),
    ("A3.1", answers.QueueAndCacheOnly, "TTFT is a signal"),
    ("A3.1", answers.NoCache, "The KV cache is a signal"),
    ("A3.1", answers.AllSignals, "One high signal is enough"),
    ("A3.1", answers.DownWhenNobodyWaits, "takes all three"),
    ("A3.1", answers.QuietFirst, "high signals first"),
    ("A3.1", answers.NoCooldown, "remember self.last_change_s"),
    ("A3.1", answers.CooldownTooLong, "is over when"),
    ("A3.1", answers.CooldownDownOnly, "both directions"),
    ("A3.1", answers.CooldownSinceALook, "not from the last decision"),
    ("A3.1", answers.CooldownSinceAWish, "so no cooldown begins"),
    ("A3.1", answers.CooldownFromTheStart, "Before the first change"),
    ("A3.1", answers.NoLimits, "Last of all"),
    ("A3.1", answers.NoMaximum, "Never more than"),
    ("A3.1", answers.RealTimeRule, "Ask self.clock()"),
    ("A3.1", answers.TwoAtOnce, "one replica at a time"),
    ("A3.1", answers.NumberAlone, "Return ScalingDecision"),
    ("A3.1", answers.NoReason, "Say why"),
    ("A3.2", answers.load_waiting_only, "Waiting alone is the trap"),
    ("A3.2", answers.load_running_only, "Those who wait"),
    ("A3.2", answers.load_without_cache, "The KV cache is a load as well"),
    ("A3.2", answers.load_cache_of_all, "mean over the ready replicas"),
    ("A3.2", answers.load_summed, "not the sum"),
    ("A3.2", answers.load_without_tolerance, "Within the tolerance"),
    ("A3.2", answers.load_rounded_down, "Round up"),
    ("A3.2", answers.load_one_more, "but not beyond"),
    ("A3.2", answers.load_one_step, "not one more or one fewer"),
    ("A3.2", answers.load_divides_by_zero, "With 0 replicas"),
    ("A3.3", answers.NoWindow, "look back"),
    ("A3.3", answers.CooldownWindow, "This is a cooldown"),
    ("A3.3", answers.LowestOfTheWindow, "The highest recommendation"),
    ("A3.3", answers.DelaysGoingUp, "Up without delay"),
    ("A3.3", answers.ForgetsGoingUp, "Remember each recommendation"),
    ("A3.3", answers.RemembersResults, "not what you returned"),
    ("A3.3", answers.NeverForgets, "no longer counts"),
    ("A3.3", answers.KeepsOneTooOld, "as old as window_s"),
    ("A3.3", answers.LastFive, "The window is a time"),
    ("A3.3", answers.BeyondCurrent, "never return more than current_replicas"),
    ("A3.3", answers.RealTimeWindow, "Ask self.clock()"),
    ("A3.4", answers.WaitingOnly, "Waiting alone is the trap"),
    ("A3.4", answers.NoCacheAtAll, "The KV cache is a load as well"),
    ("A3.4", answers.CacheOfAll, "mean over the ready replicas"),
    ("A3.4", answers.OneStepAtATime, "not one more or one fewer"),
    ("A3.4", answers.NeverMissing, "is not 0"),
    ("A3.4", answers.HoldsWhenMissing, "may still ask for more"),
    ("A3.4", answers.AutoscalerWithoutWindow, "look back"),
    ("A3.4", answers.AutoscalerWithACooldown, "no cooldown any more"),
    ("A3.4", answers.AutoscalerThatDelaysGoingUp, "Up without delay"),
    ("A3.4", answers.AutoscalerThatForgets, "Remember each recommendation"),
    ("A3.4", answers.AutoscalerWithoutLimits, "Last of all"),
    ("A3.4", answers.AutoscalerWithoutMaximum, "Never more than"),
    ("A3.4", answers.AutoscalerInRealTime, "self.clock"),
    ("A3.4", answers.AutoscalerThatReads, "metrics.get(name, 0.0)"),
    ("A3.4", answers.AutoscalerOfNumbers, "Return ScalingDecision"),
]


@pytest.mark.parametrize(
    ("exercise", "answer", "hint"), HINTS, ids=lambda v: getattr(v, "__name__", "")
)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_mistake_gets_the_hint_that_fits_it(exercise, answer, hint: str, seed: int) -> None:
    assert hint in hint_shown(exercise, answer, seed)


def test_the_courses_own_versions_keep_the_rules_that_the_checks_ask_for() -> None:
    for seed in range(5):
        for exercise in a3.EXERCISES:
            exercise.verify(load_object(exercise.reference), random.Random(seed))


def test_the_message_names_the_moment_the_metrics_and_the_limits() -> None:
    with pytest.raises(CheckFailed) as failure:
        check("A3.1", answers.TwoAtOnce, seed=1)
    difference = str(failure.value).splitlines()[1]
    assert "num_requests_waiting=" in difference and "cooldown_s=" in difference
    assert "replicas, got" in difference


@pytest.mark.parametrize("answer", answers.RIGHT["A3.4"])
def test_an_autoscaler_that_passed_is_saved_and_runs_the_classic_morning(
    answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COURSE_PARTS_DIR", str(tmp_path))
    check("A3.4", answer)
    saved = part("autoscaler")
    assert saved.__name__ == answer.__name__ and saved is not answer
    step_time = RooflineStepTime(find_model("Llama-3-8B"), find_gpu("A10G_24GB"))
    fleet = FleetSpec(
        ReplicaSpec(step_time, num_blocks=1000, max_model_len=2048, max_num_seqs=5),
        autoscaler=lambda clock: saved(target_per_replica=5, clock=clock),
    )
    users = concurrent_users(
        100, at_s=20, within_s=5, prompt_tokens=(100, 200), output_tokens=(400, 600)
    )
    result = simulate(users, fleet, until_s=1200)
    up = [row for row in result.decision_rows if row["wanted"] > row["current"]]
    assert [(row["current"], row["wanted"]) for row in up] == [(1, 20)]
    assert result.summary()["requests_finished"] == 100
    assert result.reversals == 1


def test_an_autoscaler_that_keeps_its_past_outside_of_itself_fails_in_the_fleet() -> None:
    class Shared(answers.PlainAutoscaler):
        decisions = 0

        def decide(self, metrics, current_replicas):
            Shared.decisions += 1
            decision = super().decide(metrics, current_replicas)
            return decision if len(metrics) < 5 else type(decision)(current_replicas, "held")

    with pytest.raises(CheckFailed, match="simulated fleet"):
        check("A3.4", Shared, seed=1)
