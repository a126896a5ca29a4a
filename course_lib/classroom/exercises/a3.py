"""Exercises of notebook A3, the autoscaler: the simple rule, the load, the window, the whole.

The oracles of the window and of the whole are here, that of the simple rule is in `a3_rule` and
that of the load in `a3_load`. Each also knows the usual mistakes; `suspects` finds the one that was
made.
"""

import math
import random
from collections.abc import Mapping
from typing import Any

from course_lib.classroom.checks import Exercise, Mismatch
from course_lib.classroom.exercises.a3_load import (
    LOAD_HINTS,
    is_plain,
    needed,
    random_load,
    verify_load,
)
from course_lib.classroom.exercises.a3_rule import replicas_of, verify_simple_rule
from course_lib.classroom.exercises.suspects import Clock, Suspects, difference_of
from course_lib.fleet.metrics import FleetMetrics
from course_lib.fleet.proportional_base import ProportionalBase
from course_lib.fleet.router import LeastOutstanding
from course_lib.fleet.simulator import simulate
from course_lib.fleet.spec import FleetSpec, ReplicaSpec
from course_lib.fleet.step_time import RooflineStepTime
from course_lib.sizing.catalog import find_gpu, find_model
from course_lib.traces.generators import concurrent_users

# A3.3


class _Window:
    """All that was ever wanted, looked through anew each time, or with a mistake."""

    def __init__(self, window_s: float, mistake: str = "") -> None:
        self.window_s, self.mistake = window_s, mistake
        self.history: list[tuple[float, int]] = []
        self.changed_s = -math.inf

    def stabilize(self, wanted: int, current: int, now_s: float) -> int:
        mistake = self.mistake
        if mistake != "up forgotten" or wanted < current:
            self.history.append((now_s, wanted))
        recent = [
            replicas
            for at_s, replicas in self.history
            if now_s - at_s < self.window_s
            or at_s == now_s
            or (mistake == "one too old" and now_s - at_s == self.window_s)
            or mistake == "never forgets"
        ]
        if mistake == "last few":
            recent = [replicas for _, replicas in self.history[-5:]]
        highest = max(recent, default=wanted)
        if mistake == "cooldown":
            held = now_s - self.changed_s < self.window_s
            replicas = current if wanted < current and held else wanted
        elif mistake == "no window":
            replicas = wanted
        elif mistake == "lowest":
            replicas = wanted if wanted >= current else min(recent, default=wanted)
        elif mistake == "mean":
            mean = math.ceil(sum(recent) / max(1, len(recent)))
            replicas = wanted if wanted >= current else min(current, mean)
        elif mistake == "up as well":
            replicas = max(min(recent), current) if wanted > current else min(current, highest)
        elif mistake == "beyond current":
            replicas = wanted if wanted >= current else highest
        elif mistake == "highest always":
            replicas = highest
        else:
            replicas = wanted if wanted >= current else min(current, highest)
        if mistake == "remembers results":
            self.history[-1] = (now_s, replicas)
        if replicas != current:
            self.changed_s = now_s
        return replicas


_WINDOW_HINTS = {
    "no window": "Going down, look back: not below the highest recommendation of the window.",
    "cooldown": "This is a cooldown: it asks when something changed. The window asks what was "
    "wanted: no lower than the highest recommendation of the last window_s.",
    "lowest": "The highest recommendation of the window counts, so that a short lull changes "
    "nothing.",
    "mean": "The highest recommendation of the window counts, not the mean.",
    "up as well": "Up without delay: if wanted >= current_replicas, return it at once.",
    "up forgotten": "Remember each recommendation, those for going up most of all: they are what a "
    "later lull is measured by. Append before you return.",
    "remembers results": "Remember what was wanted, not what you returned. Otherwise the result "
    "keeps itself up for ever.",
    "never forgets": "What is window_s old or older no longer counts.",
    "one too old": "What is as old as window_s no longer counts: keep it while now - then < "
    "window_s.",
    "last few": "The window is a time, not a number of calls: compare now - then with window_s.",
    "beyond current": "If fewer are wanted, never return more than current_replicas: min(current_"
    "replicas, highest).",
    "highest always": "The window is for going down. Going up returns what is wanted now, not the "
    "highest of the window.",
}


