import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.serving.lifecycle import DrainPolicy


def test_what_fits_the_warning_finishes_and_the_rest_is_retried():
    policy = DrainPolicy(warning_s=120, shutdown_margin_s=20)
    remaining_s = {"status lookup": 12, "refund note": 84, "claims reasoning": 170}
    assert policy.decide(remaining_s) == {
        "status lookup": "finish",
        "refund note": "finish",
        "claims reasoning": "retry",
    }


def test_the_margin_is_kept_for_shutting_down():
    policy = DrainPolicy(120, 20)
    assert policy.decide({"just": 100, "not": 100.1}) == {"just": "finish", "not": "retry"}
    assert DrainPolicy(30, 30).decide({"done": 0, "not": 1}) == {"done": "finish", "not": "retry"}


@given(st.floats(0, 600), st.dictionaries(st.text(), st.floats(0, 1000), max_size=10))
def test_every_request_is_decided_and_none_outlives_the_machine(warning_s, remaining_s):
    decisions = DrainPolicy(warning_s, warning_s / 4).decide(remaining_s)
    assert decisions.keys() == remaining_s.keys()
    for name, decision in decisions.items():
        assert (decision == "finish") == (remaining_s[name] <= warning_s - warning_s / 4)


@pytest.mark.parametrize(
    ("warning_s", "margin_s", "message"),
    [
        (-1, 0, "warning_s must be a number at least 0"),
        (120, -1, "shutdown_margin_s must be a number at least 0"),
        (120, 121, "shutdown_margin_s must be .* at most 120, got 121"),
        (math.nan, 0, "warning_s must be a number"),
        ("120", 0, "warning_s must be a number"),
    ],
)
def test_bad_times_are_refused(warning_s, margin_s, message):
    with pytest.raises(ValueError, match=message):
        DrainPolicy(warning_s, margin_s)


@pytest.mark.parametrize("seconds", [-1, math.nan, True, "12"])
def test_a_bad_remaining_time_is_refused_by_name(seconds):
    with pytest.raises(ValueError, match=r"remaining_s\['refund'\] must be a number at least 0"):
        DrainPolicy(120, 20).decide({"refund": seconds})
