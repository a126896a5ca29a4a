"""Checks of exercises: is it solved, is it right, is it the student's own?

    check("A1.2", MyScheduler)

compares with an independent oracle on fresh inputs. Right: the points, and a part is saved so that
later labs run on it. Wrong: `CheckFailed`, which names the first difference and gives a hint. Not
implemented: a sentence, no points, and the notebook goes on. `hint` and `reference` help further.
"""

import importlib
import random
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

import numpy as np
from IPython import get_ipython
from IPython.display import display
from matplotlib.figure import Figure

from course_lib.classroom.ownership import NotYourOwn, check_is_own, reference_blocked
from course_lib.classroom.parts import is_own, load_file, load_object, save_part
from course_lib.classroom.points import note_points
from course_lib.classroom.source import program_of

TIME_LIMIT_S = 60


class Mismatch(Exception):
    """Raised by an oracle: where the answer first differs.

    Args:
        message: says so.
        hint: that fits.
        picture: draws it, where a picture says it better.
    """

    def __init__(
        self, message: str, hint: str | None = None, picture: Callable[[], Figure] | None = None
    ) -> None:
        super().__init__(message)
        self.hint = hint
        self.picture = picture


class NoAnswer(Exception):
    """Nothing more will come from the answer, say because it ran out of time."""


class CheckFailed(AssertionError):
    """A wrong answer. In a notebook it shows its message and no traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"CheckFailed: {self}"]


@dataclass(frozen=True)
class Exercise:
    """One graded exercise.

    Args:
        id: lab, notebook and number, such as "A1.2".
        title: what is built, in a few words.
        points: for a right answer.
        verify: the oracle; takes the answer and a random generator, raises `Mismatch`.
        reference: "module:name" of the course's own version.
        hints: from a nudge to nearly everything.
        part: name of the engine part that the answer is, if it is one.
        off_limits: "module:name" of what else would be no answer of one's own.
    """

    id: str
    title: str
    points: int
    verify: Callable[[Any, random.Random], None]
    reference: str
    hints: tuple[str, ...]
    part: str | None = None
    off_limits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What an oracle found.

    Args:
        outcome: full points for "passed", none for the others.
        message: for the student; empty if there is nothing to mend.
        error: that the answer raised.
        picture: draws the first difference.
    """

    outcome: Literal["passed", "unsolved", "wrong", "not your own"]
    message: str = ""
    error: BaseException | None = None
    picture: Callable[[], Figure] | None = None


def find_exercise(exercise_id: str) -> Exercise:
    """The exercise of that id.

    Raises:
        ValueError: there is none; the message lists those of the notebook.
    """
    notebook = exercise_id.split(".")[0].lower()
    try:
        module = importlib.import_module(f"course_lib.classroom.exercises.{notebook}")
    except ModuleNotFoundError:
        raise ValueError(f"there is no notebook {notebook.upper()!r} with exercises") from None
    for exercise in module.EXERCISES:
        if exercise.id == exercise_id:
            return exercise
    known = ", ".join(exercise.id for exercise in module.EXERCISES)
    raise ValueError(f"there is no exercise {exercise_id!r}; this notebook has {known}")


def check(exercise_id: str, answer: Any, *, seed: int | None = None) -> float:
    """Check an answer.

    Args:
        exercise_id: such as "A1.2".
        answer: the function or class that was written.
        seed: of the inputs; fresh ones if absent.

    Returns:
        Points: all of them, or 0 if it is not implemented yet. The last value of a test cell, it
        is what nbgrader reads as the cell's credit.

    Raises:
        CheckFailed: the answer is wrong, or is not the student's own.
    """
    exercise = find_exercise(exercise_id)
    seed = random.SystemRandom().getrandbits(32) if seed is None else seed
    with _time_limit(TIME_LIMIT_S):
        verdict = assess(exercise, answer, seed)
    if verdict.outcome == "unsolved":
        print(f"Exercise {exercise.id} is not implemented yet. 0 of {exercise.points} points.")
        if exercise.part:
            print(f"The notebook goes on with {_whose(exercise.part)} {exercise.part}.")
        return 0.0
    if verdict.outcome != "passed":
        if verdict.picture is not None and get_ipython() is not None:
            with suppress(Exception):  # drawn from what came back, whatever that is
                display(verdict.picture())
        raise CheckFailed(verdict.message) from verdict.error
    print(f"Exercise {exercise.id} passed. {exercise.points} of {exercise.points} points.")
    note_points(exercise.id, exercise.points)
    if exercise.part:
        _save(exercise, answer)
    return float(exercise.points)


def assess(exercise: Exercise, answer: Any, seed: int) -> Verdict:
    """Put the oracle's questions to an answer."""
    try:
        with ExitStack() as blocked:
            for reference in (exercise.reference, *exercise.off_limits):
                check_is_own(answer, reference)
                blocked.enter_context(reference_blocked(reference))
            exercise.verify(answer, random.Random(seed))
    except NotImplementedError:
        return Verdict("unsolved")
    except NotYourOwn as error:
        return Verdict("not your own", f"Exercise {exercise.id}: {error}")
    except Mismatch as error:
        message = _failure(exercise, str(error), error.hint, seed)
        return Verdict("wrong", message, picture=error.picture)
    except (Exception, SystemExit) as error:
        return Verdict("wrong", _failure(exercise, _describe(error), None, seed), error)
    return Verdict("passed")


