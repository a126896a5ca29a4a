"""Answers to the exercises of B4: right ones in several styles, and wrong ones of typical kinds."""

import re
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

from course_lib.engine.startup import StartUp
from course_lib.sizing.night import NightCost

# B4.1


def timer_straight(phases, synchronize, clock=time.perf_counter):
    """Right: a loop."""
    times = {}
    for name, run in phases.items():
        synchronize()
        before = clock()
        run()
        synchronize()
        after = clock()
        times[name] = after - before
    return times


def timer_plain(phases, synchronize, clock=time.perf_counter):
    """Right: as most would write it."""
    seconds = {}
    for name, run in phases.items():
        synchronize()
        start = clock()
        run()
        synchronize()
        seconds[name] = clock() - start
    return seconds


def timer_by_moments(phases, synchronize, clock=time.perf_counter):
    """Right: one moment between any two phases, since the end of one is the start of the next."""

    def now():
        synchronize()
        return clock()

    moments = [now()]
    for run in phases.values():
        run()
        moments.append(now())
    lengths = [end - start for start, end in pairwise(moments)]
    return dict(zip(phases, lengths, strict=True))


def timer_without_waiting(phases, synchronize, clock=time.perf_counter):
    times = {}
    for name, run in phases.items():
        start = clock()
        run()
        times[name] = clock() - start
    return times


def timer_waits_before_only(phases, synchronize, clock=time.perf_counter):
    times = {}
    for name, run in phases.items():
        synchronize()
        start = clock()
        run()
        times[name] = clock() - start
    return times


def timer_waits_after_only(phases, synchronize, clock=time.perf_counter):
    times = {}
    for name, run in phases.items():
        start = clock()
        run()
        synchronize()
        times[name] = clock() - start
    return times


def timer_waits_at_the_end(phases, synchronize, clock=time.perf_counter):
    times = {}
    synchronize()
    for name, run in phases.items():
        start = clock()
        run()
        times[name] = clock() - start
    synchronize()
    return times


def timer_from_the_beginning(phases, synchronize, clock=time.perf_counter):
    times = {}
    synchronize()
    start = clock()
    for name, run in phases.items():
        run()
        synchronize()
        times[name] = clock() - start
    return times


def timer_of_its_own_clock(phases, synchronize, clock=time.perf_counter):
    return timer_straight(phases, synchronize, time.perf_counter)


def timer_runs_twice(phases, synchronize, clock=time.perf_counter):
    for run in phases.values():
        run()
    return timer_straight(phases, synchronize, clock)


def timer_backwards(phases, synchronize, clock=time.perf_counter):
    return {name: -took for name, took in timer_straight(phases, synchronize, clock).items()}


def timer_of_known_phases(phases, synchronize, clock=time.perf_counter):
    known = ("disk_read", "host_copy", "device_copy", "warm_up")
    some = {name: phases[name] for name in known if name in phases}
    return timer_straight(some, synchronize, clock)


def timer_total(phases, synchronize, clock=time.perf_counter):
    return sum(timer_straight(phases, synchronize, clock).values())


# B4.2


def scale_straight(small_gb, small_s, large_gb, large_s, weights_gb):
    """Right: as the text has it."""
    if large_gb <= small_gb:
        raise ValueError("large_gb must be more than small_gb")
    if small_s.keys() != large_s.keys():
        raise ValueError("the phases differ")
    result = {}
    for name in large_s:
        per_gb = (large_s[name] - small_s[name]) / (large_gb - small_gb)
        fixed = large_s[name] - per_gb * large_gb
        if per_gb <= 0:
            result[name] = large_s[name]
        elif fixed < 0:
            result[name] = large_s[name] / large_gb * weights_gb
        else:
            result[name] = fixed + per_gb * weights_gb
    return result


def scale_between_points(small_gb, small_s, large_gb, large_s, weights_gb):
    """Right: the point beyond the two, with both cases met by moving the smaller one."""
    if small_gb >= large_gb or set(small_s) != set(large_s):
        raise ValueError(f"these two do not go together: {small_s} and {large_s}")

    def one(low, high):
        low = min(low, high)  # no slower with more: then it does not depend on the size
        if low == high:
            return high
        low = max(low, high * small_gb / large_gb)  # the line meets 0 GB at 0 s or above
        share = (weights_gb - small_gb) / (large_gb - small_gb)
        return low + share * (high - low)

    return {name: one(small_s[name], large_s[name]) for name in sorted(large_s)}


