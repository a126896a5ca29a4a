"""Marks: the table, marks by hand, JUnit, and the pages."""

import csv
from pathlib import Path
from xml.etree import ElementTree

import pytest

from course_lib.classroom.grading.graft import Assignment
from course_lib.classroom.grading.marks import (
    Graded,
    Mark,
    manual_marks,
    rows,
    write_csv,
    write_junit,
)
from course_lib.classroom.grading.report import reason_of, write_pages
from tests.classroom.grading.notebooks import instructor_notebook

WRONG = (
    "Exercise A1.1 (static and continuous slots) is not right yet.\n"
    "First difference: token_steps of simulate_slots([<b>8</b>], slots=2): expected 1, got 2\n"
    "Hint: Static: cut the list.\nAnother hint: hint(...)"
)


@pytest.fixture
def assignment(tmp_path: Path) -> Assignment:
    return instructor_notebook(tmp_path / "lab" / "two.ipynb", "A1.1", "A2.2")


def graded(student: str, outcome: str, message: str = "", **more) -> Graded:
    points = 2.0 if outcome == "passed" else 0.0
    marks = (
        Mark("A1.1", "a1-1-check", points, 2.0, outcome, message, 0.5),
        Mark("A2.2", "a2-2-check", 1.0, 1.0, "passed"),
    )
    return Graded(student, "lab", "two", "digest", "bubblewrap", 7, marks, **more)


def test_a_result_is_kept_and_read_again(tmp_path: Path) -> None:
    kept = graded("ada", "wrong", WRONG, flags=("A1.1: odd",), cells={"A1.1 x": {"seconds": 1}})
    kept.write(tmp_path / "r" / "ada.json")
    assert Graded.read(tmp_path / "r" / "ada.json") == kept
    (tmp_path / "r" / "ada.json").write_text('{"student": "ada", ')
    assert Graded.read(tmp_path / "r" / "ada.json") is None
    assert Graded.read(tmp_path / "nobody.json") is None


def test_the_table_has_a_row_a_student_and_a_column_an_exercise(tmp_path, assignment) -> None:
    both = [graded("bo", "wrong", WRONG), graded("ada", "passed", flags=("A1.1: odd",))]
    write_csv(tmp_path / "grades.csv", rows(both, [assignment], {}))
    with (tmp_path / "grades.csv").open(newline="") as file:
        table = list(csv.reader(file))
    assert table == [
        ["student", "status", "points", "out_of", "A1.1", "A2.2", "flags"],
        ["ada", "to look at", "3", "3", "2", "1", "A1.1: odd"],
        ["bo", "graded", "1", "3", "0", "1", ""],
    ]


def test_a_notebook_that_was_not_handed_in_counts_nothing(tmp_path, assignment) -> None:
    other = instructor_notebook(tmp_path / "lab" / "other.ipynb", "A2.4")
    (row,) = rows([graded("ada", "passed")], [assignment, other], {})
    assert (row.points, row.out_of, row.status) == (3, 5, "incomplete")
    assert row.marks[2].outcome == "missing"


def test_marks_by_hand_take_the_place_of_what_was_found(tmp_path, assignment) -> None:
    path = tmp_path / "manual.csv"
    assert manual_marks(path) == {} and path.read_text() == "student,exercise,points,comment\n"
    path.write_text('student,exercise,points,comment\nbo,A1.1,1.5,"right idea, wrong slot"\n')
    (row,) = rows([graded("bo", "wrong", WRONG)], [assignment], manual_marks(path))
    assert (row.points, row.marks[0].outcome) == (2.5, "by hand")
    assert row.marks[0].message == "right idea, wrong slot"
    path.write_text("student,exercise,points\nbo,A1.1,many\n")
    with pytest.raises(ValueError, match="line 2: expected a number of points, got 'many'"):
        manual_marks(path)


def test_junit_has_a_case_for_each_check_cell(tmp_path) -> None:
    write_junit(tmp_path / "grades.xml", [graded("bo", "wrong", "odd \x00\x1b[31m \ud800 text")])
    suite = ElementTree.parse(tmp_path / "grades.xml").getroot()[0]
    assert (suite.get("name"), suite.get("tests"), suite.get("failures")) == (
        "bo/lab/two",
        "2",
        "1",
    )
    case = suite.find("testcase")
    assert case is not None and case.get("name") == "a1-1-check"
    properties = {p.get("name"): p.get("value") for p in case.iter("property")}
    assert properties == {"exercise": "A1.1", "points": "0.0", "out_of": "2.0"}
    assert "odd" in (case.findtext("failure") or "")


def test_the_pages_show_messages_and_escape_them(tmp_path, assignment) -> None:
    both = [graded(name, "wrong", WRONG, flags=("A1.1: <odd>",)) for name in ("ada", "b<o>")]
    write_pages(tmp_path, rows(both, [assignment], {}), both, ["eve/lab/else"])
    feedback = (tmp_path / "feedback" / "ada.html").read_text()
    assert "expected 1, got 2" in feedback and "&lt;b&gt;8" in feedback and "<b>8" not in feedback
    assert "odd" not in feedback  # flags are for the instructor
    overview = (tmp_path / "overview.html").read_text()
    assert "No network" in overview and "eve/lab/else" in overview
    assert "Static: cut the list." in overview and "ada, b&lt;o&gt;" in overview
    assert "&lt;odd&gt;" in overview and "<script" not in overview + feedback


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (WRONG, "Static: cut the list."),
        ("Exercise A1.1 (x) is not right yet.\nFirst difference: it raised KeyError: 1\nHint: h",
         "it raised KeyError: 1"),
        ("Exercise A1.1 could not be asked: it ended", "it ended"),
    ],
)  # fmt: skip
def test_failures_are_told_apart_by_their_reason(message, reason) -> None:
    assert reason_of(message) == reason
