"""Made-up logs are known and have every trouble; recorded ones are there and can be read."""

import random
import re

import pytest

from course_lib.classroom.startup_logs import STARTUP_LOGS, make_log, recorded_log
from course_lib.engine.startup import parse_startup_log
from course_lib.measurements import load_measurements


@pytest.mark.parametrize("same_pid", [False, True])
def test_what_is_said_to_be_in_a_log_is_in_it(same_pid):
    for seed in range(60):
        log = make_log(random.Random(seed), starts=5, same_pid=same_pid)
        found = parse_startup_log(log.text)
        assert [(s.pid, list(s.phases), s.ready_s) for s in found] == [
            (s.pid, list(s.phases), s.ready_s) for s in log.starts
        ]
        for have, want in zip(found, log.starts, strict=True):
            assert have.phases == pytest.approx(want.phases)
            assert have.other_s > 0


def test_the_same_seed_gives_the_same_log():
    one, other = (make_log(random.Random(4), starts=3) for _ in range(2))
    assert one == other and one != make_log(random.Random(5), starts=3)


def test_a_log_has_all_that_the_exercise_warns_of():
    text = "".join(make_log(random.Random(seed), starts=6).text for seed in range(5))
    pids = re.findall(r"INFO startup pid=(\d+) phase=imports", text)
    assert len(pids) > len(re.findall(r"ready seconds", text)) == 30  # some fail
    assert re.search(r"phase=weights seconds=\S+\n(?:.*\n)*?.*phase=weights", text)
    assert "was not enough" in text and "phase=drain" in text and "tenant" in text


def test_lines_are_in_the_order_of_time():
    log = make_log(random.Random(1), starts=6)
    times = [line[:23] for line in log.text.splitlines()]
    assert times == sorted(times)


def test_the_recorded_log_has_the_starts_that_its_measurement_tells_of():
    rows = [
        row
        for measurement in load_measurements("cold_start")
        for row in measurement.rows
        if row["part"] == "starts"
    ]
    assert rows
    for row in rows:
        starts = parse_startup_log(recorded_log(row["log"]))
        assert len(starts) == row["starts"] >= 20
        for start in starts:
            assert {"imports", "weights", "warm_up"} <= set(start.phases)
            assert 0 <= start.other_s < start.ready_s


def test_a_log_that_is_not_there_is_answered_with_those_that_are():
    names = ", ".join(sorted(path.name for path in STARTUP_LOGS.glob("*.log")))
    with pytest.raises(ValueError, match=re.escape(names)):
        recorded_log("nothing.log")