def _scale(large_s, small_s, one):
    if set(small_s) != set(large_s):
        raise ValueError("the phases differ")
    return {name: one(small_s[name], large_s[name]) for name in large_s}


def scale_from_the_larger(small_gb, small_s, large_gb, large_s, weights_gb):
    return _scale(large_s, small_s, lambda low, high: high / large_gb * weights_gb)


def scale_from_the_smaller(small_gb, small_s, large_gb, large_s, weights_gb):
    return _scale(large_s, small_s, lambda low, high: low / small_gb * weights_gb)


def scale_without_fixed_part(small_gb, small_s, large_gb, large_s, weights_gb):
    return _scale(
        large_s, small_s, lambda low, high: (high - low) / (large_gb - small_gb) * weights_gb
    )


def scale_from_the_smaller_on(small_gb, small_s, large_gb, large_s, weights_gb):
    return _scale(
        large_s, small_s, lambda low, high: low + (high - low) / (large_gb - small_gb) * weights_gb
    )


def scale_below_zero(small_gb, small_s, large_gb, large_s, weights_gb):
    def one(low, high):
        per_gb = (high - low) / (large_gb - small_gb)
        return high if per_gb <= 0 else high + per_gb * (weights_gb - large_gb)

    return _scale(large_s, small_s, one)


def scale_cut_off(small_gb, small_s, large_gb, large_s, weights_gb):
    def one(low, high):
        per_gb = (high - low) / (large_gb - small_gb)
        return high if per_gb <= 0 else max(0, high - per_gb * large_gb) + per_gb * weights_gb

    return _scale(large_s, small_s, one)


def scale_faster_with_more(small_gb, small_s, large_gb, large_s, weights_gb):
    def one(low, high):
        per_gb = (high - low) / (large_gb - small_gb)
        fixed = high - per_gb * large_gb
        return high / large_gb * weights_gb if fixed < 0 else fixed + per_gb * weights_gb

    return _scale(large_s, small_s, one)


def scale_takes_anything(small_gb, small_s, large_gb, large_s, weights_gb):
    if large_gb <= small_gb:
        small_gb = large_gb / 2
    both = small_s.keys() & large_s.keys()
    small_s, large_s = ({name: s[name] for name in both} for s in (small_s, large_s))
    return scale_straight(small_gb, small_s, large_gb, large_s, weights_gb)


def scale_gib(small_gb, small_s, large_gb, large_s, weights_gb):
    return scale_straight(small_gb, small_s, large_gb, large_s, weights_gb * 1e9 / 2**30)


def scale_total(small_gb, small_s, large_gb, large_s, weights_gb):
    return sum(scale_straight(small_gb, small_s, large_gb, large_s, weights_gb).values())


# B4.3

_PHASE = re.compile(r"^\S+ \S+ INFO startup pid=(\d+) phase=(\S+) seconds=([\d.]+)$")
_READY = re.compile(r"^\S+ \S+ INFO startup pid=(\d+) ready seconds=([\d.]+)$")


def log_by_patterns(text):
    """Right: two patterns."""
    of_process = {}
    result = []
    for line in text.splitlines():
        if found := _PHASE.match(line):
            pid, name, seconds = int(found[1]), found[2], float(found[3])
            if name == "imports":
                of_process[pid] = {}
            phases = of_process.setdefault(pid, {})
            phases[name] = phases.get(name, 0.0) + seconds
        elif found := _READY.match(line):
            pid = int(found[1])
            result.append(StartUp(pid, of_process.pop(pid, {}), float(found[2])))
    return result


@dataclass
class MyStart:
    pid: int
    phases: dict
    ready_s: float


def log_by_words(text):
    """Right: without patterns, and with a dataclass of its own."""
    begun = defaultdict(lambda: defaultdict(float))
    starts = []
    for line in text.split("\n"):
        words = line.split()
        if words[2:4] != ["INFO", "startup"] or len(words) != 7:
            continue
        pid, what, seconds = (word.rpartition("=")[2] for word in words[4:])
        if words[5] == "ready":
            starts.append(MyStart(int(pid), dict(begun.pop(pid)), float(seconds)))
            continue
        if what == "imports":
            begun[pid].clear()
        begun[pid][what] += float(seconds)
    return starts