def _save(exercise: Exercise, answer: Any) -> None:
    """Keep a part that has passed. Whatever goes wrong with that costs no points."""
    assert exercise.part is not None
    try:
        save_part(exercise.part, answer, exercise.id)
    except Exception as error:
        print(f"It was not saved for later: {error}")
        print(
            "Define all that it uses in the cell of the answer, and check again. Until then the "
            f"course runs on {_whose(exercise.part)} {exercise.part}."
        )
    else:
        print(f"Saved in my_engine: from here on, the course runs on your {exercise.part}.")


def _whose(part: str) -> str:
    return "your last saved" if is_own(part) else "the course's own"


def verify_file(path: str, exercise_id: str) -> None:
    """Run the oracle of an exercise on a saved part; for `save_part`, in a process of its own."""
    find_exercise(exercise_id).verify(load_file(path), random.Random(0))


def _failure(exercise: Exercise, difference: str, hint_that_fits: str | None, seed: int) -> str:
    further = 1 if hint_that_fits else 2
    lines = [
        f"Exercise {exercise.id} ({exercise.title}) is not right yet.",
        f"First difference: {difference}",
        f"Hint: {hint_that_fits or exercise.hints[0]}",
    ]
    if further <= len(exercise.hints):
        lines.append(f'Another hint: hint("{exercise.id}", {further})')
    lines.append(f'The same inputs again: check("{exercise.id}", ..., seed={seed})')
    return "\n".join(lines)


def _describe(error: BaseException) -> str:
    """An error that the student's code raised, with its line."""
    while type(error).__name__ == "InterpreterError" and error.__cause__ is not None:
        error = error.__cause__  # of a Triton kernel that was interpreted
    if isinstance(error, NoAnswer):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((f for f in reversed(frames) if "site-packages" not in f.filename), frames[-1])
    return f"it raised {type(error).__name__}: {error} (at `{frame.line}`)"


def hint(exercise_id: str, number: int = 1) -> None:
    """Print a hint; the last one says how to see the reference."""
    exercise = find_exercise(exercise_id)
    if not 1 <= number <= len(exercise.hints):
        raise ValueError(f"{exercise_id} has hints 1 to {len(exercise.hints)}, got {number}")
    print(f"Hint {number} of {len(exercise.hints)}: {exercise.hints[number - 1]}")
    if number < len(exercise.hints):
        print(f'Another: hint("{exercise_id}", {number + 1})')
    else:
        print(f'The course\'s own version: reference("{exercise_id}")')


def reference(exercise_id: str) -> None:
    """Print the course's own version of an exercise. To read, not to copy: a copy earns nothing."""
    print(program_of(load_object(find_exercise(exercise_id).reference)))


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Interrupt code that runs too long, where the platform and thread allow it."""
    if (
        not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def interrupt(*_: Any) -> None:
        raise NoAnswer(f"it did not end within {seconds} s; is there a loop that never stops?")

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def compare(got: Any, expected: Any, where: str, *, tolerance: float = 1e-6) -> None:
    """Raise `Mismatch` at the first difference: type, fields, shape, dtype, element.

    Args:
        got: what the student's code gave.
        expected: what the oracle gave. A dataclass is compared field by field, by name, so that
            the student may use a class of their own.
        where: the call and its inputs, to begin the message with.
        tolerance: relative, for floats.
    """
    if is_dataclass(expected) and not isinstance(expected, type):
        for field in fields(expected):
            if not hasattr(got, field.name):
                raise Mismatch(
                    f"{where} returned {got!r}, which has no {field.name!r}; "
                    f"expected a {type(expected).__name__}"
                )
            compare(
                getattr(got, field.name),
                getattr(expected, field.name),
                f"{field.name} of {where}",
                tolerance=tolerance,
            )
    elif isinstance(expected, dict):
        if not isinstance(got, dict) or list(got) != list(expected):
            keys = sorted(got) if isinstance(got, dict) else got
            raise Mismatch(f"{where}: expected the keys {list(expected)}, got {keys!r}")
        for key, value in expected.items():
            compare(got[key], value, f"{key!r} of {where}", tolerance=tolerance)
    elif isinstance(expected, bool | str) or expected is None:
        if got is not expected and got != expected:
            raise Mismatch(f"{where}: expected {expected!r}, got {got!r}")
    else:
        _compare_arrays(got, expected, where, tolerance)


def _compare_arrays(got: Any, expected: Any, where: str, tolerance: float) -> None:
    want = np.asarray(expected)
    try:
        have = np.asarray(got)
    except Exception:
        raise Mismatch(f"{where}: expected {expected!r}, got {got!r}") from None
    if have.shape != want.shape:
        if want.ndim == 0:
            raise Mismatch(f"{where}: expected the number {expected}, got {got!r}")
        raise Mismatch(f"{where}: expected shape {list(want.shape)}, got {list(have.shape)}")
    if have.dtype.kind not in "iufb" or (want.dtype.kind in "iu" and have.dtype.kind not in "iuf"):
        raise Mismatch(f"{where}: expected {want.dtype} numbers, got {have.dtype}: {got!r}")
    close = np.isclose(have, want, rtol=tolerance, atol=0 if want.dtype.kind in "iu" else 1e-12)
    if close.all():
        return
    if want.ndim == 0:
        raise Mismatch(f"{where}: expected {expected}, got {got}")
    index = tuple(int(i) for i in np.argwhere(~close)[0])
    raise Mismatch(f"{where}, element {list(index)}: expected {want[index]}, got {have[index]}")
