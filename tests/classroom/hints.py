"""What a failed check says to the student."""

from typing import Any

import pytest

from course_lib.classroom.checks import CheckFailed, check


def hint_shown(exercise: str, answer: Any, seed: int) -> str:
    """The line with the hint, of which there must be exactly one."""
    with pytest.raises(CheckFailed) as failure:
        check(exercise, answer, seed=seed)
    (shown,) = [line for line in str(failure.value).splitlines() if line.startswith("Hint: ")]
    return shown