def _log(text, *, keep=lambda name: True, begins=("imports",), add=True, ended=True, by_pid=True):
    """The right one with something changed."""
    of_process, result = {}, []
    for line in text.splitlines():
        if found := _PHASE.match(line):
            pid, name, seconds = int(found[1]), found[2], float(found[3])
            key = pid if by_pid else 0
            if name in begins:
                of_process[key] = {}
            phases = of_process.setdefault(key, {})
            if keep(name):
                phases[name] = phases.get(name, 0.0) + seconds if add else seconds
        elif found := _READY.match(line):
            key = int(found[1]) if by_pid else 0
            phases = of_process.pop(key, {}) if ended else of_process.get(key, {})
            result.append(StartUp(int(found[1]), phases, float(found[2])))
    return result, of_process


def log_last_line_counts(text):
    return _log(text, add=False)[0]


def log_known_phases(text):
    return _log(text, keep=lambda name: name in ("imports", "weights", "warm_up"))[0]


def log_mixes_processes(text):
    return _log(text, by_pid=False)[0]


def log_adds_failed_starts(text):
    return _log(text, begins=())[0]


def log_counts_failed_starts(text):
    ready, of_process = _log(text)
    return ready + [StartUp(pid, phases, 0.0) for pid, phases in of_process.items()]


def log_first_to_begin(text):
    begun = [int(m[1]) for m in map(_PHASE.match, text.splitlines()) if m and m[2] == "imports"]
    return sorted(_log(text)[0], key=lambda start: begun.index(start.pid))


def log_any_line(text):
    phase = re.compile(r"pid=(\d+) phase=(\S+) seconds=([\d.]+)")
    of_process, result = {}, []
    for line in text.splitlines():
        if found := phase.search(line):
            if found[2] == "imports":
                of_process[int(found[1])] = {}
            phases = of_process.setdefault(int(found[1]), {})
            phases[found[2]] = phases.get(found[2], 0.0) + float(found[3])
        elif found := re.search(r"pid=(\d+) ready seconds=([\d.]+)", line):
            result.append(StartUp(int(found[1]), of_process.pop(int(found[1])), float(found[2])))
    return result


def log_whole_seconds(text):
    return [
        StartUp(s.pid, {name: int(took) for name, took in s.phases.items()}, s.ready_s)
        for s in _log(text)[0]
    ]


def log_sum_as_ready(text):
    return [StartUp(s.pid, s.phases, sum(s.phases.values())) for s in _log(text)[0]]


def log_texts(text):
    return [StartUp(str(s.pid), s.phases, s.ready_s) for s in _log(text)[0]]


def log_phases_alone(text):
    return [start.phases for start in _log(text)[0]]


def log_last_start_alone(text):
    return _log(text)[0][-1:]


# B4.4


def night_straight(arrivals_s, night_s, cold_start_s, busy_s, idle_timeout_s, usd_per_hour):
    """Right: one pass."""
    starts, billed, waited = 0, 0, 0
    began = ready = leaves = None
    for arrival in arrivals_s:
        if leaves is None or arrival > leaves:
            if leaves is not None:
                billed += leaves - began
            starts += 1
            began, ready = arrival, arrival + cold_start_s
        served = max(arrival, ready)
        waited += served - arrival
        leaves = served + busy_s + idle_timeout_s
    if leaves is not None:
        billed += min(leaves, night_s) - began
    return NightCost(starts, billed, billed / 3600 * usd_per_hour, waited)


@dataclass
class MyNight:
    waited_s: float
    usd: float
    billed_s: float
    cold_starts: int


def night_in_groups(arrivals_s, night_s, cold_start_s, busy_s, idle_timeout_s, usd_per_hour):
    """Right: first who shares a replica, then what each replica costs."""
    groups = []
    for arrival in arrivals_s:
        if groups:
            last = groups[-1]
            served = max(last[-1], last[0] + cold_start_s)
            if arrival <= served + busy_s + idle_timeout_s:
                last.append(arrival)
                continue
        groups.append([arrival])
    billed = waited = 0.0
    for group in groups:
        ready = group[0] + cold_start_s
        leaves = max(group[-1], ready) + busy_s + idle_timeout_s
        billed += min(leaves, night_s) - group[0]
        waited += sum(max(0.0, ready - arrival) for arrival in group)
    return MyNight(waited, usd_per_hour * billed / 3600, billed, len(groups))


