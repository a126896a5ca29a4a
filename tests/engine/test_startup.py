"""The log lines of a start, as the engine writes them and as they are read again."""

import logging
import time

import pytest

from course_lib import LLM
from course_lib.data import DEFAULT_MODEL
from course_lib.engine.startup import (
    StartUp,
    log_ready,
    parse_startup_log,
    phase,
    process_age_s,
)


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="course_lib")
    caplog.handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
    )
    return caplog


def test_the_engine_logs_its_phases_in_order(log):
    LLM(DEFAULT_MODEL, num_gpu_blocks_override=600)
    log_ready()
    (start,) = parse_startup_log(log.text)
    assert list(start.phases)[:4] == ["checkpoint", "tokenizer", "weights", "kv_cache"]
    assert all(seconds >= 0 for seconds in start.phases.values())
    assert start.ready_s > sum(start.phases.values())


def test_a_phase_that_fails_is_not_logged(log):
    with pytest.raises(RuntimeError), phase("weights"):
        raise RuntimeError
    assert log.text == ""


def test_the_age_of_a_process_grows_with_time():
    before = process_age_s()
    time.sleep(0.05)
    assert 0.04 < process_age_s() - before < 30


def test_starts_are_told_apart_by_process_and_come_in_the_order_of_being_ready():
    text = """\
2026-11-25 09:00:00.000 INFO startup pid=7 phase=imports seconds=2.500
2026-11-25 09:00:00.100 INFO startup pid=8 phase=imports seconds=1.000
2026-11-25 09:00:01.000 INFO startup pid=8 phase=weights seconds=0.500
2026-11-25 09:00:01.100 WARNING startup pid=8 phase=weights seconds=9.000
2026-11-25 09:00:01.200 INFO request 8: startup pid=7 phase=weights seconds=9.000
2026-11-25 09:00:02.000 INFO startup pid=8 phase=weights seconds=0.250
2026-11-25 09:00:02.500 INFO startup pid=8 ready seconds=2.000
2026-11-25 09:00:03.000 INFO startup pid=9 phase=imports seconds=1.000
2026-11-25 09:00:04.500 INFO startup pid=7 ready seconds=4.500
"""
    first, second = parse_startup_log(text)
    assert first == StartUp(8, {"imports": 1.0, "weights": 0.75}, 2.0)
    assert second == StartUp(7, {"imports": 2.5}, 4.5)
    assert first.other_s == pytest.approx(0.25) and second.other_s == pytest.approx(2.0)


def test_a_process_number_that_comes_again_is_another_start_and_a_failed_one_is_none():
    text = """\
2026-11-25 09:00:00.000 INFO startup pid=1 phase=imports seconds=2.500
2026-11-25 09:00:02.500 INFO startup pid=1 ready seconds=3.000
2026-11-25 09:30:00.000 INFO startup pid=1 phase=imports seconds=1.700
2026-11-25 09:30:09.000 INFO startup pid=1 phase=weights seconds=8.000
2026-11-25 10:00:00.000 INFO startup pid=1 phase=imports seconds=1.500
2026-11-25 10:00:02.500 INFO startup pid=1 ready seconds=2.000
"""
    assert [start.phases for start in parse_startup_log(text)] == [
        {"imports": 2.5},
        {"imports": 1.5},
    ]


def test_where_the_system_does_not_say_how_old_a_process_is_it_counts_from_the_import(monkeypatch):
    def nothing(*_, **__):
        raise OSError("no such file")

    monkeypatch.setattr("builtins.open", nothing)
    assert process_age_s() > 0
