"""The oracle of A4.3: what stands by, moment by moment, and the mistakes often made in it."""

import math
import random
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from course_lib.classroom.checks import Mismatch
from course_lib.classroom.exercises.a3_rule import replicas_of
from course_lib.classroom.exercises.suspects import Clock, Suspects
from course_lib.fleet.cold_start import ColdStart, Duration
from course_lib.fleet.proportional import ProportionalAutoscaler
from course_lib.fleet.router import LeastOutstanding
from course_lib.fleet.simulator import simulate
from course_lib.fleet.spec import FleetSpec, ReplicaSpec
from course_lib.fleet.step_time import RooflineStepTime
from course_lib.sizing.catalog import find_gpu, find_model
from course_lib.traces.generators import concurrent_users

PLAN_HINTS = {
    "now alone": "A replica that starts now serves only in ready_time_s: look at every step from "
    "now until then.",
    "the end alone": "The rush may come and go before now + ready_time_s: the highest of all steps "
    "until then counts, not the last one.",
    "last step left out": "The step in which now + ready_time_s lies counts too: range stops one "
    "before its end.",
    "this step left out": "The step in which now lies counts too.",
    "one step too many": "The last step that counts is the one in which now + ready_time_s lies.",
    "no new day": "After the last step of the forecast the first one follows: index % "
    "len(self.forecast).",
    "mean": "The highest load of those steps counts, not their mean.",
    "sum": "The highest load of those steps counts, not their sum.",
    "current forgotten": "Those that are there serve already: needed - current_replicas stand by.",
    "floor": "A part of a replica needs a whole one: math.ceil.",
    "round": "A part of a replica needs a whole one: math.ceil.",
    "no limits": "Last of all: min(max(standby, self.min_standby), self.max_standby).",
    "no minimum": "Never fewer than self.min_standby, and never fewer than none.",
    "no maximum": "Never more than self.max_standby.",
    "limits too early": "The limits are for what stands by. Subtract current_replicas first.",
    "minimum on top": "self.min_standby is a minimum, not an addition.",
}


def _standby(settings: Mapping[str, Any], now_s: float, current: int, mistake: str = "") -> int:
    """The oracle: walk from the beginning of this step to that of the last, moment by moment."""
    forecast: Sequence[float] = settings["forecast"]
    step_s, ready_s = settings["step_s"], settings["ready_time_s"]
    begin_s = now_s - now_s % step_s
    end_s = now_s + (0.0 if mistake == "now alone" else ready_s)
    if mistake == "this step left out" and begin_s + step_s <= end_s:
        begin_s += step_s
    if mistake == "the end alone":
        begin_s = end_s - end_s % step_s
    if mistake == "last step left out":
        end_s -= end_s % step_s + step_s
    if mistake == "one step too many":
        end_s += step_s
    loads: list[Fraction] = []
    moment_s = begin_s
    day_s = step_s * len(forecast)
    while moment_s <= end_s or not loads:  # one at least, which only mistakes lack
        if mistake == "no new day":
            index = min(int(moment_s / step_s), len(forecast) - 1)
        else:
            index = round((moment_s % day_s) / step_s)
        loads.append(Fraction(forecast[index]))
        moment_s += step_s
    highest = {"mean": sum(loads) / len(loads), "sum": sum(loads)}.get(mistake, max(loads))
    share = highest / Fraction(settings["capacity_per_replica"])
    needed = {"floor": math.floor(share), "round": round(share)}.get(mistake, math.ceil(share))
    fewest, most = settings["min_standby"], settings["max_standby"]
    if mistake == "limits too early":
        return max(0, min(max(needed, fewest), most) - current)
    standby = needed if mistake == "current forgotten" else needed - current
    if mistake == "minimum on top":
        return min(max(standby, 0) + fewest, most)
    if mistake not in ("no limits", "no maximum"):
        standby = min(standby, most)
    if mistake not in ("no limits", "no minimum"):
        standby = max(standby, fewest)
    return standby