def verify_window(answer: type, rng: random.Random) -> None:
    """Recommendations at uneven times, and a fleet that mostly follows."""
    if not isinstance(answer, type):
        raise Mismatch(f"expected a class, got {answer!r}")
    suspects = Suspects(_WINDOW_HINTS)
    for _ in range(60):
        window_s = rng.choice((0.0, 30.0, 60.0, 300.0))
        start_s = rng.choice((0.0, 1000.0))
        clock = Clock(start_s)
        window, truth = answer(window_s, clock), _Window(window_s)
        mistaken = {name: _Window(window_s, name) for name in _WINDOW_HINTS}
        current, told = rng.randint(1, 10), list[str]()
        for _ in range(rng.randint(5, 30)):
            wanted = rng.choice((current, current, rng.randint(0, 20), current + 3, 1, 2))
            now_s = clock.now_s
            expected = truth.stabilize(wanted, current, now_s)
            theirs = {n: w.stabilize(wanted, current, now_s) for n, w in mistaken.items()}
            call = f"stabilize({wanted}, {current}) at {now_s - start_s:g} s"
            where = f"window_s={window_s:g}, after {', '.join(told[-6:]) or 'nothing'}: {call}"
            num_calls = clock.num_calls
            got = window.stabilize(wanted, current)
            difference = difference_of(got, expected, where)
            if difference is not None and clock.num_calls == num_calls:
                difference.hint = "Ask self.clock() what time it is: here it is a virtual one."
            suspects.saw([name for name, value in theirs.items() if value == got], difference)
            told.append(call)
            current = expected
            if rng.random() < 0.1:
                current = max(0, current + rng.choice((-2, 1)))
            clock.now_s += rng.choice((15, 15, 15, 30, window_s, window_s - 15, 90)) or 15
            clock.now_s = max(clock.now_s, now_s + 1)
    suspects.accuse()


# A3.4


class _Whole:
    """Load, window and limits in one, or with one of `_WHOLE_HINTS`' mistakes."""

    def __init__(self, settings: Mapping[str, Any], mistake: str = "") -> None:
        self.settings, self.mistake = settings, mistake
        in_window = {"window both ways": "up as well", "cooldown": "cooldown"}
        self.window = _Window(settings["window_s"], in_window.get(mistake, mistake))
        self.changed_s = -math.inf

    def decide(self, metrics: Mapping[str, float], current: int, now_s: float) -> int:
        settings, mistake = self.settings, self.mistake
        zeros = dict.fromkeys(_WHOLE_METRICS, 0.0)
        wanted = needed(
            {**zeros, **metrics},
            current,
            settings["target_per_replica"],
            settings["target_kv_cache"],
            settings["tolerance"],
            mistake,
        )
        missing = len(metrics) < len(_WHOLE_METRICS)
        if missing and mistake == "missing holds":
            wanted = current
        elif missing and mistake != "missing is zero":
            wanted = max(wanted, current)
        replicas = self.window.stabilize(wanted, current, now_s)
        if mistake == "cooldown both ways":
            held = now_s - self.changed_s < settings["window_s"]
            replicas = current if held else wanted
        if mistake not in ("no limits", "no maximum"):
            replicas = min(replicas, settings["max_replicas"])
        if mistake not in ("no limits", "no minimum"):
            replicas = max(replicas, settings["min_replicas"])
        if replicas != current:
            self.changed_s = now_s
        return replicas