def _night(
    given, *, boundary=False, clip=True, pay_start=True, pay_idle=True, renew=True, share=True,
    all_wait=True, last=True, per_hour=3600, whole_wait=False, idle_from_arrival=False,
):  # fmt: skip
    """The right one with something changed."""
    arrivals, night_s, cold, busy, idle, usd = given
    starts = billed = waited = 0
    began = ready = leaves = None

    def pay(until):
        until = min(until, night_s) if clip else until
        paid_from = began if pay_start else min(ready, until)
        paid_to = until if pay_idle else max(paid_from, min(until, leaves - idle))
        return paid_to - paid_from

    for arrival in arrivals:
        gone = leaves is None or (arrival >= leaves if boundary else arrival > leaves)
        if gone or not share:
            if leaves is not None:
                billed += pay(leaves if gone else arrival)
            starts += 1
            began, ready = arrival, arrival + cold
        served = max(arrival, ready)
        if all_wait or gone:
            waited += cold if whole_wait and served > arrival else served - arrival
        if gone or renew:
            leaves = served + busy + idle
        if idle_from_arrival:
            leaves = max(arrival + busy + idle, ready)
    if leaves is not None and last:
        billed += pay(leaves)
    return NightCost(starts, billed, billed / per_hour * usd, waited)


def night_with_a_free_start(*given, **named):
    return _night(_given(given, named), pay_start=False)


def night_with_a_free_time_out(*given, **named):
    return _night(_given(given, named), pay_idle=False)


def night_time_out_from_the_first(*given, **named):
    return _night(_given(given, named), renew=False)


def night_a_start_for_each(*given, **named):
    return _night(_given(given, named), share=False)


def night_only_the_first_waits(*given, **named):
    return _night(_given(given, named), all_wait=False)


def night_the_whole_wait(*given, **named):
    return _night(_given(given, named), whole_wait=True)


def night_time_out_from_the_arrival(*given, **named):
    return _night(_given(given, named), idle_from_arrival=True)


def night_beyond_its_end(*given, **named):
    return _night(_given(given, named), clip=False)


def night_leaves_at_the_very_second(*given, **named):
    return _night(_given(given, named), boundary=True)


def night_per_second(*given, **named):
    return _night(_given(given, named), per_hour=1)


def night_without_the_last(*given, **named):
    return _night(_given(given, named), last=False)


def night_with_nobody_fails(arrivals_s, *given, **named):
    assert arrivals_s[0] >= 0
    return night_straight(arrivals_s, *given, **named)


def night_usd_alone(*given, **named):
    return night_straight(*given, **named).usd


def _given(given, named):
    return (*given, *named.values())


RIGHT = {
    "B4.1": [timer_straight, timer_by_moments, timer_plain],
    "B4.2": [scale_straight, scale_between_points],
    "B4.3": [log_by_patterns, log_by_words],
    "B4.4": [night_straight, night_in_groups],
}
WRONG = {
    "B4.1": [
        timer_without_waiting,
        timer_waits_before_only,
        timer_waits_after_only,
        timer_waits_at_the_end,
        timer_from_the_beginning,
        timer_of_its_own_clock,
        timer_runs_twice,
        timer_backwards,
        timer_of_known_phases,
        timer_total,
    ],
    "B4.2": [
        scale_from_the_larger,
        scale_from_the_smaller,
        scale_without_fixed_part,
        scale_from_the_smaller_on,
        scale_below_zero,
        scale_cut_off,
        scale_faster_with_more,
        scale_takes_anything,
        scale_gib,
        scale_total,
    ],
    "B4.3": [
        log_last_line_counts,
        log_known_phases,
        log_mixes_processes,
        log_adds_failed_starts,
        log_counts_failed_starts,
        log_first_to_begin,
        log_any_line,
        log_whole_seconds,
        log_sum_as_ready,
        log_texts,
        log_phases_alone,
        log_last_start_alone,
    ],
    "B4.4": [
        night_with_a_free_start,
        night_with_a_free_time_out,
        night_time_out_from_the_first,
        night_a_start_for_each,
        night_only_the_first_waits,
        night_the_whole_wait,
        night_time_out_from_the_arrival,
        night_beyond_its_end,
        night_leaves_at_the_very_second,
        night_per_second,
        night_without_the_last,
        night_with_nobody_fails,
        night_usd_alone,
    ],
}
