"""The pytest plugin that makes nbval a grader: kernels within walls, and a verdict from outside.

`run` starts pytest with it in a folder with a `job.json` and, for each exercise, a folder with its
notebook. nbval runs the cells. When it reaches the one that serves the answer, a thread here puts
the oracle's questions to it. What comes out is written to `results.jsonl` as it falls.
"""

import base64
import io
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbval.plugin
import pytest

from course_lib.classroom.checks import Verdict, assess, find_exercise
from course_lib.classroom.grading.asking import Line, remote_answer
from course_lib.classroom.grading.isolate import Limits
from course_lib.classroom.grading.kernel import Kernel, Stopped, adopt_orphans, end_children
from course_lib.classroom.grading.portrait import portrait
from course_lib.classroom.grading.suspicions import suspicions


class _Job:
    """What `run` asks for, and what has come out so far."""

    def __init__(self, folder: Path) -> None:
        job = json.loads((folder / "job.json").read_text())
        self.seed: int = job["seed"]
        self.limits = Limits(**job["limits"])
        self.results = folder / "results.jsonl"
        self.outcomes: dict[str, str] = {}
        self.breaking: set[str] = set()  # exercises whose answer cell ends the process, or never

        def kernel(kernel_name: str, cwd: str, startup_timeout: float) -> Kernel:
            course = Path(job["courses"][Path(cwd).name])
            return Kernel(Path(cwd), course, job["isolation"], self.limits, startup_timeout)

        nbval.plugin.RunningKernel = kernel

    def write(self, **what: Any) -> None:
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(what) + "\n")


_JOB = pytest.StashKey[_Job]()


def pytest_configure(config: pytest.Config) -> None:
    """Read the job, and give nbval our kernel."""
    config.stash[_JOB] = _Job(config.rootpath)
    adopt_orphans()


def pytest_sessionfinish() -> None:
    """Leave nothing running."""
    end_children()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: Any) -> Iterator[None]:
    """Run a cell; beside the one that serves the answer, ask it. Note what came out."""
    job: _Job = item.config.stash[_JOB]
    kernel: Kernel = item.parent.kernel
    course, begun = item.cell.metadata["course"], time.monotonic()
    item.output_timeout = 2
    is_right = job.outcomes.get(course["exercise"]) == "passed"
    if (course["role"] == "course" and is_right) or (
        course["role"] == "answer" and course["exercise"] in job.breaking
    ):
        item.cell.source = ""
    judging = _Judging(item, job) if course["role"] == "serve" and kernel.is_alive() else None
    error: Exception | None = None
    try:
        yield
    except Exception as raised:  # of the cell, of nbval, or ours
        error = raised
    told = _told(error)
    if error is not None and course["role"] == "answer":
        kernel.troubles.append(told.splitlines()[-1] if told else type(error).__name__)
        if isinstance(error, Stopped) or item.parent.timed_out:
            job.breaking.add(course["exercise"])
    printed = "".join(str(out.get("text", "")) for out in item.test_outputs or ())
    kernel.flags += _flags(printed, told or "", item.parent.timed_out)
    job.write(
        cell=course["id"],
        exercise=item.path.parent.name,
        seconds=round(time.monotonic() - begun, 2),
        error=told,
    )
    if course["role"] == "serve":
        exercise = course["exercise"]
        verdict = judging.verdict() if judging else _unasked(exercise, kernel)
        job.outcomes[exercise] = verdict.outcome
        flags = kernel.flags + _flags("", verdict.message, False)
        if verdict.outcome == "not your own":
            flags.append("it is, uses or copies the course's own version")
        job.write(
            exercise=exercise,
            outcome=verdict.outcome,
            message=_cut(verdict.message),
            picture=_drawn(verdict),
            flags=list(dict.fromkeys([*flags, *suspicions(_answer_source(item))])),
        )
    if error is not None:
        raise error


