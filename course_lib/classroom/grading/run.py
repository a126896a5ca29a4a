"""Grades all submissions, several at a time, each in a pytest process of its own.

    graded = grade("submitted", "graded", "solutions")

What was graded before, and has not changed since, is not graded again. Whatever a submission does
to its own process, the others go on.
"""

import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from tqdm import tqdm

from course_lib.classroom.grading.collect import (
    Sheet,
    Submission,
    find_submissions,
    read_sheet,
)
from course_lib.classroom.grading.course_copy import copy_course, copy_without
from course_lib.classroom.grading.graft import Assignment, notebook_for, read_assignment
from course_lib.classroom.grading.isolate import Isolation, Limits, isolation_here
from course_lib.classroom.grading.marks import (
    Graded,
    Mark,
    Row,
    manual_marks,
    rows,
    write_csv,
    write_junit,
)
from course_lib.classroom.grading.report import write_pages
from course_lib.data import DATA_DIR


@dataclass(frozen=True)
class Grading:
    """What came out of a run.

    Args:
        rows: one for each student.
        isolation: the walls that were in force.
        num_graded: notebooks that were graded now; the others had not changed.
        unknown: submissions for which the instructor has no notebook.
    """

    rows: list[Row]
    isolation: Isolation
    num_graded: int
    unknown: list[str]


@dataclass(frozen=True)
class _Run:
    """What all submissions of a run have in common."""

    seed: int
    limits: Limits
    isolation: Isolation
    courses: Mapping[str, str]  # exercise -> its copy of the course
    course_digest: str
    folder: Path


def grade(
    submitted: Path,
    out: Path,
    solutions: Path,
    *,
    limits: Limits | None = None,
    workers: int | None = None,
    isolation: Isolation | None = None,
    show_progress: bool = True,
) -> Grading:
    """Grade the folder `submitted` and write marks and pages to `out`.

    Args:
        submitted: `{student}/{assignment}/{notebook}.ipynb`.
        out: `grades.csv`, `overview.html`, `feedback/`, `grades.xml`, `results/`, `manual.csv`.
        solutions: the complete notebooks, `{assignment}/{notebook}.ipynb`.
        limits: of each exercise's process.
        workers: submissions at a time; by default one for each core.
        isolation: other walls than the best there are.
        show_progress: draw a bar.

    Raises:
        ValueError: there is nothing to grade, or `manual.csv` has a line without points.
    """
    submissions = list(find_submissions(submitted))
    paths = {s: solutions / s.assignment / f"{s.notebook}.ipynb" for s in submissions}
    known = [s for s in submissions if paths[s].exists()]
    if not known:
        raise ValueError(
            f"no submission in {submitted} has a notebook in {solutions}; expected "
            "{student}/{assignment}/{notebook}.ipynb, such as "
            "ada/lab_a_architect/a1_continuous_batching.ipynb"
        )
    out.mkdir(parents=True, exist_ok=True)
    given = manual_marks(out / "manual.csv")
    assignments = {path: read_assignment(path) for path in sorted({paths[s] for s in known})}
    graded: dict[str, Graded] = {}
    with _prepared(list(assignments.values()), limits, isolation) as run:
        workers = workers or os.cpu_count() or 1
        bar = tqdm(total=len(known), unit="notebook", disable=not show_progress)
        num_graded = 0
        with bar, ThreadPoolExecutor(workers) as pool:
            todo = {
                pool.submit(_graded, s, assignments[paths[s]], out / "results", run): s
                for s in known
            }
            for done in as_completed(todo):
                submission = todo[done]
                graded[submission.key], is_new = done.result()
                num_graded += is_new
                bar.set_postfix_str(submission.student)
                bar.update()
    ordered = [graded[s.key] for s in known]
    table = rows(ordered, list(assignments.values()), given)
    write_csv(out / "grades.csv", table)
    write_junit(out / "grades.xml", ordered)
    unknown = [s.key for s in submissions if s not in known]
    write_pages(out, table, ordered, unknown)
    return Grading(table, run.isolation, num_graded, unknown)


