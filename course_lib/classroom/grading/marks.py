"""Results of grading: what is kept of a submission, the table of marks, and marks given by hand.

`manual.csv` in the output folder belongs to the instructor: a line there takes the place of what
was found, in this grading and in every later one.
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from course_lib.classroom.grading.graft import Assignment
from course_lib.classroom.grading.isolate import Isolation


@dataclass(frozen=True)
class Mark:
    """One exercise of one student.

    Args:
        exercise: such as "A1.2".
        cell: id of the check cell.
        points: earned.
        out_of: points of a right answer.
        outcome: "passed", "unsolved", "wrong", "not your own", "missing", "by hand", or "not
            graded" if grading itself failed.
        message: for the student.
        seconds: that it took.
        picture: of the first difference, a PNG in base64; empty if there is none.
    """

    exercise: str
    cell: str
    points: float
    out_of: float
    outcome: str
    message: str = ""
    seconds: float = 0.0
    picture: str = ""


@dataclass(frozen=True)
class Graded:
    """One notebook of one student.

    Args:
        digest: of the submission, the instructor's notebook and the course; the same digest is
            not graded again.
        cells: what each cell that ran did, by its id.
    """

    student: str
    assignment: str
    notebook: str
    digest: str
    isolation: Isolation
    seed: int
    marks: tuple[Mark, ...]
    flags: tuple[str, ...] = ()
    unreadable: str | None = None
    seconds: float = 0.0
    cells: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Keep it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        draft.replace(path)

    @staticmethod
    def read(path: Path) -> "Graded | None":
        """What was kept; None if there is nothing, or nothing whole."""
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            marks = tuple(Mark(**mark) for mark in kept.pop("marks"))
            return Graded(**{**kept, "marks": marks, "flags": tuple(kept["flags"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None


@dataclass(frozen=True)
class Row:
    """One student: marks of all exercises, in the order of the columns."""

    student: str
    marks: tuple[Mark, ...]
    flags: tuple[str, ...]
    status: str

    @property
    def points(self) -> float:
        """In all."""
        return sum(mark.points for mark in self.marks)

    @property
    def out_of(self) -> float:
        """What there is to earn."""
        return sum(mark.out_of for mark in self.marks)


MANUAL_COLUMNS = ("student", "exercise", "points", "comment")


def manual_marks(path: Path) -> dict[tuple[str, str], tuple[float, str]]:
    """Marks given by hand: (student, exercise) -> (points, comment). Makes the file if need be.

    Raises:
        ValueError: a line has no number of points; the message names it.
    """
    if not path.exists():
        path.write_text(",".join(MANUAL_COLUMNS) + "\n", encoding="utf-8")
    given = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        for number, line in enumerate(csv.DictReader(file), start=2):
            student, exercise, points, comment = (line.get(n) or "" for n in MANUAL_COLUMNS)
            try:
                given[student, exercise] = (float(points), comment)
            except ValueError:
                raise ValueError(
                    f"{path}, line {number}: expected a number of points, got {points!r}; the "
                    f"columns are {', '.join(MANUAL_COLUMNS)}"
                ) from None
    return given


def rows(
    graded: Iterable[Graded],
    assignments: Sequence[Assignment],
    given: Mapping[tuple[str, str], tuple[float, str]],
) -> list[Row]:
    """A row for each student, with a mark for each exercise of all notebooks that were graded."""
    by_student: dict[str, list[Graded]] = {}
    for each in graded:
        by_student.setdefault(each.student, []).append(each)
    return [_row(s, by_student[s], assignments, given) for s in sorted(by_student)]


def _row(
    student: str,
    graded: Sequence[Graded],
    assignments: Sequence[Assignment],
    given: Mapping[tuple[str, str], tuple[float, str]],
) -> Row:
    found = {mark.exercise: mark for each in graded for mark in each.marks}
    marks = []
    for task in (task for assignment in assignments for task in assignment.tasks):
        exercise = task.exercise.id
        missing = Mark(exercise, task.check_id, 0.0, task.points, "missing", "Not handed in.")
        mark = found.get(exercise, missing)
        if (student, exercise) in given:
            points, comment = given[student, exercise]
            mark = replace(mark, points=points, outcome="by hand", message=comment or mark.message)
        marks.append(mark)
    flags = tuple(dict.fromkeys(flag for each in graded for flag in each.flags))
    if any(each.unreadable for each in graded):
        status = "not readable"
    elif any(mark.outcome == "not graded" for mark in marks):
        status = "not graded"
    elif any(mark.outcome == "missing" for mark in marks):
        status = "incomplete"
    else:
        status = "to look at" if flags else "graded"
    return Row(student, tuple(marks), flags, status)


def write_csv(path: Path, table: Sequence[Row]) -> None:
    """`grades.csv`: a row for each student, a column for each exercise."""
    exercises = [mark.exercise for mark in table[0].marks] if table else []
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["student", "status", "points", "out_of", *exercises, "flags"])
        for row in table:
            points = [f"{mark.points:g}" for mark in row.marks]
            totals = [f"{row.points:g}", f"{row.out_of:g}"]
            writer.writerow([row.student, row.status, *totals, *points, "; ".join(row.flags)])


def write_junit(path: Path, graded: Iterable[Graded]) -> None:
    """`grades.xml`: a suite for each notebook, a case for each check cell, by its id."""
    root = ElementTree.Element("testsuites", name="grades")
    for each in graded:
        failed = [mark for mark in each.marks if mark.outcome != "passed"]
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=f"{each.student}/{each.assignment}/{each.notebook}",
            tests=str(len(each.marks)),
            failures=str(len(failed)),
            errors="0",
            time=f"{each.seconds:.2f}",
        )
        for mark in each.marks:
            case = ElementTree.SubElement(
                suite,
                "testcase",
                classname=f"{each.student}.{each.notebook}",
                name=mark.cell,
                time=f"{mark.seconds:.2f}",
            )
            values = {"exercise": mark.exercise, "points": mark.points, "out_of": mark.out_of}
            properties = ElementTree.SubElement(case, "properties")
            for name, value in values.items():
                ElementTree.SubElement(properties, "property", name=name, value=str(value))
            if mark.outcome != "passed":
                failure = ElementTree.SubElement(case, "failure", message=mark.outcome)
                failure.text = _printable(mark.message)
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def _printable(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return "".join(
        c for c in text if c in "\t\n" or (c.isprintable() and c < "\ud800") or c > "\uffff"
    )
