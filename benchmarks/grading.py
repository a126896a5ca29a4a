"""Thirty submissions of a lab: `course grade` beside nbgrader's autograde on the same notebooks.

    python benchmarks/grading.py [--lab a1] [--students 30] [--nbgrader-students 30]

Half of the students hand in the complete notebook, half the one they were given. nbgrader runs all
cells, one submission after another, in a process that sees the machine and the oracles. `course
grade` runs the answers only, each in a sandbox, and several submissions at a time.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

# A script's own folder is searched first, and there `kernels.py` would hide the package.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import typer
from rich.console import Console

from benchmarks.nbgrader_course import ROOT, NbgraderCourse, find_nbgrader
from benchmarks.tables import print_table
from course_lib.classroom.grading.run import grade
from course_lib.classroom.release import student_version

console = Console()


def hand_in(folder: Path, notebook: Path, students: int) -> None:
    """Submissions in nbgrader's layout, in turn complete and untouched."""
    texts = (notebook.read_text(encoding="utf-8"), student_version(notebook))
    for number in range(students):
        path = folder / f"student-{number:02}" / notebook.parent.name / notebook.name
        path.parent.mkdir(parents=True)
        path.write_text(texts[number % 2], encoding="utf-8")


def main(
    lab: Annotated[str, typer.Option(help="Beginning of the notebook's name.")] = "a1",
    students: Annotated[int, typer.Option(min=1, help="Submissions.")] = 30,
    workers: Annotated[int, typer.Option(min=1, help="At a time, for `course grade`.")] = 2,
    nbgrader_students: Annotated[int, typer.Option(min=0, help="Of them, for nbgrader.")] = 30,
) -> None:
    """Grade the same submissions with both and print the times."""
    (notebook,) = (ROOT / "solutions").glob(f"lab_*/{lab}_*.ipynb")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hand_in(folder / "submitted", notebook, students)
        begun = time.monotonic()
        graded = grade(folder / "submitted", folder / "out", ROOT / "solutions", workers=workers)
        scores = [row.points for row in graded.rows]
        rows = [_row("course grade", scores, graded.rows[0].out_of, time.monotonic() - begun)]
        program, some = find_nbgrader(), min(nbgrader_students, students)
        if program is None:
            console.print("nbgrader is not here: pip install it into an environment of its own")
        elif some:
            course = NbgraderCourse(folder / "nbgrader", program)
            source = course.folder / "source" / notebook.parent.name / notebook.name
            source.parent.mkdir(parents=True)
            source.write_text(notebook.read_text(encoding="utf-8"), encoding="utf-8")
            course.release(notebook.parent.name)
            hand_in(course.folder / "submitted", notebook, some)
            begun = time.monotonic()
            course.autograde(notebook.parent.name)
            seconds = time.monotonic() - begun
            theirs = list(course.scores().values())
            rows.append(_row("nbgrader autograde", theirs, graded.rows[0].out_of, seconds))
    title = f"{notebook.stem}; course grade: {workers} at a time, isolation {graded.isolation}"
    print_table(console, title, rows)


def _row(name: str, scores: list[float], out_of: float, seconds: float) -> dict[str, Any]:
    return {
        "graded by": name,
        "submissions": len(scores),
        "with all points": sum(score == out_of for score in scores),
        "seconds": seconds,
        "seconds a submission": seconds / len(scores),
    }


if __name__ == "__main__":
    typer.run(main)