_WHOLE_METRICS = (
    "num_requests_waiting",
    "num_requests_running",
    "kv_cache_utilization",
    "num_replicas_ready",
)
_WHOLE_HINTS = {
    "no limits": "Last of all: min(max(replicas, self.min_replicas), self.max_replicas).",
    "no maximum": "Never more than self.max_replicas.",
    "no minimum": "Never fewer than self.min_replicas.",
    "cooldown both ways": "There is no cooldown any more. Up at once; down to the highest "
    "recommendation of the window.",
    "window both ways": "The window is for going down. Up without delay.",
    "missing is zero": "A metric that is missing is not 0: it could not be measured. Nothing may "
    "get smaller then: wanted = max(wanted, current_replicas).",
    "missing holds": "If one metric is missing, the others may still ask for more replicas; only "
    "fewer are out of the question: wanted = max(wanted, current_replicas).",
    **{
        name: hint
        for hints, names in (
            (LOAD_HINTS, ("waiting only", "no kv", "kv of all", "one step", "no tolerance")),
            (_WINDOW_HINTS, ("no window", "cooldown", "up forgotten", "remembers results")),
        )
        for name, hint in hints.items()
        if name in names
    },
}


def verify_autoscaler(answer: type[ProportionalBase], rng: random.Random) -> None:
    """Days of metrics, some of them missing now and then; then a small fleet in the simulator."""
    if not (isinstance(answer, type) and issubclass(answer, ProportionalBase)):
        raise Mismatch(f"expected a class derived from ProportionalBase, got {answer!r}")
    suspects = Suspects(_WHOLE_HINTS)
    for _ in range(30):
        fewest = rng.choice((0, 1, 1, 2))
        settings = {
            "target_per_replica": rng.choice((1, 4, 4, 5, 8)),
            "target_kv_cache": rng.choice((0.5, 0.75, 0.8)),
            "tolerance": rng.choice((0.0, 0.1, 0.1, 0.25)),
            "window_s": rng.choice((0.0, 60.0, 300.0)),
            "min_replicas": fewest,
            "max_replicas": fewest + rng.choice((1, 4, 20)),
        }
        _run_whole(answer, settings, rng, suspects)
    suspects.accuse()
    _run_fleet(answer)


def _run_fleet(answer: Any) -> None:
    """Forty users come at once to a fleet of one replica with four seats."""
    step_time = RooflineStepTime(find_model("Llama-3-8B"), find_gpu("A10G_24GB"))
    fleet = FleetSpec(
        ReplicaSpec(step_time, num_blocks=500, max_model_len=1024, max_num_seqs=4),
        autoscaler=lambda clock: answer(target_per_replica=4, max_replicas=8, clock=clock),
        router=LeastOutstanding,
    )
    users = concurrent_users(40, at_s=60, prompt_tokens=(20, 60), output_tokens=(600, 800))
    result = simulate(users, fleet, until_s=1800)
    most = max(row["replicas_wanted"] for row in result.timeline_rows)
    if most != 8 or result.timeline_rows[-1]["replicas_wanted"] != 1:
        raise Mismatch(
            "40 users come at once to a simulated fleet of one replica, 4 for each and at most 8: "
            f"expected 8 replicas for a while and 1 in the end, got {most} and "
            f"{result.timeline_rows[-1]['replicas_wanted']}",
            "By itself each decision was right. Does it keep something outside of `self`?",
        )


def _run_whole(
    answer: Any, settings: Mapping[str, Any], rng: random.Random, suspects: Suspects
) -> None:
    start_s = rng.choice((0.0, 1000.0))
    clock = Clock(start_s)
    scaler, truth = answer(**settings, clock=clock), _Whole(settings)
    mistaken = {name: _Whole(settings, name) for name in _WHOLE_HINTS}
    current = max(1, settings["min_replicas"])
    given = ", ".join(f"{name}={value:g}" for name, value in settings.items())
    told: list[str] = []
    for _ in range(rng.randint(10, 40)):
        metrics = _sample(rng, current, settings)
        now_s = clock.now_s
        expected = truth.decide(metrics, current, now_s)
        theirs = {n: model.decide(metrics, current, now_s) for n, model in mistaken.items()}
        said = ", ".join(f"{name}={value:g}" for name, value in metrics.items()) or "no metrics"
        call = f"at {now_s - start_s:g} s with {current} replicas and {said}"
        where = f"{call} ({given}; before: {'; '.join(told[-3:]) or 'nothing'})"
        num_calls = clock.num_calls
        try:
            got = replicas_of(scaler.decide(FleetMetrics(metrics), current), where)
        except KeyError as error:
            raise Mismatch(
                f"{where}: it raised KeyError: {error}",
                "A metric that could not be measured is absent: use metrics.get(name, 0.0), and "
                "let nothing get smaller then.",
            ) from None
        difference = None
        if got != expected:
            difference = Mismatch(f"{where}: expected {expected} replicas, got {got}")
            if clock.num_calls == num_calls:
                difference.hint = "Ask self.clock() what time it is: here it is a virtual one."
        suspects.saw([name for name, value in theirs.items() if value == got], difference)
        told.append(f"{expected} at {now_s - start_s:g} s")
        current = expected
        if rng.random() < 0.05:
            current = max(0, current - 1)
        clock.now_s += rng.choice((15, 15, 15, 30, 60, 300))