class _Judging(threading.Thread):
    """The oracle's side of a conversation; nbval waits meanwhile for the cell to end."""

    def __init__(self, item: Any, job: _Job) -> None:
        super().__init__(daemon=True)
        course = item.cell.metadata["course"]
        cells = [c for c in item.parent.nb.cells if c.metadata["course"]["role"] in _STUDENTS]
        self.portrait = portrait([cell.source for cell in cells], course["name"])
        self.exercise = find_exercise(course["exercise"])
        self.kernel: Kernel = item.parent.kernel
        self.job = job
        self.found: Verdict | None = None
        self.start()

    def run(self) -> None:
        line = None
        try:
            line = Line(self.kernel.listener, self.job.limits.cell_s)
            if line.hello.get("kind") == "missing":
                self.found = _unasked(self.exercise.id, self.kernel)
            else:
                answer = remote_answer(line, self.portrait)
                self.found = assess(self.exercise, answer, self.job.seed)
        except Exception as error:
            self.found = Verdict("wrong", f"Exercise {self.exercise.id}: {error}")
        finally:
            self.kernel.close_line()  # whoever else has called is not kept waiting
            if line is not None:
                line.socket.close()

    def verdict(self) -> Verdict:
        """What was found. The cell has ended, so the line has, or does soon."""
        self.join(timeout=5)
        if self.found is None:
            self.kernel.close_line()
            self.join(timeout=5)
        return self.found or _unasked(self.exercise.id, self.kernel)


_STUDENTS = ("imports", "answer")


def _answer_source(item: Any) -> str:
    """Source of the cell that the exercise of this notebook is answered in: the last such cell."""
    answers = [c for c in item.parent.nb.cells if c.metadata["course"]["role"] == "answer"]
    return str(answers[-1].source)


def _unasked(exercise_id: str, kernel: Kernel) -> Verdict:
    if kernel.troubles and all(t.startswith("NotImplementedError") for t in kernel.troubles):
        return Verdict("unsolved")
    why = "; ".join(kernel.troubles) or "its cell does not define the answer"
    return Verdict("wrong", f"Exercise {exercise_id} could not be asked: {why}")


_SIGNS = (
    (r"MemoryError", "it ran into the limit on memory"),
    (r"\[Errno 11\]|can't start new thread", "it ran into the limit on processes"),
    (r"\[Errno 27\]|\[Errno 28\]", "it ran into the limit on files"),
    (r"\[Errno 13\]|\[Errno 30\]", "it tried to write where it may not"),
    (r"\[Errno 101\]|name resolution", "it tried to reach the network"),
    (r"it was never reached", "it ended before it was asked"),
)


def _flags(printed: str, told: str, timed_out: bool) -> list[str]:
    """What an instructor should look at."""
    flags = [flag for pattern, flag in _SIGNS if re.search(pattern, told)]
    if re.search(r"Exercise \S+ passed", printed):
        flags.append("it prints that an exercise has passed")
    if timed_out or "did not end within" in told:
        flags.append("it did not end in time")
    return flags


def _drawn(verdict: Verdict) -> str:
    """The picture as PNG in base64. It is drawn from what a student's code gave, so it may fail."""
    if verdict.picture is None:
        return ""
    png = io.BytesIO()
    try:
        verdict.picture().savefig(png, format="png", dpi=80)
    except Exception:
        return ""
    return base64.b64encode(png.getvalue()).decode()


def _cut(message: str, at_most: int = 6000) -> str:
    """A message of bearable length: what a student returned may be long."""
    half = at_most // 2
    return message if len(message) <= at_most else f"{message[:half]} ... {message[-half:]}"


def _told(error: Exception | None) -> str | None:
    """An error as text, without terminal colours."""
    if error is None:
        return None
    inner = getattr(error, "inner_traceback", None)
    text = re.sub(r"\x1b\[[0-9;]*m", "", inner or str(error)).strip()
    return text[-4000:]