@contextmanager
def _prepared(
    assignments: list[Assignment], limits: Limits | None, isolation: Isolation | None
) -> Iterator[_Run]:
    """A folder with a copy of the course for each exercise, and a seed for this run's inputs."""
    folder = Path(tempfile.mkdtemp(prefix="grade-"))
    try:
        folder.chmod(0o755)  # the sandboxed user must reach its copy
        plain = copy_course(folder / "course")
        courses = {}
        tasks = [task for assignment in assignments for task in assignment.tasks]
        for exercise in (task.exercise for task in tasks):
            asked = (exercise.reference, *exercise.off_limits)
            courses[exercise.id] = str(copy_without(asked, plain, folder / f"for-{exercise.id}"))
        seed = random.SystemRandom().getrandbits(32)
        walls = isolation or isolation_here()
        with _forking(sorted({task.exercise.verify.__module__ for task in tasks})):
            yield _Run(seed, limits or Limits(), walls, courses, _course_digest(), folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _graded(
    submission: Submission, assignment: Assignment, results: Path, run: _Run
) -> tuple[Graded, bool]:
    """The result of a submission, and whether it is new."""
    kept_at = results / submission.student / submission.assignment / f"{submission.notebook}.json"
    sheet = read_sheet(submission.path, assignment)
    digest = _digest(sheet, assignment, run)
    kept = Graded.read(kept_at)
    if kept is not None and kept.digest == digest:
        return kept, False
    begun = time.monotonic()
    rest = (submission.student, submission.assignment, submission.notebook, digest)
    if sheet.unreadable:
        marks = tuple(
            Mark(t.exercise.id, t.check_id, 0.0, t.points, "wrong", sheet.unreadable)
            for t in assignment.tasks
        )
        graded = Graded(
            *rest, run.isolation, run.seed, marks, (sheet.unreadable,), sheet.unreadable
        )
    else:
        marks, flags, cells = _ran(sheet, assignment, run)
        flags = [*sheet.flags, *flags]
        graded = Graded(
            *rest, run.isolation, run.seed, marks, tuple(dict.fromkeys(flags)),
            seconds=round(time.monotonic() - begun, 1), cells=cells,
        )  # fmt: skip
        if any(mark.outcome == "not graded" for mark in marks):
            graded = replace(graded, digest="")  # so the next run tries again
    graded.write(kept_at)
    return graded, True


def _digest(sheet: Sheet, assignment: Assignment, run: _Run) -> str:
    """Of all that a result depends on: the answers, what is asked, the oracles, the walls."""
    hasher = hashlib.sha256()
    for part in (asdict(sheet), assignment.path.read_text("utf-8"), asdict(run.limits)):
        hasher.update(json.dumps(part, sort_keys=True).encode())
    hasher.update(f"{run.isolation} {run.course_digest}".encode())
    return hasher.hexdigest()


def _course_digest() -> str:
    hasher = hashlib.sha256()
    for path in sorted((DATA_DIR.parent / "course_lib" / "classroom").rglob("*.py")):
        hasher.update(path.read_bytes())
    return hasher.hexdigest()


def _ran(
    sheet: Sheet, assignment: Assignment, run: _Run
) -> tuple[tuple[Mark, ...], list[str], dict[str, Any]]:
    """Run the notebooks of all exercises; marks, flags, and what each cell did."""
    folder = Path(tempfile.mkdtemp(prefix="s", dir=run.folder))
    try:
        job = {"seed": run.seed, "limits": asdict(run.limits), "isolation": run.isolation}
        (folder / "job.json").write_text(json.dumps(job | {"courses": dict(run.courses)}))
        ended = _run_pytest(folder, sheet, assignment, run.limits)
        lines = (folder / "results.jsonl").read_text("utf-8").splitlines()
        results = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        results, ended = [], "grading did not begin"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    verdicts = {r["exercise"]: r for r in results if "outcome" in r}
    cells = {f"{r['exercise']} {r['cell']}": r for r in results if "cell" in r}
    marks, flags = [], []
    for task in assignment.tasks:
        exercise = task.exercise.id
        found = verdicts.get(exercise)
        if found is None:
            found = {
                "outcome": "not graded",
                "message": f"Exercise {exercise}: {ended}",
                "flags": [ended],
            }
        seconds = sum(r["seconds"] for r in cells.values() if r["exercise"] == exercise)
        points = task.points if found["outcome"] == "passed" else 0.0
        marks.append(
            Mark(
                exercise,
                task.check_id,
                points,
                task.points,
                found["outcome"],
                found["message"],
                round(seconds, 2),
                found.get("picture", ""),
            )
        )
        flags += [f"{exercise}: {flag}" for flag in found["flags"]]
    return tuple(marks), flags, cells


def _run_pytest(folder: Path, sheet: Sheet, assignment: Assignment, limits: Limits) -> str:
    """Run nbval on the notebooks in order. Returns what to say where there is no result."""
    exercises = [task.exercise.id for task in assignment.tasks]
    arguments = ["-p", "nbval.plugin", "-p", "course_lib.classroom.grading.plugin", "-q"]
    arguments += ["-p", "no:cacheprovider", "--nbval-lax", f"--nbval-cell-timeout={limits.cell_s}"]
    arguments += ["--rootdir", str(folder), *(f"{e}/exercise.ipynb" for e in exercises)]
    process = _FRESH.Process(target=_pytest, args=(folder, sheet, assignment, arguments))
    process.start()
    process.join(len(exercises) * (60 + 4 * limits.cell_s))
    if process.exitcode is not None:
        return "grading ended before it was asked"
    assert process.pid is not None
    for member in [*psutil.Process(process.pid).children(recursive=True), process]:
        with suppress(psutil.Error):
            member.kill()
    process.join()
    return "grading did not end in time"


# A fresh process for each submission, forked from one that has imported what all of them need and
# has never seen a submission: the imports take longer than most answers.
_FRESH = multiprocessing.get_context("forkserver")
_NEEDED = ["numpy", "pytest", "nbval.plugin", "course_lib.classroom.grading.plugin"]

#: Of the process that asks, whatever it is sent.
_MEMORY_BYTES = 8 << 30


def _pytest(folder: Path, sheet: Sheet, assignment: Assignment, arguments: list[str]) -> None:
    """Write the notebooks and become pytest. Only here is the source of answers looked at."""
    os.chdir(folder)
    os.environ |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    log = os.open("pytest.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    (folder / "pytest.ini").write_text("[pytest]\n")
    for task in assignment.tasks:
        path = folder / task.exercise.id / "exercise.ipynb"
        path.parent.mkdir()
        nbformat.write(notebook_for(task, assignment, sheet.answers), path)
    sys.exit(pytest.main(arguments))


@contextmanager
def _forking(modules: list[str]) -> Iterator[None]:
    """Have fresh processes begin with these modules. They see no GPU, as students' do not."""
    before = dict(os.environ)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    _FRESH.set_forkserver_preload([*_NEEDED, *modules])
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