def _sample(rng: random.Random, current: int, settings: Mapping[str, Any]) -> dict[str, float]:
    """Metrics whose load any order of the arithmetic measures alike."""
    targets = ("target_per_replica", "target_kv_cache", "tolerance")
    while True:
        metrics = random_load(rng, settings["target_per_replica"] * max(1, current))
        metrics["num_replicas_ready"] = float(rng.randint(0, current))
        if rng.random() < 0.15:
            for name in rng.sample(_WHOLE_METRICS, rng.choice((1, 1, 4))):
                del metrics[name]
        full = {**dict.fromkeys(_WHOLE_METRICS, 0.0), **metrics}
        if is_plain(full, current, *(settings[name] for name in targets)):
            return metrics


EXERCISES = (
    Exercise(
        id="A3.1",
        title="the simple rule",
        points=3,
        verify=verify_simple_rule,
        reference="course_lib.fleet.autoscaler:GPUAutoscaler",
        hints=(
            "In this order: the step (1, -1 or 0), the cooldown, the limits, and last of all "
            "whether the number has changed.",
            "now = self.clock(). Inside the cooldown: self.last_change_s is not None and now - "
            "self.last_change_s < self.cooldown_s. Then the step is 0.",
            "replicas = min(max(current_replicas + step, self.min_replicas), self.max_replicas). "
            "If it differs from current_replicas, self.last_change_s = now.",
        ),
    ),
    Exercise(
        id="A3.2",
        title="replicas for a load",
        points=2,
        verify=verify_load,
        reference="course_lib.fleet.proportional_base:replicas_for_load",
        hints=(
            "Measure the load in replicas, twice: by requests, (waiting + running) / "
            "target_per_replica, and by the KV cache.",
            "By the KV cache: num_replicas_ready * kv_cache_utilization / target_kv_cache. Take "
            "the larger of the two.",
            "If current_replicas is not 0 and abs(load / current_replicas - 1) <= tolerance, "
            "return current_replicas; else math.ceil(load).",
        ),
    ),
    Exercise(
        id="A3.3",
        title="a window on the way down",
        points=2,
        verify=verify_window,
        reference="course_lib.fleet.proportional_base:StabilizationWindow",
        hints=(
            "Three steps: remember (now, wanted), forget what is too old, and decide.",
            "If wanted >= current_replicas, return wanted. You have remembered it already.",
            "Otherwise min(current_replicas, the highest number that self.recommendations still "
            "has).",
        ),
    ),
    Exercise(
        id="A3.4",
        title="the autoscaler",
        points=5,
        verify=verify_autoscaler,
        reference="course_lib.fleet.proportional:ProportionalAutoscaler",
        hints=(
            "Make the window in __init__, after super().__init__(**settings): "
            "StabilizationWindow(self.window_s, self.clock).",
            "Put 0.0 in place of what is missing, ask replicas_for_load with self.target_per_"
            "replica, self.target_kv_cache and self.tolerance, and remember that something was "
            "missing.",
            "Something was missing: wanted = max(wanted, current_replicas). Then the window, then "
            "min(max(replicas, self.min_replicas), self.max_replicas).",
        ),
        part="autoscaler",
    ),
)
