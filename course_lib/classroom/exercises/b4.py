"""Exercises of notebook B4, the price of a cold start: a stopwatch, a scale, a log and a night.

The oracle of the stopwatch is here: a device that is only made up, whose clock ticks when somebody
works or waits. Those of the others are in `b4_scale`, `b4_log` and `b4_night`.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from course_lib.classroom.checks import Exercise, Mismatch, compare
from course_lib.classroom.exercises.b4_log import verify_startup_log
from course_lib.classroom.exercises.b4_night import verify_quiet_night
from course_lib.classroom.exercises.b4_scale import verify_scale_loading


class _Device:
    """Work is handed over in `handing_s` and done `working_s` later, unless the call waits for it.

    The clock ticks only when somebody works or waits for the device.
    """

    def __init__(self, left_over_s: float) -> None:
        self.now_s, self.busy_until_s = 1000.0, 1000.0 + left_over_s
        self.calls: list[str] = []

    def clock(self) -> float:
        """Seconds."""
        return self.now_s

    def synchronize(self) -> None:
        """Wait until the device has nothing to do."""
        self.calls.append("synchronize")
        self.now_s = max(self.now_s, self.busy_until_s)

    def phase(self, name: str, handing_s: float, working_s: float) -> Callable[[], None]:
        """What hands work over."""

        def run() -> None:
            self.calls.append(name)
            self.now_s += handing_s
            if working_s:
                self.busy_until_s = max(self.now_s, self.busy_until_s) + working_s

        return run


_NAMES = ("disk_read", "unpack", "host_copy", "device_copy", "kv_cache", "graphs", "warm_up")


def verify_time_phases(answer: Callable[..., Any], rng: random.Random) -> None:
    """Loads of one to six phases, some of which go on after the call has returned."""
    for _ in range(60):
        names = [name for name in _NAMES if rng.random() < 0.7] or ["warm_up"]
        left_over_s = rng.choice((0.0, 0.0, 7.5))
        times = {
            n: (rng.randint(1, 40) / 8, rng.choice((0, 0, rng.randint(1, 80) / 8))) for n in names
        }
        device = _Device(left_over_s)
        phases = {name: device.phase(name, *times[name]) for name in names}
        spelled = ", ".join(
            f"{name} returns after {handing:g} s"
            + (f" and is done {working:g} s later" * (working > 0))
            for name, (handing, working) in times.items()
        )
        where = f"time_phases of a load in which {spelled}"
        if left_over_s:
            where += f"; the device has {left_over_s:g} s of earlier work to do"
        got = answer(phases, device.synchronize, device.clock)
        ran = [name for name in device.calls if name != "synchronize"]
        if ran != names:
            raise Mismatch(
                f"{where}: the phases {ran} were called; expected {names}, each once and in order",
                "for name, run in phases.items(): run() is called once for each.",
            )
        expected = {name: handing + working for name, (handing, working) in times.items()}
        try:
            compare(got, expected, where)
        except Mismatch as difference:
            raise Mismatch(str(difference), _stopwatch_hint(got, times, left_over_s)) from None


def _stopwatch_hint(
    got: Any, times: Mapping[str, tuple[float, float]], left_over_s: float
) -> str | None:
    if not isinstance(got, Mapping) or list(got) != list(times):
        return "Return a dict with the seconds of each phase, under its name and in order."
    try:
        seconds = [float(value) for value in got.values()]
    except (TypeError, ValueError):
        return "The values of the dict are numbers of seconds."
    expected = [handing + working for handing, working in times.values()]
    if left_over_s and seconds[1:] == expected[1:] and seconds[0] > expected[0]:
        return "The device may still be busy with earlier work: synchronize before the clock too."
    if seconds == [handing for handing, _ in times.values()]:
        return "A call may return before the device is done: synchronize, then read the clock."
    if all(abs(value) < 0.05 for value in seconds):
        return "Ask the clock that you were given: clock(), not time.perf_counter()."
    if all(math.isclose(a, b) for a, b in zip(seconds, _running_sum(expected), strict=True)):
        return "Each phase has a start of its own: read the clock again before each."
    if all(math.isclose(-a, b) for a, b in zip(seconds, expected, strict=True)):
        return "Seconds are the clock after the phase less the clock before it."
    return None


def _running_sum(values: Sequence[float]) -> list[float]:
    return [sum(values[: index + 1]) for index in range(len(values))]


EXERCISES = (
    Exercise(
        id="B4.1",
        title="a stopwatch for phases",
        points=2,
        verify=verify_time_phases,
        reference="course_lib.engine.load_timing:time_phases",
        hints=(
            "A copy to a GPU returns at once and goes on in the background. When do you know that "
            "it is over, and when that nothing older is still going on?",
            "For each phase: synchronize(), read clock(), run(), synchronize(), read clock() "
            "again. The difference goes into a dict under the phase's name.",
        ),
        part="load_timer",
    ),
    Exercise(
        id="B4.2",
        title="from two sizes to any other",
        points=2,
        verify=verify_scale_loading,
        reference="course_lib.engine.load_timing:scale_loading",
        hints=(
            "Two measurements are two points, and through two points goes one line: seconds over "
            "GB. Its slope is seconds per GB, and where it meets 0 GB is the fixed part.",
            "per_gb = (large_s - small_s) / (large_gb - small_gb); fixed = large_s - per_gb * "
            "large_gb; the answer is fixed + per_gb * weights_gb, for each phase.",
            "Two cases beside that: per_gb <= 0 gives large_s, and fixed < 0 gives large_s / "
            "large_gb * weights_gb. Raise the ValueErrors before all that.",
        ),
    ),
    Exercise(
        id="B4.3",
        title="reading a startup log",
        points=3,
        verify=verify_startup_log,
        reference="course_lib.engine.startup:parse_startup_log",
        hints=(
            "Go through the lines, and keep what each process has logged so far in a dict by pid. "
            "A line with `ready` makes a StartUp of it.",
            r're.match(r"^\S+ \S+ INFO startup pid=(\d+) phase=(\S+) seconds=([\d.]+)$", line) '
            "gives the pieces of a line as found[1], found[2], found[3], or None.",
            "`imports` empties what the process has so far. A phase adds its seconds: "
            "phases[name] = phases.get(name, 0.0) + seconds. `ready` takes the phases out with "
            "pop, so that the next start with that pid begins with none.",
        ),
    ),
    Exercise(
        id="B4.4",
        title="the price of a quiet night",
        points=3,
        verify=verify_quiet_night,
        reference="course_lib.sizing.night:quiet_night",
        hints=(
            "Go through the arrivals and remember three moments of the replica that was there "
            "last: when it was started, when it is ready, when it leaves.",
            "Starts a new one: there is none yet, or arrival > leaves. Then the one before is paid "
            "from its start until it left.",
            "served = max(arrival, ready); waited += served - arrival; leaves = served + busy_s + "
            "idle_timeout_s. After the loop: the last one is paid until min(leaves, night_s).",
        ),
    ),
)
