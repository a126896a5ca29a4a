"""The oracle of A3.1: the simple rule, decision by decision, and the mistakes often made in it."""

import math
import random
from collections.abc import Mapping
from typing import Any

from course_lib.classroom.checks import Mismatch
from course_lib.classroom.exercises.suspects import Clock, Suspects
from course_lib.fleet.autoscaler import GPUAutoscalerBase
from course_lib.fleet.metrics import FleetMetrics

_HINTS = {
    "at the limit": "A signal at its limit is not above it: > 10, > 0.85 and > 1500.",
    "no kv": "The KV cache is a signal of its own: up when kv_cache_utilization > 0.85.",
    "no ttft": "TTFT is a signal of its own: up when ttft_p95_ms > 1500.",
    "all signals": "One high signal is enough to go up: `or`, not `and`.",
    "down when idle": "Going down takes all three: nobody waits, few run, and the KV cache is "
    "below 0.20.",
    "below half": "num_requests_running may be equal to max(1, current_replicas // 2): <=.",
    "quiet at the limit": "The KV cache must be below 0.20; at 0.20 it is not quiet.",
    "down first": "Look at the high signals first. TTFT can still be high when the queue is empty.",
    "never down": "When everything is quiet, one replica fewer.",
    "no cooldown": "Within cooldown_s after a change nothing changes: remember self.last_change_s.",
    "cooldown too long": "The cooldown is over when cooldown_s have passed: it holds while now - "
    "last_change_s < cooldown_s.",
    "down only": "In the simple rule the cooldown holds in both directions. (That is its flaw, and "
    "you mend it later.)",
    "up only": "In the simple rule the cooldown holds in both directions.",
    "since a look": "The cooldown counts from the last change, not from the last decision: set "
    "last_change_s only if the number changes.",
    "since a wish": "At a limit nothing changes, so no cooldown begins: compare the final number "
    "with current_replicas before you set last_change_s.",
    "from the start": "Before the first change there is no cooldown: last_change_s is None then.",
    "no limits": "Last of all: min(max(replicas, self.min_replicas), self.max_replicas).",
    "no maximum": "Never more than self.max_replicas.",
    "no minimum": "Never fewer than self.min_replicas.",
    "two at once": "The simple rule moves by one replica at a time.",
}


