"""Exercises of notebook A3, the autoscaler: the simple rule, the load, the window, the whole.

The oracles are here, but for that of the simple rule, which is in `a3_rule`. Each also knows the
usual mistakes; `suspects` finds the one that was made.
"""

import math
import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from course_lib.classroom.checks import Exercise, Mismatch
from course_lib.classroom.exercises.a3_rule import replicas_of, verify_simple_rule
from course_lib.classroom.exercises.suspects import Clock, Suspects, difference_of
from course_lib.fleet.metrics import FleetMetrics
from course_lib.fleet.proportional_base import ProportionalBase

# A3.2


def _load(
    metrics: Mapping[str, float], current: int, target: float, cache_target: float, mistake: str
) -> Fraction:
    """In replicas, exactly, or with one of `_LOAD_HINTS`' mistakes."""
    waiting = Fraction(metrics["num_requests_waiting"])
    running = Fraction(metrics["num_requests_running"])
    if mistake == "waiting only":
        running = Fraction(0)
    if mistake == "running only":
        waiting = Fraction(0)
    counted = Fraction(current if mistake == "kv of all" else metrics["num_replicas_ready"])
    if mistake == "kv of one":
        counted = Fraction(1)
    by_requests = (waiting + running) / Fraction(target)
    by_cache = counted * Fraction(metrics["kv_cache_utilization"]) / Fraction(cache_target)
    if mistake == "no kv":
        by_cache = Fraction(0)
    if mistake == "kv alone":
        return by_cache
    if mistake == "sum":
        return by_requests + by_cache
    if mistake == "smaller":
        return min(by_requests, by_cache)
    if mistake == "mean":
        return (by_requests + by_cache) / 2
    return max(by_requests, by_cache)


def _needed(
    metrics: Mapping[str, float],
    current: int,
    target: float,
    cache_target: float,
    tolerance: float,
    mistake: str = "",
    nudge: float = 0.0,
) -> int:
    load = _load(metrics, current, target, cache_target, mistake) * Fraction(1 + nudge)
    if current and mistake != "no tolerance":
        compared = Fraction(math.ceil(load)) if mistake == "tolerance of the ceiling" else load
        off = compared / current - 1
        if mistake == "tolerance in replicas":
            off = load - current
        near = abs(off) < Fraction(tolerance) if mistake == "strict" else abs(off) <= tolerance
        if mistake == "tolerance down only":
            near = -tolerance <= off <= 0
        if mistake == "tolerance up only":
            near = 0 <= off <= tolerance
        if near:
            return current
    if mistake == "floor":
        return math.floor(load)
    if mistake == "round":
        return round(load)
    if mistake == "one more":
        return math.floor(load) + 1
    if mistake == "one step":
        return current + (math.ceil(load) > current) - (math.ceil(load) < current)
    if mistake == "at least one":
        return max(1, math.ceil(load))
    return math.ceil(load)


_LOAD_HINTS = {
    "waiting only": "Waiting alone is the trap: a fleet that is full, and where nobody waits, "
    "would be taken for an idle one. The load is waiting + running.",
    "running only": "Those who wait need a place as well: waiting + running.",
    "no kv": "The KV cache is a load as well: num_replicas_ready * kv_cache_utilization / "
    "target_kv_cache. The larger of the two counts.",
    "kv alone": "The requests are a load as well: (waiting + running) / target_per_replica. The "
    "larger of the two counts.",
    "kv of all": "kv_cache_utilization is the mean over the ready replicas. Multiply it by "
    "num_replicas_ready: those that are loading hold nothing, and counting them makes a fleet grow "
    "because it grows.",
    "kv of one": "kv_cache_utilization is the mean over the ready replicas: multiply it by "
    "num_replicas_ready.",
    "sum": "Requests and KV cache are two views of the same load: the larger one counts, not the "
    "sum.",
    "smaller": "The larger of the two loads counts. Each resource must be enough.",
    "mean": "The larger of the two loads counts, not their mean. Each resource must be enough.",
    "no tolerance": "Within the tolerance nothing changes: if load / current_replicas is from 1 - "
    "tolerance to 1 + tolerance, return current_replicas.",
    "tolerance of the ceiling": "The tolerance is for the load itself, before it is rounded up.",
    "tolerance in replicas": "The tolerance is a share of the current replicas: look at load / "
    "current_replicas.",
    "strict": "At the tolerance it still holds: <=.",
    "tolerance down only": "The tolerance holds in both directions: abs(load / current_replicas - "
    "1).",
    "tolerance up only": "The tolerance holds in both directions: abs(load / current_replicas - "
    "1).",
    "floor": "Round up, with math.ceil: a part of a replica needs a whole one.",
    "round": "Round up, with math.ceil: a part of a replica needs a whole one.",
    "one more": "Round up, but not beyond: 8 requests at 4 each need 2 replicas, not 3. math.ceil "
    "does it.",
    "one step": "Return what the load needs, not one more or one fewer.",
    "at least one": "No load needs no replica. The limits come later, in A3.4.",
}


