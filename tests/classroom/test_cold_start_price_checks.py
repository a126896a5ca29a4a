"""The checks of B4 name the mistake; the saved stopwatch times a real load."""

import pytest

from course_lib.classroom.checks import check
from course_lib.classroom.exercises import b4
from course_lib.classroom.parts import part
from course_lib.data import DEFAULT_MODEL
from course_lib.engine.load_timing import time_loading
from tests.classroom import answers_b4 as answers
from tests.classroom.hints import hint_shown

HINTS = [
    ("B4.1", answers.timer_without_waiting, "may return before the device is done"),
    ("B4.1", answers.timer_waits_before_only, "may return before the device is done"),
    ("B4.1", answers.timer_waits_after_only, "busy with earlier work"),
    ("B4.1", answers.timer_waits_at_the_end, "may return before the device is done"),
    ("B4.1", answers.timer_from_the_beginning, "a start of its own"),
    ("B4.1", answers.timer_of_its_own_clock, "Ask the clock that you were given"),
    ("B4.1", answers.timer_runs_twice, "called once for each"),
    ("B4.1", answers.timer_backwards, "less the clock before it"),
    ("B4.1", answers.timer_total, "Return a dict"),
    ("B4.2", answers.scale_from_the_larger, "Not everything grows"),
    ("B4.2", answers.scale_from_the_smaller, "Not everything grows"),
    ("B4.2", answers.scale_without_fixed_part, "The fixed part is what is left"),
    ("B4.2", answers.scale_from_the_smaller_on, "large_s - per GB x large_gb"),
    ("B4.2", answers.scale_below_zero, "below 0 makes no sense"),
    ("B4.2", answers.scale_cut_off, "the line goes through 0"),
    ("B4.2", answers.scale_faster_with_more, "does not depend on the size"),
    ("B4.2", answers.scale_takes_anything, "Refuse it first"),
    ("B4.2", answers.scale_gib, "Nothing has to be converted"),
    ("B4.3", answers.log_last_line_counts, "add them up"),
    ("B4.3", answers.log_known_phases, "Phases have any name"),
    ("B4.3", answers.log_adds_failed_starts, "`imports` begins a start"),
    ("B4.3", answers.log_counts_failed_starts, "never became ready"),
    ("B4.3", answers.log_first_to_begin, "in which they became ready"),
    ("B4.3", answers.log_whole_seconds, "behind the point counts"),
    ("B4.3", answers.log_sum_as_ready, "in the line `ready seconds"),
    ("B4.3", answers.log_texts, "The pid is a number"),
    ("B4.3", answers.log_phases_alone, "Return [StartUp"),
    ("B4.3", answers.log_last_start_alone, "Each start that became ready"),
    ("B4.4", answers.night_with_a_free_start, "from the moment that it is started"),
    ("B4.4", answers.night_with_a_free_time_out, "paid as well"),
    ("B4.4", answers.night_time_out_from_the_first, "begins the time-out anew"),
    ("B4.4", answers.night_a_start_for_each, "starts none"),
    ("B4.4", answers.night_only_the_first_waits, "wait as well"),
    ("B4.4", answers.night_the_whole_wait, "the rest of the start"),
    ("B4.4", answers.night_time_out_from_the_arrival, "begins at the end of the request"),
    ("B4.4", answers.night_beyond_its_end, "min(leaves, night_s)"),
    ("B4.4", answers.night_leaves_at_the_very_second, "still finds it"),
    ("B4.4", answers.night_per_second, "seconds / 3600"),
    ("B4.4", answers.night_without_the_last, "after the loop"),
]


@pytest.mark.parametrize(("exercise", "answer", "says"), HINTS)
def test_each_known_mistake_has_its_hint(exercise, answer, says):
    for seed in (1, 2, 3):
        assert says in hint_shown(exercise, answer, seed)


def test_the_saved_stopwatch_times_a_load(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_PARTS_DIR", str(tmp_path))
    check("B4.1", answers.timer_by_moments)
    mine = part("load_timer")
    assert mine.__name__ == "timer_by_moments" and (tmp_path / "load_timer.py").exists()
    timing = time_loading(DEFAULT_MODEL, cold=False, timer=mine)
    assert list(timing.seconds)[:2] == ["disk_read", "host_copy"]
    assert all(seconds > 0 for seconds in timing.seconds.values())


def test_the_device_of_the_check_ticks_only_for_work_and_for_waiting():
    device = b4._Device(left_over_s=2.0)
    run = device.phase("copy", 0.5, 4.0)
    run()
    assert device.clock() == 1000.5
    device.synchronize()
    assert device.clock() == 1006.0  # 2 s of earlier work, then 4 of its own
    device.synchronize()
    assert device.clock() == 1006.0
