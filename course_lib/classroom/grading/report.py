"""The pages of a grading: one for each student, and one of the class for the instructor.

Each page is a single file without scripts or anything from elsewhere. All that comes from a
student is escaped.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, select_autoescape

from course_lib.classroom.checks import find_exercise
from course_lib.classroom.grading.isolate import MEANING
from course_lib.classroom.grading.marks import Graded, Mark, Row

#: Outcomes as they are shown, with a colour each that also colour-blind people can tell apart.
OUTCOMES = {
    "passed": ("right", "#0072b2"),
    "by hand": ("by hand", "#56b4e9"),
    "wrong": ("not right yet", "#e69f00"),
    "not your own": ("not one's own", "#d55e00"),
    "unsolved": ("not solved", "#c9c9c9"),
    "missing": ("not handed in", "#ececec"),
    "not graded": ("not graded", "#000000"),
}


@dataclass(frozen=True)
class Failure:
    """A way to be wrong that several students share.

    Args:
        exercise: in which.
        what: the hint that the oracle gave, or what happened.
        students: who.
    """

    exercise: str
    what: str
    students: tuple[str, ...]


def write_pages(
    out: Path, table: Sequence[Row], graded: Sequence[Graded], unknown: Sequence[str]
) -> None:
    """Write `overview.html`, and `feedback/{student}.html` for each row."""
    environment = Environment(
        loader=PackageLoader("course_lib.classroom.grading"), autoescape=select_autoescape()
    )
    environment.filters["points"] = lambda number: f"{number:g}"
    environment.globals["outcomes"] = OUTCOMES
    (out / "feedback").mkdir(exist_ok=True)
    seeds = {(each.student, mark.exercise): each.seed for each in graded for mark in each.marks}
    for row in table:
        page = environment.get_template("feedback.html").render(
            row=row,
            titles={mark.exercise: find_exercise(mark.exercise).title for mark in row.marks},
            seeds={mark.exercise: seeds.get((row.student, mark.exercise)) for mark in row.marks},
        )
        (out / "feedback" / f"{row.student}.html").write_text(page, encoding="utf-8")
    columns = list(zip(*(row.marks for row in table), strict=True))
    page = environment.get_template("overview.html").render(
        table=table,
        exercises=[_column(marks) for marks in columns],
        totals=_histogram([row.points for row in table], table[0].out_of if table else 0),
        failures=_failures(table),
        isolations=[(name, MEANING[name]) for name in sorted({g.isolation for g in graded})],
        unknown=unknown,
        links={row.student: f"feedback/{quote(row.student)}.html" for row in table},
    )
    (out / "overview.html").write_text(page, encoding="utf-8")


def _column(marks: Sequence[Mark]) -> dict[str, Any]:
    """An exercise over the class: how many had which outcome."""
    count = Counter(mark.outcome for mark in marks)
    return {
        "exercise": marks[0].exercise,
        "title": find_exercise(marks[0].exercise).title,
        "out_of": marks[0].out_of,
        "mean": sum(mark.points for mark in marks) / len(marks),
        "shares": [(name, count[name], 100 * count[name] / len(marks)) for name in OUTCOMES],
    }


def _histogram(points: Sequence[float], out_of: float) -> list[dict[str, Any]]:
    """Students by tenths of the points."""
    bins = [0] * 10
    for number in points:
        bins[min(9, int(10 * number / out_of)) if out_of else 0] += 1
    most = max(bins, default=0) or 1
    return [
        {"label": f"{10 * i} to {10 * i + 10} %", "count": count, "height": 100 * count / most}
        for i, count in enumerate(bins)
    ]


def _failures(table: Sequence[Row], at_most: int = 12) -> list[Failure]:
    """The most common ways to be wrong. Equal hints are the same way; the inputs differ."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in table:
        for mark in row.marks:
            if mark.outcome in ("wrong", "not your own"):
                found.setdefault((mark.exercise, reason_of(mark.message)), []).append(row.student)
    failures = [Failure(*key, tuple(students)) for key, students in found.items()]
    return sorted(failures, key=lambda f: (-len(f.students), f.exercise))[:at_most]


def reason_of(message: str) -> str:
    """What a message says of the mistake: the hint, else its last sentence of what happened."""
    hint = re.search(r"^Hint: (.+)$", message, re.MULTILINE)
    difference = re.search(r"^First difference: (it .+)$", message, re.MULTILINE)
    if difference:  # it raised, or did not end: the general hint says less
        return difference.group(1)
    return hint.group(1) if hint else message.split(": ", 1)[-1].strip()