def _is_plain(
    metrics: Mapping[str, float], current: int, target: float, cache_target: float, tolerance: float
) -> bool:
    """Whether any order of the arithmetic gives the same, in floats."""
    if all(math.frexp(x)[0] == 0.5 for x in (target, cache_target, current or 1)):
        return True
    arguments = (metrics, current, target, cache_target, tolerance)
    return len({_needed(*arguments, nudge=nudge) for nudge in (-1e-9, 0.0, 1e-9)}) == 1


def _random_load(rng: random.Random, around: float) -> dict[str, float]:
    """Requests near a number, with a KV cache that sometimes needs more than they do."""
    requests = max(0, round(around * rng.choice((0, 0.25, 0.9, 1, 1, 1.1, 1.25, 2, 6))))
    requests = max(0, requests + rng.choice((-1, 0, 0, 1)))
    waiting = rng.choice((0, 0, requests // 2, requests))
    return {
        "num_requests_waiting": float(waiting),
        "num_requests_running": float(requests - waiting),
        "kv_cache_utilization": rng.choice((0, 8, 16, 32, 40, 48, 56, 64)) / 64,
    }


def verify_load(answer: Callable[..., Any], rng: random.Random) -> None:
    """Against exact fractions, with loads at and around the targets and the tolerance."""
    suspects = Suspects(_LOAD_HINTS)
    for _ in range(300):
        current = rng.choice((0, 1, 1, 2, 2, 3, 4, 4, 5, 8, 8, 12, 16))
        target = rng.choice((1, 2, 4, 4, 5, 8, 10))
        cache_target = rng.choice((0.5, 0.75, 0.8, 1.0))
        tolerance = rng.choice((0.0, 0.125, 0.25, 0.1))
        metrics = {
            **_random_load(rng, target * max(1, current)),
            "num_replicas_ready": float(rng.randint(0, current)),
        }
        arguments = (current, target, cache_target, tolerance)
        if not _is_plain(metrics, *arguments):
            continue
        expected = _needed(metrics, *arguments)
        said = ", ".join(f"{name}={value:g}" for name, value in metrics.items())
        where = (
            f"replicas_for_load({{{said}}}, current_replicas={current}, target_per_replica="
            f"{target}, target_kv_cache={cache_target:g}, tolerance={tolerance:g})"
        )
        try:
            got = answer(FleetMetrics(metrics), *arguments)
        except ZeroDivisionError:
            raise Mismatch(
                f"{where} divides by zero",
                "With 0 replicas there is no ratio, so no tolerance either: ask `if "
                "current_replicas` first.",
            ) from None
        agreeing = [n for n in _LOAD_HINTS if _needed(metrics, *arguments, mistake=n) == got]
        suspects.saw(agreeing, difference_of(got, expected, where))
    suspects.accuse()


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
        wanted = _needed(
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
            (_LOAD_HINTS, ("waiting only", "no kv", "kv of all", "one step", "no tolerance")),
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
        metrics = _random_load(rng, settings["target_per_replica"] * max(1, current))
        metrics["num_replicas_ready"] = float(rng.randint(0, current))
        if rng.random() < 0.15:
            for name in rng.sample(_WHOLE_METRICS, rng.choice((1, 1, 4))):
                del metrics[name]
        full = {**dict.fromkeys(_WHOLE_METRICS, 0.0), **metrics}
        if _is_plain(full, current, *(settings[name] for name in targets)):
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
