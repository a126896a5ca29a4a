import math

import numpy as np
import pytest

from course_lib.validation import known_name, number, whole_number


def test_numbers_of_python_and_numpy_come_back_as_pythons():
    assert type(whole_number("n", np.int64(3))) is int
    assert type(number("x", np.float32(0.5), above=0)) is float
    assert number("x", 2, at_least=2, at_most=2) == 2


@pytest.mark.parametrize("value", [True, "3", 3.0, None, 0, -1, 10])
def test_what_is_no_whole_number_within_the_limits_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"slots must be a whole number from 1 to 9, got"):
        whole_number("slots", value, at_most=9)


@pytest.mark.parametrize("value", [True, "1", None, math.nan, math.inf, 10**400, 0, 1.5, 1j])
def test_what_is_no_number_within_the_limits_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"share must be a number above 0 and at most 1, got"):
        number("share", value, above=0, at_most=1)


def test_a_name_is_found_in_any_case_and_an_unknown_one_lists_the_known():
    assert known_name("GPU", "h100", ["L4", "H100"]) == "H100"
    for name in ("H1000", "", None, 4):
        with pytest.raises(ValueError, match=r"unknown GPU .*; known are L4, H100"):
            known_name("GPU", name, ["L4", "H100"])
