"""Grades all submissions, several at a time, each in a pytest process of its own.

    graded = grade("submitted", "graded", "solutions")

What was graded before, and has not changed since, is not graded again. Whatever a submission does
to its own process, the others go on.
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nbformat
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
from course_lib.classroom.grading.suspicions import suspicions
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
        for task in (task for assignment in assignments for task in assignment.tasks):
            exercise = task.exercise
            asked = (exercise.reference, *exercise.off_limits)
            courses[exercise.id] = str(copy_without(asked, plain, folder / f"for-{exercise.id}"))
        yield _Run(
            random.SystemRandom().getrandbits(32),
            limits or Limits(),
            isolation or isolation_here(),
            courses,
            folder,
        )
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
    graded.write(kept_at)
    return graded, True


def _digest(sheet: Sheet, assignment: Assignment, run: _Run) -> str:
    """Of all that a result depends on: the answers, what is asked, the oracles, the walls."""
    hasher = hashlib.sha256()
    for part in (asdict(sheet), assignment.path.read_text("utf-8"), asdict(run.limits)):
        hasher.update(json.dumps(part, sort_keys=True).encode())
    hasher.update(f"{run.isolation} {_course_digest()}".encode())
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
        _write_job(folder, sheet, assignment, run)
        ended = _run_pytest(folder, [task.exercise.id for task in assignment.tasks], run.limits)
        lines = (folder / "results.jsonl").read_text("utf-8").splitlines()
        results = [json.loads(line) for line in lines]
    except OSError:
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
                "outcome": "wrong",
                "message": f"Exercise {exercise}: {ended}",
                "flags": [ended],
            }
        seconds = sum(r["seconds"] for r in cells.values() if r["exercise"] == exercise)
        points = task.points if found["outcome"] == "passed" else 0.0
        outcome, message = found["outcome"], found["message"]
        marks.append(
            Mark(exercise, task.check_id, points, task.points, outcome, message, round(seconds, 2))
        )
        looks = [*found["flags"], *suspicions(sheet.answers.get(task.answer_id, ""))]
        flags += [f"{exercise}: {flag}" for flag in dict.fromkeys(looks)]
    return tuple(marks), flags, cells


def _write_job(folder: Path, sheet: Sheet, assignment: Assignment, run: _Run) -> None:
    job = {
        "seed": run.seed,
        "limits": asdict(run.limits),
        "isolation": run.isolation,
        "courses": dict(run.courses),
    }
    (folder / "job.json").write_text(json.dumps(job))
    (folder / "pytest.ini").write_text("[pytest]\n")
    for task in assignment.tasks:
        path = folder / task.exercise.id / "exercise.ipynb"
        path.parent.mkdir()
        nbformat.write(notebook_for(task, assignment, sheet.answers), path)


def _run_pytest(folder: Path, exercises: list[str], limits: Limits) -> str:
    """Run nbval on the notebooks in order. Returns what to say where there is no result."""
    plugins = ["-p", "nbval.plugin", "-p", "course_lib.classroom.grading.plugin"]
    command = [sys.executable, "-m", "pytest", *plugins, "-p", "no:cacheprovider", "-q"]
    command += ["--nbval-lax", f"--nbval-cell-timeout={limits.cell_s}", "--rootdir", str(folder)]
    command += [f"{exercise}/exercise.ipynb" for exercise in exercises]
    environment = {
        **os.environ,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",
        "CUDA_VISIBLE_DEVICES": "",  # the student's process has no GPU, so neither have we
        "OMP_NUM_THREADS": "1",
    }
    time_limit_s = len(exercises) * (60 + 4 * limits.cell_s)
    with (folder / "pytest.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            process.wait(timeout=time_limit_s)
        except subprocess.TimeoutExpired:
            return "grading did not end in time"
        finally:
            _end(process)
    return "grading ended before it was asked"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End pytest and what it left, if it is still there."""
    import psutil

    if process.poll() is not None:
        return
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        try:
            member.kill()
        except psutil.Error:
            continue
    process.wait()