class _SimpleRule:
    """The rule with the time as an argument, or with one of `_HINTS`' mistakes."""

    def __init__(self, limits: Mapping[str, Any], created_s: float, mistake: str = "") -> None:
        self.limits, self.mistake = limits, mistake
        self.changed_s = created_s if mistake == "from the start" else -math.inf

    def decide(self, metrics: Mapping[str, float], current: int, now_s: float) -> int:
        mistake = self.mistake
        step = self.step(metrics, current)
        wished = step
        passed_s = now_s - self.changed_s
        cooldown_s = self.limits["cooldown_s"]
        held = passed_s <= cooldown_s if mistake == "cooldown too long" else passed_s < cooldown_s
        if (
            mistake == "no cooldown"
            or (mistake == "down only" and step > 0)
            or (mistake == "up only" and step < 0)
        ):
            held = False
        replicas = current if held else current + step
        if mistake not in ("no limits", "no maximum"):
            replicas = min(replicas, self.limits["max_replicas"])
        if mistake not in ("no limits", "no minimum"):
            replicas = max(replicas, self.limits["min_replicas"])
        if (
            replicas != current
            or mistake == "since a look"
            or (mistake == "since a wish" and wished and not held)
        ):
            self.changed_s = now_s
        return replicas

    def step(self, metrics: Mapping[str, float], current: int) -> int:
        mistake = self.mistake
        waiting, running = metrics["num_requests_waiting"], metrics["num_requests_running"]
        cache, ttft_ms = metrics["kv_cache_utilization"], metrics["ttft_p95_ms"]
        high = {"queue": waiting > 10, "kv": cache > 0.85, "ttft": ttft_ms > 1500}
        if mistake == "at the limit":
            high = {"queue": waiting >= 10, "kv": cache >= 0.85, "ttft": ttft_ms >= 1500}
        high.pop(mistake.removeprefix("no "), None)
        few = max(1, current // 2)
        quiet = {
            "queue": waiting == 0,
            "running": running < few if mistake == "below half" else running <= few,
            "kv": cache <= 0.20 if mistake == "quiet at the limit" else cache < 0.20,
        }
        up = all(high.values()) if mistake == "all signals" else any(high.values())
        down = quiet["queue"] if mistake == "down when idle" else all(quiet.values())
        down = down and mistake != "never down"
        size = 2 if mistake == "two at once" else 1
        if mistake == "down first" and down:
            return -1
        return size if up else -size if down else 0


def verify_simple_rule(answer: type[GPUAutoscalerBase], rng: random.Random) -> None:
    """Histories of a fleet that follows, with signals at and around every limit."""
    if not (isinstance(answer, type) and issubclass(answer, GPUAutoscalerBase)):
        raise Mismatch(f"expected a class derived from GPUAutoscalerBase, got {answer!r}")
    suspects = Suspects(_HINTS)
    for history in range(40):
        fewest = rng.choice((1, 1, 2, 3))
        limits = {
            "min_replicas": fewest,
            "max_replicas": fewest + rng.choice((0, 1, 3, 8, 20)),
            "cooldown_s": rng.choice((0, 15, 60, 300)),
        }
        _run(
            answer, limits, rng, suspects, start_s=rng.choice((0.0, 1000.0)), ticks=8 + history % 40
        )
    suspects.accuse()


def _run(
    answer: Any,
    limits: Mapping[str, Any],
    rng: random.Random,
    suspects: Suspects,
    start_s: float,
    ticks: int,
) -> None:
    clock = Clock(start_s)
    scaler, truth = answer(**limits, clock=clock), _SimpleRule(limits, start_s)
    mistaken = {name: _SimpleRule(limits, start_s, name) for name in _HINTS}
    current = rng.randint(limits["min_replicas"], limits["max_replicas"])
    changed_s: float | None = None
    for _ in range(ticks):
        metrics = _signals(rng, current)
        now_s = clock.now_s
        expected = truth.decide(metrics, current, now_s)
        theirs = {n: rule.decide(metrics, current, now_s) for n, rule in mistaken.items()}
        last = "nothing changed yet" if changed_s is None else f"last change at {changed_s:g} s"
        given = ", ".join(f"{name}={value}" for name, value in limits.items())
        where = (
            f"at {now_s - start_s:g} s with {current} replicas ({given}; {last}) and "
            f"{_said(metrics)}"
        )
        num_calls = clock.num_calls
        got = replicas_of(scaler.decide(FleetMetrics(metrics), current), where)
        difference = None
        if got != expected:
            difference = Mismatch(f"{where}: expected {expected} replicas, got {got}")
            if clock.num_calls == num_calls:
                difference.hint = "Ask self.clock() what time it is: here it is a virtual one."
        suspects.saw([name for name, value in theirs.items() if value == got], difference)
        if expected != current:
            changed_s = now_s - start_s
        current = expected
        if rng.random() < 0.08:  # a machine failed, or somebody started one
            current = max(0, current + rng.choice((-1, 1)))
        limit_s = limits["cooldown_s"]
        clock.now_s += rng.choice((15, 15, 30, max(1, limit_s - 15), max(1, limit_s)))


def _signals(rng: random.Random, current: int) -> dict[str, float]:
    """Mostly all calm or all quiet, and one of them at or beyond its limit."""
    few = max(1, current // 2)
    if rng.random() < 0.5:
        metrics = {"waiting": 2.0, "running": 2.0 * few + 3, "cache": 0.5, "ttft": 500.0}
    else:
        metrics = {
            "waiting": 0.0,
            "running": float(rng.choice((0, few, few, few - 1, current // 2))),
            "cache": rng.choice((0.0, 0.1, 0.19)),
            "ttft": rng.choice((0.0, 450.0)),
        }
    if rng.random() < 0.7:
        changed = rng.choice(("waiting", "running", "cache", "ttft"))
        metrics[changed] = rng.choice(
            {
                "waiting": (0.0, 1.0, 10.0, 11.0, 42.0),
                "running": (0.0, float(few), few + 1.0, 8.0),
                "cache": (0.15, 0.2, 0.25, 0.85, 0.86, 0.97),
                "ttft": (900.0, 1500.0, 1501.0, 6000.0),
            }[changed]
        )
    return {
        "num_requests_waiting": metrics["waiting"],
        "num_requests_running": metrics["running"],
        "kv_cache_utilization": metrics["cache"],
        "ttft_p95_ms": metrics["ttft"],
    }


def _said(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in metrics.items())


def replicas_of(decision: Any, where: str) -> int:
    """The number of a decision.

    Raises:
        Mismatch: it is no decision, or gives no reason.
    """
    replicas, reason = getattr(decision, "replicas", None), getattr(decision, "reason", None)
    if not isinstance(replicas, int) or isinstance(replicas, bool):
        raise Mismatch(
            f"{where}: decide returned {decision!r}",
            "Return ScalingDecision(replicas, reason), with a whole number of replicas.",
        )
    if not isinstance(reason, str) or not reason:
        raise Mismatch(
            f"{where}: the decision has the reason {reason!r}",
            "Say why, in a few words: whoever is woken at night reads the reason.",
        )
    return replicas