def verify_plan(answer: type, rng: random.Random) -> None:
    """Days with a rush, quiet ones and random ones, asked at and between the steps."""
    if not isinstance(answer, type):
        raise Mismatch(f"expected a class, got {answer!r}")
    suspects = Suspects(PLAN_HINTS)
    for number in range(60):
        step_s = rng.choice((60.0, 60.0, 300.0))
        steps = rng.randint(4, 12)
        capacity = rng.choice((0.25, 0.5, 2.0))
        forecast = [capacity * rng.choice((0, 0.5, 1, 2, 2.25, 3.75)) for _ in range(steps)]
        forecast[rng.randrange(steps)] = capacity * rng.choice((7, 8.5, 12))
        fewest = rng.choice((0, 0, 1, 2))
        settings = {
            "forecast": forecast,
            "step_s": step_s,
            "capacity_per_replica": capacity,
            "ready_time_s": rng.choice((0.0, step_s / 2, step_s, 2.5 * step_s, 3 * step_s)),
            "min_standby": fewest,
            "max_standby": fewest + rng.choice((0, 3, 20)),
        }
        _ask(answer, settings, rng, suspects, new_day=bool(number % 2))
    suspects.accuse()
    _run_fleet(answer)


def _ask(
    answer: Any, settings: Mapping[str, Any], rng: random.Random, suspects: Suspects, new_day: bool
) -> None:
    step_s, steps = settings["step_s"], len(settings["forecast"])
    clock = Clock(step_s * (steps - 3 if new_day else 0))
    plan = answer(**settings, clock=clock)
    given = ", ".join(
        f"{name}={value if isinstance(value, list) else f'{value:g}'}"
        for name, value in settings.items()
    )
    for _ in range(12):
        now_s, current = clock.now_s, rng.choice((0, 0, 1, 2, 3, 9))
        expected = _standby(settings, now_s, current)
        theirs = {name: _standby(settings, now_s, current, name) for name in PLAN_HINTS}
        where = f"at {now_s:g} s with {current} current replicas ({given})"
        num_calls = clock.num_calls
        try:
            got = replicas_of(plan.decide(current), where)
        except IndexError as error:
            raise Mismatch(
                f"{where}: it raised IndexError: {error}", PLAN_HINTS["no new day"]
            ) from None
        difference = None
        if got != expected:
            difference = Mismatch(f"{where}: expected {expected} to stand by, got {got}")
            if clock.num_calls == num_calls:
                difference.hint = "Ask self.clock() what time it is: here it is a virtual one."
        suspects.saw([name for name, value in theirs.items() if value == got], difference)
        clock.now_s += rng.choice((15.0, step_s / 2, step_s, step_s + 15))


def _run_fleet(answer: Any) -> None:
    """Twenty users at minute 10, who are forecast; a cold start takes a minute and a half."""
    half, none = Duration(30, 30), Duration(0, 0)
    day = [0.5] * 10 + [5.0] * 2 + [0.5] * 48
    fleet = FleetSpec(
        ReplicaSpec(
            RooflineStepTime(find_model("Llama-3-8B"), find_gpu("A10G_24GB")),
            num_blocks=500, max_model_len=1024, max_num_seqs=4,
        ),
        autoscaler=lambda clock: ProportionalAutoscaler(target_per_replica=4, clock=clock),
        router=LeastOutstanding,
        cold_start=ColdStart(half, half, half, none),
        warm_pool=lambda clock: answer(day, 60, 1, 105, clock=clock),
    )  # fmt: skip
    users = concurrent_users(20, at_s=601, prompt_tokens=(20, 60), output_tokens=(600, 800))
    rows = simulate(users, fleet, until_s=1800).timeline_rows
    before, late = (rows[round(at_s / fleet.scrape_interval_s)] for at_s in (600, 1500))
    found = (before["replicas_standby"], late["replicas_standby"])
    if found != (4, 0):
        raise Mismatch(
            "20 users come to a simulated fleet at minute 10, as was forecast: 5 replicas' load, "
            "for two minutes. Beside the one that was there, 4 should stand by at minute 10 and 0 "
            f"at minute 25; got {found[0]} and {found[1]}",
            "By itself each decision was right. Does it keep something outside of `self`?",
        )
